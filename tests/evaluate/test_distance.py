"""The stage `distance` with real (tiny) policies: KL from SFT on evaluation prompts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.evaluate.test_stage import judge_file, make_inputs  # noqa: F401  (a fixture)
from tests.helpers import fake_run
from tppo.cli import main, run_one
from tppo.core.common import UserError
from tppo.core.config import Reading
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.stages import stage_config
from tppo.core.tables import read_table
from tppo.evaluate import readings
from tppo.evaluate.distance import log_ratios
from tppo.evaluate.readings import READINGS
from tppo.generate.engine import Generation, encode_examples, generate


def by_hand(lm, generation: Generation) -> float:
    """log pi(y|x), one response alone, from the logits of the whole text."""
    ids = torch.tensor([generation.prompt_ids + generation.response_ids])
    with torch.inference_mode():
        log_p = lm(ids).logits[0].float().log_softmax(-1)
    start = len(generation.prompt_ids)
    return sum(float(log_p[place - 1, ids[0, place]]) for place in range(start, ids.shape[1]))


def test_the_stage_measures_every_algorithm(tmp_path: Path, tiny_policy: Path, judge_file: Path):  # noqa: F811
    examples = fake_run.make_examples(5) + fake_run.make_examples(3, split="eval2")
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, examples)
    recipe.evaluate.readings = [Reading("distance", 4)]
    run_one(recipe, "read_distance")
    folder = run.require("read_distance")
    found = read_table(folder / "readings.parquet", READINGS).to_pylist()
    assert {row["measure"] for row in found} == {"sampled_tokens", "kl_from_sft"}
    rows = [row for row in found if row["measure"] == "kl_from_sft"]
    assert [row["model"] for row in rows] == ["tppo"] * 8 + ["ppo"] * 8
    assert [row["split"] for row in rows[:8]] == ["eval1"] * 4 + ["eval2"] * 4
    assert [row["example_id"] for row in rows[:8]] == [row["example_id"] for row in rows[8:]]
    # PPO is the SFT model itself here.
    assert [row["value"] for row in rows[8:]] == [0.0] * 8
    assert run.facts("read_distance")["kl_from_sft"]["tppo"] == pytest.approx(sum(row["value"] for row in rows[:8]) / 8)


def test_log_ratios_are_those_of_each_response_alone(tmp_path: Path, tiny_policy: Path, judge_file: Path):  # noqa: F811
    recipe, run = make_inputs(tmp_path / "run", tiny_policy, judge_file, fake_run.make_examples(20))
    sft, tokenizer = load_policy(run.require("sft") / "model")
    tppo, _ = load_policy(run.require("rl_tppo") / "model")
    prompts, _ = encode_examples(tokenizer, fake_run.make_examples(20), recipe.task)
    generations = generate(tppo, tokenizer, prompts, max_new_tokens=12, temperature=1.0, seed=1)
    assert len({len(prompt) for prompt in prompts}) > 1
    found = log_ratios(tppo, sft, generations, tokenizer.eos_token_id, batch_size=7)
    wanted = [by_hand(tppo, generation) - by_hand(sft, generation) for generation in generations]
    assert found == pytest.approx(wanted, abs=1e-3)
    assert sum(found) > 0  # 40 samples of a policy far from the other
    backwards = log_ratios(sft, tppo, generations, tokenizer.eos_token_id, batch_size=40)
    assert backwards == pytest.approx([-ratio for ratio in found], abs=1e-3)


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = fake_run.make_recipe(tmp_path / "run", [], readings=[Reading("distance", 3)])
    with pytest.raises(UserError, match=r"distance measures \[\]: name an algorithm"):
        readings.run(recipe, RunFolder(recipe), tmp_path)
    with pytest.raises(SystemExit):
        main(["read", "--help"])
    assert "evaluate.readings" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["read", "--run_dir", str(tmp_path)])
    assert "evaluate.readings is empty: say who reads" in capsys.readouterr().err


def test_it_makes_no_evaluation_stale(tmp_path: Path):
    recipe = fake_run.make_recipe(tmp_path / "run", ["tppo"], readings=[Reading("distance", 2)])
    other = replace(recipe, evaluate=replace(recipe.evaluate, readings=[Reading("distance", 3), Reading("vote")]))
    assert stage_config("evaluate", other) == stage_config("evaluate", recipe)
    assert stage_config("read_distance", other) != stage_config("read_distance", recipe)
    assert RunFolder(other).path("read_distance").name == "read_distance"
