"""best_of_n with a real (tiny, untrained) policy and real reward models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.helpers import fake_run
from tppo.core.common import UserError, stream_seed
from tppo.core.config import RL, Sampling, Task
from tppo.core.models import load_policy
from tppo.core.run import RunFolder
from tppo.core.stages import stage_config, stage_inputs
from tppo.evaluate import answers
from tppo.generate.engine import encode_examples, generate
from tppo.reward.models import SentenceRewardModel, TokenRewardModel
from tppo.rl.reward_function import make_sample
from tppo.rl.stage import query_reward

EXAMPLES = fake_run.make_examples(3, per_user=1)


@pytest.fixture
def recipe_and_run(tmp_path: Path, tiny_policy: Path, tiny_tokenizer: Any) -> tuple[Any, RunFolder]:
    encoder = tmp_path / "encoder"
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(encoder)
    tiny_tokenizer.save_pretrained(encoder)
    base = fake_run.make_recipe(tmp_path / "run", [], baselines=["best_of_n"], best_of=4)
    # Rewards that differ between samples whether or not the untrained policy keeps to the task.
    rl = RL(precision="fp32", format_weight=False, bad_format_reward=0.0, suggested_length=12.0)
    task = Task(max_prompt_tokens=300, max_response_tokens=12)
    recipe = replace(base, task=task, sample=Sampling(batch_size=3), rl=rl)
    run = RunFolder(recipe)
    for stage in ("prepare", "sft", "sample", "label", "reward"):
        with run.stage(stage) as (folder, facts):
            if stage == "sft":
                (folder / "model").symlink_to(tiny_policy)
            if stage == "reward":
                TokenRewardModel.start(str(encoder), 256).save(folder / "token")
                SentenceRewardModel.start(str(encoder), 256).save(folder / "sentence")
                facts["train"] = {"words": 10, "words_relevant": 4, "responses": 5, "responses_relevant": 2}
    return recipe, run


def test_the_sample_that_rl_pays_most_is_kept(recipe_and_run: tuple[Any, RunFolder]):
    recipe, run = recipe_and_run
    found = answers.make_answerer("best_of_n", recipe, run, None)("eval1", EXAMPLES)
    assert found is not None

    # The same by hand: one example at a time, all its samples scored together.
    model, tokenizer = load_policy(run.path("sft") / "model")
    prompts, _ = encode_examples(tokenizer, [e for e in EXAMPLES for _ in range(4)], recipe.task)
    drawn = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=12,
        temperature=1.0,
        seed=stream_seed(recipe.seed, "best_of_n", "eval1"),
        batch_size=3,
    )
    for number, example in enumerate(EXAMPLES):
        samples = drawn[4 * number : 4 * number + 4]
        assert len({sample.response for sample in samples}) > 1
        reward_fn = query_reward(run, recipe.rl, recipe.task, [example], tokenizer)
        rewards = [sum(row) for row in reward_fn([make_sample(tokenizer, sample, 0) for sample in samples]).rewards]
        best = samples[rewards.index(max(rewards))]
        assert max(rewards) > min(rewards)
        assert found.responses[number] == best.response
        assert (found.finished[number], found.tokens[number]) == (best.finished, len(best.response_ids))


def test_evaluate_then_depends_on_the_reward_models_and_on_rl(recipe_and_run: tuple[Any, RunFolder]):
    recipe, _ = recipe_and_run
    assert {"reward", "sample"} <= set(stage_inputs("evaluate", recipe))
    assert stage_config("evaluate", recipe)["rl"]["algorithm"] == "tppo"
    without = replace(recipe, evaluate=replace(recipe.evaluate, baselines=["nearest"]))
    assert "reward" not in stage_inputs("evaluate", without)
    assert "rl" not in stage_config("evaluate", without)


def test_without_reward_models_the_way_out_is_named(recipe_and_run: tuple[Any, RunFolder]):
    recipe, run = recipe_and_run
    (run.path("reward") / "manifest.json").unlink()
    with pytest.raises(UserError, match="run `tppo reward"):
        answers.make_answerer("best_of_n", recipe, run, None)("eval1", EXAMPLES)
