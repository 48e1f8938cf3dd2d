"""Requirements, verdicts and reasons; probes. No model."""

from __future__ import annotations

from datetime import datetime

import pytest

from tppo.core.config import CheckReward
from tppo.core.show import NOT_MEASURED
from tppo.core.tables import Example
from tppo.core.text import Event
from tppo.judge.probes import PROBES, log_words, make_probes
from tppo.reward.gate import (
    NOT_ASKED,
    Evidence,
    assess,
    build_report,
    caution_lines,
    cautions,
    reasons,
    requirement_table,
    verdict_lines,
)

GOOD = {
    "token_auc": 0.9,
    "sentence_auc": 0.8,
    "token_ece": 0.05,
    "sentence_ece": 0.05,
    "length": 0.1,
    "shuffled": 0.8,
    "noise": 0.9,
    "repeated": 0.3,
    "copied": 0.2,
}


def evidence(model: str, **changes: Evidence) -> dict[str, Evidence]:
    found = {name: Evidence(value, 100, 40) for name, value in GOOD.items() if name not in NOT_ASKED[model]}
    return {**found, **changes}


@pytest.mark.parametrize("model", ["token", "sentence"])
def test_good_numbers_pass_and_what_is_not_required_is_shown(model: str):
    checks = assess(model, evidence(model), CheckReward())
    assert reasons(checks) == []
    status = {check["name"]: check["status"] for check in checks}
    assert status.pop("repeated") == status.pop("copied") == "not required"
    assert set(status.values()) == {"passed"}
    assert ("token_auc" in status) == (model == "token")


@pytest.mark.parametrize(
    ("name", "value", "setting", "asked"),
    [
        ("token_auc", 0.79, "min_token_auc", "at least 0.8"),
        ("sentence_auc", 0.5, "min_sentence_auc", "at least 0.7"),
        ("token_ece", 0.2, "max_ece", "at most 0.15"),
        ("length", 0.31, "max_length_correlation", "at most 0.3"),
        ("shuffled", 0.5, "min_real_over_shuffled", "at least 0.6"),
        ("noise", 0.1, "min_real_over_noise", "at least 0.6"),
    ],
)
def test_each_requirement_fails_alone_and_says_why(name: str, value: float, setting: str, asked: str):
    checks = assess("token", evidence("token", **{name: Evidence(value, 100, 40)}), CheckReward())
    (why,) = reasons(checks)
    assert f"{value:.3f}, and check_reward.{setting} asks for {asked}" in why
    limit = getattr(CheckReward(), setting)
    met = assess("token", evidence("token", **{name: Evidence(limit, 100, 40)}), CheckReward())
    assert reasons(met) == [], "the limit itself is enough"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Evidence(0.99, 29, 10), "from 29 held-out responses, 10 rows of the rarer label"),
        (Evidence(0.99, 100, 4), "4 rows of the rarer label (it takes 30, and 5 of the rarer label)"),
        (Evidence(0.99, 5), "from 5 held-out responses (it takes"),
        (Evidence(None, 100), "not defined"),
    ],
)
def test_too_little_to_tell_is_no_pass(found: Evidence, told: str):
    checks = assess("token", evidence("token", token_auc=found), CheckReward())
    assert [check["status"] for check in checks if check["name"] == "token_auc"] == ["cannot be told"]
    (why,) = reasons(checks)
    assert told in why


def test_what_is_switched_off_needs_no_rows():
    off = CheckReward(
        min_token_auc=0,
        min_sentence_auc=0,
        max_ece=2,
        max_length_correlation=2,
        min_real_over_shuffled=0,
        min_real_over_noise=0,
    )
    nothing = {name: Evidence(None, 0, 0) for name in GOOD}
    for model in ("token", "sentence"):
        assert {check["status"] for check in assess(model, nothing, off)} == {"not required"}


def test_the_report_names_the_model_that_failed():
    """Numbers of one model do not leak into the verdict on the other."""
    estimate = {"value": 0.8, "low": 0.7, "high": 0.9, "examples": 50, "users": 20}

    def measured(auc: float, **metrics: float) -> dict:
        return {
            "metrics": {"sentence_auc": auc, "sentence_ece": 0.1, **metrics},
            "length": {"reward": 0.1, "labels": 0.1, "distance": 0.0},
            "probes": dict.fromkeys(PROBES, estimate),
            "beats": dict.fromkeys(("shuffled", "noise", "repeated", "copied"), estimate),
        }

    counts = {"responses": 60, "responses_relevant": 20, "words": 300, "words_relevant": 90}
    models = {"token": measured(0.9, token_auc=0.9, token_ece=0.1), "sentence": measured(0.5)}
    report = build_report(models, counts, CheckReward())
    assert not report["passed"]
    assert report["models"]["token"]["reasons"] == []
    assert report["models"]["sentence"]["reasons"] == [
        "sentence AUC: 0.500, and check_reward.min_sentence_auc asks for at least 0.7"
    ]
    assert verdict_lines(report)[0] == "The token-level reward model passed."
    rows = {label: (asked, cells) for label, asked, *cells in requirement_table(report).rows}
    assert [cell.text for cell in rows["token AUC"][1]] == ["0.900", ""]
    assert [cell.said for cell in rows["sentence AUC"][1]] == ["passed", "failed"]
    assert rows["real above one word repeated"][0] == "-"
    assert rows["real above one word repeated"][1][0].detail == "[0.70, 0.90]"
    assert caution_lines(report) == []
    assert NOT_MEASURED not in str(rows)
    assert build_report({**models, "sentence": measured(0.8)}, counts, CheckReward())["passed"]


def test_cautions_name_what_wins_against_the_real_queries():
    (caution,) = cautions({"copied": {"value": 0.3}, "repeated": {"value": 0.5}, "noise": {"value": None}})
    assert "the newest searches of the history, word for word: scores above" in caution
    assert "70% of the examples" in caution


def example(number: int, user: str, history: list[Event], targets: list[str]) -> Example:
    return Example(f"e{number}", user, "reward_eval", history, targets, datetime(2026, 3, 1))


EXAMPLES = [
    example(
        0, "a", [Event("search", "pizza"), Event("search", "of italian food"), Event("click", "menu")], ["x y", "z"]
    ),
    example(1, "b", [Event("click", "a truck page")], ["the carburettor", "b"]),
    example(2, "c", [Event("search", "a b"), Event("search", "a b")], ["q"]),
]


def test_probes():
    probes = make_probes(EXAMPLES, log_words(EXAMPLES), "history", 3, seed=1)
    assert set(probes) == set(PROBES)
    assert probes["real"] == ["x y\nz", "the carburettor\nb", "q"]
    own, others = probes["real"], probes["shuffled"]
    assert all(other in own and other != mine for mine, other in zip(own, others, strict=True))
    sizes = [[len(query.split()) for query in response.split("\n")] for response in probes["noise"]]
    assert sizes == [[2, 1], [2, 1], [1]]
    assert {word for response in probes["noise"] for word in response.split()} <= set(log_words(EXAMPLES))
    assert probes["repeated"] == ["italian\nitalian\nitalian", None, "a\na\na"]
    assert probes["copied"] == ["pizza\nof italian food", None, "a b"]
    assert probes["empty"] == ["", "", ""]
    against_targets = make_probes(EXAMPLES, log_words(EXAMPLES), "targets", 2, seed=1)
    assert against_targets["repeated"] == ["x\nx", "carburettor\ncarburettor", "q\nq"]


def test_probes_are_seeded_and_noise_does_not_depend_on_the_other_examples():
    words = log_words(EXAMPLES)
    first = make_probes(EXAMPLES, words, "history", 3, seed=1)
    assert first == make_probes(EXAMPLES, words, "history", 3, seed=1)
    assert first["noise"] != make_probes(EXAMPLES, words, "history", 3, seed=2)["noise"]
    assert make_probes(EXAMPLES[::-1], words, "history", 3, seed=1)["noise"] == first["noise"][::-1]


def test_one_user_has_no_other_user_to_be_shuffled_with():
    probes = make_probes([EXAMPLES[0], EXAMPLES[0]], ["w"], "history", 3, seed=1)
    assert probes["shuffled"] == [None, None]
