"""`tppo agreement` through the command line, on a run whose true agreement is known."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.agreement_run import fill, label_rows, labelled, rule, write_labels
from tppo.cli import main
from tppo.core.common import UserError
from tppo.core.config import Recipe
from tppo.core.run import RunFolder
from tppo.judge.sheet import read_judge
from tppo.judge.verdict import split_response


@pytest.fixture
def recipe(prepared_recipe: Any) -> Recipe:
    return labelled(prepared_recipe())


def agreement(recipe: Recipe, action: str, **settings: Any) -> Path:
    """Run the command; returns the agreement folder."""
    options = {"action": action, "examples": 20, **settings}
    arguments = [x for name, value in options.items() for x in (f"--agreement.{name}", str(value))]
    main(["agreement", "--run_dir", recipe.run_dir, *arguments])
    return RunFolder(recipe).path("agreement")


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "agreement.json").read_text(encoding="utf-8"))


def judge_label(text: str, i: int | None) -> bool:
    """What the judge said: `rule` of a word, its majority for a whole response as the sheet shows it."""
    if i is not None:
        return rule(text, i)
    words = [word for query in text.split(" | ") for word in query.split()]
    return sum(rule(word, n) for n, word in enumerate(words)) * 2 > len(words)


def agree(example_id: str, text: str, i: int | None) -> str:
    return "1" if judge_label(text, i) else "0"


def test_a_person_who_always_agrees(recipe: Recipe, capsys: pytest.CaptureFixture[str]):
    folder = agreement(recipe, "export")
    assert {path.name for path in folder.iterdir()} == {"sheet.csv", "sheet.json"}
    fill(folder, agree)
    agreement(recipe, "compare")
    found = result(folder)
    [pair] = found["pairs"]
    assert (pair["a"], pair["b"], pair["items"]) == ("rule-v1", "sheet", 20)
    assert (pair["only_a"], pair["only_b"]) == (0, 0)
    for kind in ("words", "sentences"):
        assert pair[kind]["agreement"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert pair[kind]["kappa"]["value"] == 1.0
        assert pair[kind]["missing"] == {"a": {}, "b": {}}
        assert pair[kind]["compared"] == pair[kind]["questions"]
    key = json.loads((folder / "sheet.json").read_text(encoding="utf-8"))
    assert pair["words"]["compared"] == sum(len(split_response(item["response"]).words) for item in key["items"])
    assert pair["sentences"]["compared"] == 20
    assert [rater["kind"] for rater in found["raters"]] == ["judge", "person"]
    printed = capsys.readouterr().out
    assert "rule-v1 (a) and sheet (b): 20 responses" in printed
    assert "100.0" in printed


def test_disagreement_and_empty_labels_are_counted_exactly(recipe: Recipe):
    """The first word of every response is turned round, the second left empty, the response never answered."""
    folder = agreement(recipe, "export")

    def answer(example_id: str, text: str, i: int | None) -> str:
        if i is None or i == 1:
            return ""
        return "10"[int(agree(example_id, text, i))] if i == 0 else agree(example_id, text, i)

    fill(folder, answer)
    agreement(recipe, "compare")
    [pair] = result(folder)["pairs"]
    key = json.loads((folder / "sheet.json").read_text(encoding="utf-8"))
    lengths = [len(split_response(item["response"]).words) for item in key["items"]]
    first, second = sum(length > 0 for length in lengths), sum(length > 1 for length in lengths)
    words = pair["words"]
    assert words["questions"] == sum(lengths)
    assert words["compared"] == sum(lengths) - second
    assert words["missing"] == {"a": {}, "b": {"unanswered": second}}
    # `rule` calls every first word relevant, so each flip is a word that only the judge calls relevant.
    assert words["confusion"]["only_a_relevant"] == first
    assert words["confusion"]["only_b_relevant"] == 0
    assert words["agreement"]["value"] == pytest.approx(1 - first / words["compared"])
    assert words["agreement"]["low"] < words["agreement"]["value"] < words["agreement"]["high"]
    sentences = pair["sentences"]
    assert (sentences["compared"], sentences["missing"]["b"]) == (0, {"unanswered": 20})
    assert sentences["agreement"] == sentences["kappa"] == {"value": None, "low": None, "high": None}


def test_neither_sheet_nor_key_shows_what_the_judge_said(recipe: Recipe, prepared_recipe: Any):
    """Labels that say the opposite give the very same sheet; judge, scores and labels are nowhere in the files."""
    folder = agreement(recipe, "export")
    other = labelled(prepared_recipe())
    opposite = write_labels(
        Path(other.run_dir) / "opposite.parquet", label_rows(other, lambda w, i: not rule(w, i), "secret-judge")
    )
    second = agreement(other, "export", labels=opposite)
    assert (folder / "sheet.csv").read_bytes() == (second / "sheet.csv").read_bytes()
    one, two = (json.loads((f / "sheet.json").read_text(encoding="utf-8")) for f in (folder, second))
    assert one["items"] == two["items"]
    assert set(two["items"][0]) == {"example_id", "sample", "response", "against"}
    assert "secret-judge" not in (second / "sheet.json").read_text(encoding="utf-8")


def test_the_seed_draws_and_shuffles(recipe: Recipe, prepared_recipe: Any):
    first = json.loads((agreement(recipe, "export") / "sheet.json").read_text(encoding="utf-8"))["items"]
    other = labelled(prepared_recipe())
    main(["agreement", "--run_dir", other.run_dir, "--agreement.examples", "20", "--seed", "1"])
    second = json.loads((RunFolder(other).path("agreement") / "sheet.json").read_text(encoding="utf-8"))["items"]
    ids = [[item["example_id"] for item in items] for items in (first, second)]
    assert len(set(ids[0])) == len(set(ids[1])) == 20
    assert ids[0] != ids[1]
    assert ids[0] != sorted(ids[0])


def test_the_history_rubric_shows_the_history(recipe: Recipe):
    folder = agreement(recipe, "export", rubric="history")
    key = json.loads((folder / "sheet.json").read_text(encoding="utf-8"))
    assert all(item["against"][2].startswith("click: ") for item in key["items"])
    with pytest.raises(SystemExit):
        agreement(recipe, "compare")


def test_several_people_are_compared_pairwise(recipe: Recipe, tmp_path: Path):
    folder = agreement(recipe, "export")
    anna = fill(folder, agree, tmp_path / "anna.csv")
    ben = fill(folder, lambda e, t, i: "" if i is None else agree(e, t, i), tmp_path / "ben.csv")
    agreement(recipe, "compare", answers=f"[{anna}, {ben}]")
    pairs = result(folder)["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("rule-v1", "anna"), ("rule-v1", "ben"), ("anna", "ben")]
    assert [pair["words"]["kappa"]["value"] for pair in pairs] == [1.0, 1.0, 1.0]
    assert [pair["sentences"]["compared"] for pair in pairs] == [20, 0, 0]


def other_labels(recipe: Recipe, tmp_path: Path) -> Path:
    """Another judge: never an `a`-word by itself; abstains on one response; one other has no word labels."""
    rows = label_rows(recipe, lambda word, i: i % 3 == 0, "llm-v1")
    rows[0] |= {"words": [], "sentence_score": None, "sentence_label": None, "status": "abstained", "problem": "x"}
    assert len(rows[1]["words"]) == 4
    rows[1]["words"] = []
    return write_labels(tmp_path / "other" / "labels.parquet", rows[:-40])  # 24 of the 32 responses, one rubric


def test_judge_against_judge(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = agreement(recipe, "compare", other=other_labels(recipe, tmp_path))
    [pair] = result(folder)["pairs"]
    assert (pair["a"], pair["b"]) == ("rule-v1", "llm-v1")
    assert (pair["items"], pair["only_a"], pair["only_b"]) == (24, 8, 0)
    rows = label_rows(recipe)[:24]
    assert pair["words"]["questions"] == sum(len(row["words"]) for row in rows)
    assert pair["words"]["missing"] == {"a": {}, "b": {"abstained": len(rows[0]["words"]), "not_judged": 4}}
    assert pair["sentences"]["missing"] == {"a": {}, "b": {"abstained": 1}}
    assert pair["sentences"]["compared"] == 23
    counted = [(word["i"], word["word"]) for row in rows[2:] for word in row["words"]]
    assert pair["words"]["compared"] == len(counted)
    assert pair["words"]["confusion"]["only_a_relevant"] == sum(i % 3 != 0 and "a" in word for i, word in counted)
    assert pair["words"]["confusion"]["only_b_relevant"] == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 not judged; left out, not counted as 0" in printed
    assert "responses that only a has: 8, only b: 0" in printed


def test_two_judges_and_a_person(recipe: Recipe, tmp_path: Path):
    folder = agreement(recipe, "export", examples=12)
    fill(folder, agree)
    other = write_labels(tmp_path / "llm.parquet", label_rows(recipe, lambda word, i: i % 3 == 0, "llm-v1"))
    agreement(recipe, "compare", other=other, answers=f"[{folder / 'sheet.csv'}]")
    pairs = result(folder)["pairs"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [
        ("rule-v1", "llm-v1"), ("rule-v1", "sheet"), ("llm-v1", "sheet")
    ]  # fmt: skip
    assert {pair["items"] for pair in pairs} == {12}
    assert pairs[0]["words"]["confusion"] == {
        **pairs[2]["words"]["confusion"],
        "only_a_relevant": pairs[2]["words"]["confusion"]["only_b_relevant"],
        "only_b_relevant": pairs[2]["words"]["confusion"]["only_a_relevant"],
    }


def test_undefined_kappa_is_null_and_said(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    never = write_labels(tmp_path / "a.parquet", label_rows(recipe, lambda word, i: False, "never-1"))
    never2 = write_labels(tmp_path / "b.parquet", label_rows(recipe, lambda word, i: False, "never-2"))
    folder = agreement(recipe, "compare", labels=never, other=never2)
    [pair] = result(folder)["pairs"]
    assert pair["words"]["kappa"] == {"value": None, "low": None, "high": None}
    assert pair["words"]["agreement"]["value"] == 1.0
    printed = " ".join(capsys.readouterr().out.split())
    assert "words: kappa is undefined" in printed


def test_judges_of_one_name_are_told_apart(recipe: Recipe, tmp_path: Path):
    other = write_labels(tmp_path / "b.parquet", label_rows(recipe, lambda word, i: i == 0))
    folder = agreement(recipe, "compare", other=other)
    [pair] = result(folder)["pairs"]
    assert pair["a"] != pair["b"]
    assert str(other) in pair["b"]


def refuse(capsys: pytest.CaptureFixture[str], recipe: Recipe, action: str, **settings: Any) -> str:
    with pytest.raises(SystemExit) as caught:
        agreement(recipe, action, **settings)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_settings_are_named(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "sheet.json does not exist: export a sheet first" in refuse(capsys, recipe, "compare")
    assert "32 labelled responses of rubric 'targets': give a number from 1 to 32" in refuse(
        capsys, recipe, "export", examples=33
    )
    assert "from 1 to 32" in refuse(capsys, recipe, "export", examples=0)
    agreement(recipe, "export")
    assert "exists and may hold" in refuse(capsys, recipe, "export")
    assert "nowhere.csv is not a file" in refuse(capsys, recipe, "compare", answers="[nowhere.csv]")
    sheet = RunFolder(recipe).path("agreement") / "sheet.csv"
    assert "names a file twice" in refuse(capsys, recipe, "compare", answers=f"[{sheet}, {sheet}]")
    assert "but a page fills in one" in refuse(capsys, recipe, "page", answers="[a.csv, b.csv]")
    assert "cannot listen on 127.0.0.1 port 70000" in refuse(capsys, recipe, "page", port=70000)
    own = RunFolder(recipe).path("label") / "labels.parquet"
    assert "is the same file as" in refuse(capsys, recipe, "compare", other=own)
    assert "does not exist" in refuse(capsys, recipe, "compare", other=tmp_path / "none.parquet")
    changed = write_labels(tmp_path / "changed.parquet", label_rows(recipe, lambda word, i: True))
    message = refuse(capsys, recipe, "compare", labels=changed)
    assert re.search(r"exported from .*labels\.parquet with SHA-256 \w{12}, but .*changed\.parquet", message)
    assert "give that file in --agreement.labels (and these labels in --agreement.other)" in message


def test_a_run_without_labels_names_the_command(prepared_recipe: Any, capsys: pytest.CaptureFixture[str]):
    assert "stage 'label' is not finished" in refuse(capsys, prepared_recipe(), "export")


def test_labels_of_another_run_are_refused(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = label_rows(recipe)[:32]
    strangers = write_labels(tmp_path / "s.parquet", [{**row, "example_id": f"s{n}"} for n, row in enumerate(rows)])
    assert "prepare/examples.parquet lacks" in refuse(capsys, recipe, "export", labels=strangers)
    assert "have no response in common" in refuse(capsys, recipe, "compare", other=strangers)
    rows[5]["response"] += " more"
    rows[5]["words"] = []
    moved = write_labels(tmp_path / "m.parquet", rows)
    message = refuse(capsys, recipe, "compare", other=moved)
    assert f"hold different responses for example {rows[5]['example_id']}, sample 0" in message


def sentence_label(row: dict[str, Any]) -> None:
    row["sentence_label"] = None


def status(row: dict[str, Any]) -> None:
    row["status"] = "fine"


def word_lost(row: dict[str, Any]) -> None:
    row["words"] = row["words"][:-1]


def word_class(row: dict[str, Any]) -> None:
    row["words"] = [{**word, "label": 0} for word in row["words"]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (sentence_label, "its sentence_label is None"),
        (status, "its status is 'fine'"),
        (word_lost, "its words are not those of its response"),
        (word_class, "a word's label is neither 1 nor 2"),
    ],
)
def test_broken_labels_are_refused_with_the_row(recipe: Recipe, tmp_path: Path, edit: Any, message: str):
    rows = label_rows(recipe)
    edit(rows[4])
    path = write_labels(tmp_path / "labels.parquet", rows)
    with pytest.raises(UserError, match=rf"labels\.parquet row 4 \(example .*\) is broken: {message}"):
        read_judge(path, "targets")
    assert len(read_judge(path, "history").judged) == 32  # the other rubric's rows are sound


def test_labels_of_two_judges_in_one_file_are_refused(recipe: Recipe, tmp_path: Path):
    rows = label_rows(recipe)[:32]
    path = write_labels(tmp_path / "labels.parquet", [*rows, {**rows[3], "judge": "other"}])
    with pytest.raises(UserError, match=r"row 32 .* is a second label of this response"):
        read_judge(path, "targets")
    with pytest.raises(UserError, match="has no labels of rubric 'history'"):
        read_judge(path, "history")
