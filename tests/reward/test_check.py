"""The check_reward stage by its command, and what RL does with its verdict; tiny models, real weights on disk."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForTokenClassification

from tests.helpers.rewritten import as_if_read, as_if_written
from tests.helpers.topic_run import TOPICS, make_topic_run, oracle
from tppo import cli
from tppo.core.config import Recipe
from tppo.core.run import RunFolder, run_stage
from tppo.core.stats import UserBootstrap
from tppo.reward import gate, train
from tppo.reward.data import make_items
from tppo.reward.metrics import evaluate
from tppo.reward.models import RewardModel, SentenceRewardModel, TokenRewardModel


@pytest.fixture
def settings(tmp_path: Path):
    """A function: recipe file with the few settings that the stages under test read from it."""

    def write(recipe: Recipe, **sections: Any) -> Path:
        shown = {
            "run_dir": recipe.run_dir,
            "prepare": {"source": recipe.prepare.source},
            "reward": {"rubric": "history"},
            # More room than a demo needs: the tiny policy spells its prompts.
            "task": {"max_prompt_tokens": 400, "max_response_tokens": 12},
        }
        for name, section in sections.items():
            shown[name] = {**shown.get(name, {}), **section}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(shown), encoding="utf-8")
        return path

    return write


def save_constant(kind: type[RewardModel], encoder: Path, folder: Path, bias: list[float]) -> None:
    """A reward model that says the same of every token."""
    model = kind.start(str(encoder), 64)
    with torch.no_grad():
        model.model.classifier.weight.zero_()
        model.model.classifier.bias.copy_(torch.tensor(bias))
    model.save(folder, rubric="history")


def with_constant_models(recipe: Recipe, encoder: Path) -> RunFolder:
    """The reward stage as finished with models that know nothing."""
    run = RunFolder(recipe)
    with run.stage("reward") as (folder, facts):
        save_constant(TokenRewardModel, encoder, folder / "token", [0.0, 0.0, 3.0])
        save_constant(SentenceRewardModel, encoder, folder / "sentence", [-3.0])
        facts["train"] = {"words": 100, "words_relevant": 40, "responses": 20, "responses_relevant": 8}
    return run


def read(run: RunFolder) -> dict[str, Any]:
    return json.loads((run.path("check_reward") / "check.json").read_text(encoding="utf-8"))


def test_constant_models_fail_for_the_right_reasons(tiny_encoder, tmp_path, settings, capsys):
    recipe = make_topic_run(tmp_path, rows=8, held_out=40)
    run = with_constant_models(recipe, tiny_encoder)
    path = settings(recipe)
    cli.main(["check-reward", "--config", str(path)])
    report = read(run)
    assert not report["passed"]
    for model, failing in (
        ("token", {"token_auc", "sentence_auc", "token_ece", "shuffled", "noise"}),
        ("sentence", {"sentence_auc", "sentence_ece", "shuffled", "noise"}),
    ):
        found = report["models"][model]
        checks = {entry["name"]: entry for entry in found["checks"]}
        assert {name for name, entry in checks.items() if entry["status"] == "failed"} == failing
        assert checks["length"]["status"] == "cannot be told", "a constant has no rank correlation"
        for name in ("sentence_auc", "shuffled", "noise"):
            assert checks[name]["value"] == 0.5
        assert found["beats"]["shuffled"]["ties"] == 1
        assert found["probes"]["empty"]["value"] == 0
        assert len(found["reasons"]) == len(failing) + 1
    assert run.facts("check_reward")["reasons"]["token"] == report["models"]["token"]["reasons"]
    assert run.facts("check_reward")["passed"] is False
    printed = capsys.readouterr().err
    assert "token AUC: 0.500, and check_reward.min_token_auc asks for at least 0.8" in " ".join(printed.split())
    page = (run.path("check_reward") / "README.md").read_text()
    assert "| token AUC | ≥ 0.8 | 0.500, failed |  |" in page
    assert not {word for words in TOPICS.values() for word in words if f" {word} " in page}, "no text of the log"

    # Other thresholds are another check; whether RL may start all the same is not.
    with pytest.raises(SystemExit):
        cli.main(["check-reward", "--config", str(path), "--check_reward.min_token_auc", "0.4"])
    assert "check_reward.min_token_auc: 0.8 -> 0.4" in capsys.readouterr().err
    cli.main(["check-reward", "--config", str(path), "--check_reward.allow_failed", "true"])
    assert "finished already" in capsys.readouterr().out


def finish_sft(run: RunFolder, policy: Path) -> None:
    with run.stage("sft") as (folder, _):
        shutil.copytree(policy, folder / "model")


RL = ["--rl.updates", "1", "--rl.batch_size", "8", "--rl.minibatch_size", "8", "--rl.micro_batch_size", "8"]
RL += ["--rl.suggested_length", "10", "--rl.precision", "fp32"]


def test_rl_needs_the_check_refuses_after_a_failure_and_obeys_the_override(
    tiny_encoder, tiny_policy, tmp_path, settings, capsys
):
    recipe = make_topic_run(tmp_path, rows=8, held_out=40)
    run = with_constant_models(recipe, tiny_encoder)
    shutil.rmtree(run.path("sft"))
    shutil.rmtree(run.path("sample"))
    finish_sft(run, tiny_policy)
    with run.stage("sample"):
        pass
    as_if_read(run, "label", "reward")
    path = str(settings(recipe))

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    message = refused("rl", "--config", path, *RL)
    assert (
        f"stage 'check_reward' is not finished in {run.root}: run `tppo check-reward --run_dir {run.root}`" in message
    )
    cli.main(["check-reward", "--config", path])
    capsys.readouterr()
    message = refused("rl", "--config", path, *RL)
    assert "the token-level reward model, which pays tppo, did not pass its check" in message
    assert "real above random words: 0.500, and check_reward.min_real_over_noise asks for at least 0.6" in message
    assert "--check_reward.allow_failed true" in message
    assert run.manifest("rl_tppo") is None
    assert "the sentence-level reward model, which pays ppo" in refused("rl", "--config", path, "--rl.algorithm", "ppo")

    by_token_mean = ("--rl.algorithm", "ppo", "--rl.sentence_reward", "token_mean")
    assert "the token-level reward model, which pays ppo" in refused("rl", "--config", path, *by_token_mean)

    cli.main(["rl", "--config", path, "--check_reward.allow_failed", "true", *RL])
    assert "RL starts although" in capsys.readouterr().err
    verdict = run.facts("rl_tppo")["reward_check"]
    assert verdict["model"] == "token"
    assert verdict["passed"] is False
    assert verdict["reasons"] == run.facts("check_reward")["reasons"]["token"]

    # A check made anew (with thresholds these models pass) opens the gate, and leaves the tuned policy alone.
    easy = [f"--check_reward.min_{name}=0" for name in ("token_auc", "sentence_auc")]
    easy += [f"--check_reward.min_real_over_{name}=0" for name in ("shuffled", "noise")]
    easy += ["--check_reward.max_ece=2", "--check_reward.max_length_correlation=2"]
    cli.main(["check-reward", "--config", path, "--redo", "check_reward", *easy])
    assert run.facts("check_reward")["passed"] is True
    assert run.manifest("rl_tppo") is not None
    cli.main(["rl", "--config", path, "--rl.algorithm", "ppo_sum", *easy, *RL])
    assert run.facts("rl_ppo_sum")["reward_check"] == {"model": "token", "passed": True, "reasons": []}

    # A reward stage made anew makes the check stale: its verdict is not taken for the new models'.
    shutil.rmtree(run.path("reward"))
    with_constant_models(recipe, tiny_encoder)
    message = refused("rl", "--config", path, "--redo", "rl_tppo", *RL)
    assert "check_reward was made from other inputs" in message
    assert "--redo check_reward" in message


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run whose reward models compare the response with the history, as the labels do."""
    root = tmp_path_factory.mktemp("topics")
    recipe = make_topic_run(root)
    with RunFolder(recipe).stage("reward") as (folder, facts):
        for kind in train.KINDS:
            oracle(kind, root / kind.kind).save(folder / kind.kind, rubric="history")
        facts["train"] = {"words": 100, "words_relevant": 40, "responses": 20, "responses_relevant": 8}
    return recipe


def held_out_of(recipe: Recipe) -> tuple[gate.HeldOut, int]:
    asked = (recipe.check_reward.max_examples, recipe.task.num_queries, recipe.seed)
    return gate.load_held_out(RunFolder(recipe), "history", *asked)


def test_models_that_know_their_job_pass(knowing: Recipe):
    run_stage(knowing, "check_reward", gate.run)
    run = RunFolder(knowing)
    report = read(run)
    assert report["passed"], [found["reasons"] for found in report["models"].values()]
    assert run.facts("check_reward")["reasons"] == {"token": [], "sentence": []}
    token = report["models"]["token"]
    model = TokenRewardModel.load(run.path("reward") / "token")
    held_out, _ = held_out_of(knowing)
    trained = evaluate(model, make_items(model.tokenizer, held_out.rows, 64), knowing.reward)
    assert token["metrics"] == {name: trained[name] for name in gate.MEASURES if name in trained}
    assert trained["token_auc"] > 0.95
    assert token["probes"]["real"]["value"] > token["probes"]["noise"]["value"] > token["probes"]["empty"]["value"]
    assert report["counts"]["examples_probed"] == 60
    assert report["counts"]["users_probed"] == 30


def test_the_same_numbers_on_a_second_run_and_in_other_batches(knowing: Recipe, tmp_path: Path):
    run = RunFolder(knowing)
    run_stage(knowing, "check_reward", gate.run)
    first = (run.path("check_reward") / "check.json").read_bytes()
    run.discard_from("check_reward")
    run_stage(knowing, "check_reward", gate.run)
    assert (run.path("check_reward") / "check.json").read_bytes() == first

    held_out, _ = held_out_of(knowing)
    bootstrap = UserBootstrap([e.user_id for e in held_out.examples], 100, 0)
    for kind in train.KINDS:
        model = kind.load(run.path("reward") / kind.kind)
        together = gate.measure(model, held_out, bootstrap, knowing.reward)
        model.response_logits = partial(model.response_logits, batch_size=3)  # type: ignore[method-assign]
        apart = gate.measure(model, held_out, bootstrap, knowing.reward)
        for part in ("probes", "beats", "metrics", "length"):
            assert flat(apart[part]) == pytest.approx(flat(together[part]), abs=1e-4)


def flat(values: dict[str, Any]) -> dict[str, float]:
    """Nested numbers by path."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": number for key, number in flat(value).items()}
        elif value is not None:
            found[name] = value
    return found


def test_few_rows_and_one_user_cannot_tell(tiny_encoder, tmp_path):
    recipe = make_topic_run(tmp_path, rows=8, held_out=2)
    run = with_constant_models(recipe, tiny_encoder)
    run_stage(recipe, "check_reward", gate.run)
    checks = {entry["name"]: entry for entry in read(run)["models"]["token"]["checks"]}
    required = {name: entry["status"] for name, entry in checks.items() if name not in ("repeated", "copied")}
    assert set(required.values()) == {"cannot be told"}
    assert checks["shuffled"]["value"] is None, "both examples are of one user"
    assert not run.facts("check_reward")["passed"]


def test_only_the_drawn_examples_are_probed(tiny_encoder, tmp_path):
    recipe = make_topic_run(tmp_path, rows=4, held_out=40)
    recipe.check_reward.max_examples = 31
    run = with_constant_models(recipe, tiny_encoder)
    run_stage(recipe, "check_reward", gate.run)
    assert read(run)["counts"]["examples_probed"] == 31
    assert read(run)["models"]["token"]["beats"]["noise"]["examples"] == 31


def test_models_of_different_rubrics_are_refused(tiny_encoder, tmp_path, settings, capsys):
    recipe = make_topic_run(tmp_path, rows=4, held_out=4)
    run = with_constant_models(recipe, tiny_encoder)
    path = run.path("reward") / "sentence" / "reward.json"
    path.write_text(path.read_text().replace('"history"', '"targets"'))
    as_if_written(run.path("reward"))
    with pytest.raises(SystemExit):
        cli.main(["check-reward", "--config", str(settings(recipe))])
    assert "must name the same rubric" in capsys.readouterr().err


def test_the_folder_is_an_ordinary_one(knowing: Recipe):
    folder = RunFolder(knowing).path("reward") / "token"
    model = AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "separator", 1: "irrelevant", 2: "relevant"}
