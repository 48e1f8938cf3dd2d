"""The DPO stage: TRL's loss on our ids, and the stage through the command line on tiny weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from tppo import cli
from tppo.core.config import DPO, Sampling, Task
from tppo.core.models import load_policy
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import LABELS, RESPONSES, load_examples, read_table, write_table
from tppo.core.text import encode_prompt, parse_response
from tppo.judge.verdict import Verdict, WordVerdict, split_response, verdict_to_row
from tppo.tune import dpo
from tppo.tune.dpo import Pair, make_trainer, trainer_rows
from tppo.tune.sft import encode_response
from tppo.tune.trl import ProgressCallback

TEXTS = (
    "rome hotels\nvisa\noil filter",
    "bass strings\ncompost bin\nvisa",
    "drum kit",
    "dents\nguitar chords\nvisa\nvisa",
)


def tiny_rows(tokenizer, examples):
    """Pairs whose rejected ids no tokenizer would make of their text: one byte each, without end-of-sequence."""
    prompts = [encode_prompt(tokenizer, example.history, 3, 300)[0] for example in examples]
    pairs = [
        Pair(
            example.example_id,
            encode_response(tokenizer, example.targets),
            [tokenizer(letter)["input_ids"][0] for letter in example.targets[0][: 3 + i]],
        )
        for i, example in enumerate(examples)
    ]
    return trainer_rows(pairs, prompts)


def trainer_for(model, reference, tokenizer, rows, folder, **settings):
    return make_trainer(model, reference, tokenizer, rows, [], DPO(precision="fp32", **settings), 0, folder)


@pytest.fixture
def two_models(tiny_policy):
    """A policy that has moved away from its reference."""
    reference, _ = load_policy(tiny_policy)
    policy, tokenizer = load_policy(tiny_policy)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy, reference, tokenizer


def log_probability(model, prompt, response):
    """log pi(response | prompt), one token at a time, no padding and no batch."""
    total = 0.0
    for t, token in enumerate(response):
        logits = model(torch.tensor([prompt + response[:t]])).logits[0, -1]
        total += logits.double().log_softmax(-1)[token].item()
    return total


def test_loss_is_the_closed_form(two_models, example_factory, tmp_path):
    policy, reference, tokenizer = two_models
    rows = tiny_rows(tokenizer, example_factory(3))
    trainer = trainer_for(policy, reference, tokenizer, rows, tmp_path, beta=0.3)
    with torch.no_grad():
        margins = [
            sum(
                sign
                * (log_probability(policy, row["prompt_ids"], ids) - log_probability(reference, row["prompt_ids"], ids))
                for sign, ids in ((1, row["chosen_ids"]), (-1, row["rejected_ids"]))
            )
            for row in rows
        ]
        loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    expected = sum(math.log1p(math.exp(-0.3 * margin)) for margin in margins) / len(margins)
    assert max(map(abs, margins)) > 0.1, "the policy has moved"
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_trl_sees_exactly_our_ids(two_models, example_factory, tmp_path):
    policy, reference, tokenizer = two_models
    rows = tiny_rows(tokenizer, example_factory(4))
    trainer = trainer_for(policy, reference, tokenizer, rows, tmp_path, batch_size=4, micro_batch_size=4)
    [batch] = trainer.get_train_dataloader()
    seen = set()
    for ids, attended, response in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        seen.add((tuple(ids[(attended == 1) & (response == 0)].tolist()), tuple(ids[response == 1].tolist())))
    expected = {(tuple(r["prompt_ids"]), tuple(r[name])) for r in rows for name in ("chosen_ids", "rejected_ids")}
    assert seen == expected
    assert all(row["chosen_ids"].count(tokenizer.eos_token_id) == 1 for row in rows)
    assert all(tokenizer.eos_token_id not in row["rejected_ids"] for row in rows), "a cut response is not ended for it"


def test_accumulated_micro_batches_are_one_batch(tiny_policy, example_factory, tmp_path):
    weights = []
    for micro in (8, 2):
        policy, tokenizer = load_policy(tiny_policy)
        reference, _ = load_policy(tiny_policy)
        rows = tiny_rows(tokenizer, example_factory(8))
        settings = {"batch_size": 8, "epochs": 3, "learning_rate": 1e-3}
        trainer_for(policy, reference, tokenizer, rows, tmp_path, micro_batch_size=micro, **settings).train()
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-3)


@pytest.fixture
def recipe_for(prepared_recipe, tiny_policy, tiny_tokenizer):
    """A recipe whose SFT, sample and label stages are done: four made-up responses to each prompt, one of them with
    too many queries, and a judge that finds words of an even length relevant."""

    def make(max_response_tokens=32, max_eval_examples=200, **settings):
        task = Task(max_response_tokens=max_response_tokens, max_prompt_tokens=200)
        recipe = prepared_recipe(train=12, reward_eval=4, task=task)
        recipe.sft.precision, recipe.sft.max_eval_examples = "fp32", max_eval_examples
        recipe.sample = Sampling(samples_per_example=len(TEXTS))
        recipe.dpo = DPO(
            **{
                "precision": "fp32", "batch_size": 4, "micro_batch_size": 2, "learning_rate": 3e-3,
                "save_steps": 2, **settings,
            }
        )  # fmt: skip

        def sft(recipe, run, folder):
            shutil.copytree(tiny_policy, folder / "model")
            return {}

        def sample(recipe, run, folder):
            rows = [
                {
                    "example_id": example.example_id, "split": example.split, "sample": number, "response": text,
                    "response_ids": encode_response(tiny_tokenizer, text.split("\n")), "finished": True,
                    "problem": parse_response(text, True, recipe.task.num_queries).problem,
                }
                for example in load_examples(run.require("prepare"))
                for number, text in enumerate(TEXTS)
            ]  # fmt: skip
            write_table(folder / "responses.parquet", rows, RESPONSES)
            return {}

        def label(recipe, run, folder):
            examples = {e.example_id: e for e in load_examples(run.require("prepare"))}
            responses = read_table(run.require("sample") / "responses.parquet", RESPONSES).to_pylist()
            rows = [
                verdict_to_row(examples[r["example_id"]], r["sample"], "targets", "even", r["response"], verdict(r, i))
                for i, r in enumerate(responses)
            ]
            write_table(folder / "labels.parquet", rows, LABELS)
            return {}

        for stage, work in (("sft", sft), ("sample", sample), ("label", label)):
            run_stage(recipe, stage, work)
        path = Path(recipe.run_dir) / "recipe.yaml"
        path.write_text(yaml.safe_dump(asdict(recipe)))
        return recipe, path

    return make


def verdict(response, number):
    if number % 16 == 5:
        return Verdict(None, 0.0, False, "abstained", "made up")
    relevant = [len(word.text) % 2 == 0 for word in split_response(response["response"]).words]
    return Verdict([WordVerdict(float(r), r) for r in relevant], 0.0, all(relevant), "ok", None)


def results(recipe):
    folder = RunFolder(recipe).path("rl_dpo")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "manifest.json").read_text())["facts"], rows, folder / "model"


def parameters(folder):
    return dict(load_policy(folder)[0].named_parameters())


@pytest.mark.parametrize("pairs", ["sft_output", "judged"])
def test_stage_learns_and_writes_what_the_contract_says(recipe_for, pairs):
    recipe, path = recipe_for(pairs=pairs, epochs=4.0)
    cli.main(["dpo", "--config", str(path)])
    facts, rows, model = results(recipe)
    steps = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert [row["step"] for row in held_out] == [3, 6, 9, 12]
    # Policy and reference are the same model before the first step: -log sigmoid(0).
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert held_out[-1]["eval_reward_accuracy"] == facts["last"]["eval_reward_accuracy"] == 1
    assert facts["pairs"] == pairs
    assert facts["rubric"] == ("targets" if pairs == "judged" else None)
    assert facts["train"]["responses"] == 48
    assert (facts["train"]["pairs"], facts["reward_eval"]["pairs"]) == (12, 4)
    assert facts["steps"] == 12
    assert (RunFolder(recipe).path("rl_dpo") / "manifest.json").exists()
    assert not (model.parent / "checkpoints").exists()
    assert "made-up" not in (model / "README.md").read_text()
    if pairs == "judged":
        assert facts["train"]["abstained_responses"] == 3


@pytest.mark.parametrize("limit", [0, 3])
def test_the_held_out_pairs_can_be_fewer_or_none(recipe_for, limit):
    recipe, path = recipe_for(max_eval_examples=limit, epochs=1.0)
    cli.main(["dpo", "--config", str(path)])
    facts, rows, _ = results(recipe)
    assert (facts["reward_eval"]["pairs"], facts["reward_eval"]["measured_pairs"]) == (4, limit)
    assert any("eval_loss" in row for row in rows) == bool(limit)


def test_a_recipe_without_several_samples_is_refused(recipe_for, capsys):
    _, path = recipe_for(pairs="judged")
    for command in (["dpo"], ["run", "--algorithms", "[dpo]"]):
        with pytest.raises(SystemExit):
            cli.main([command[0], "--config", str(path), *command[1:], "--sample.samples_per_example", "1"])
        assert "--sample.samples_per_example 2 or more" in capsys.readouterr().err


def test_no_pair_left_is_said_with_the_reasons(recipe_for, capsys):
    _, path = recipe_for(max_response_tokens=1)
    with pytest.raises(SystemExit):
        cli.main(["dpo", "--config", str(path)])
    message = capsys.readouterr().err
    assert "no pair is left to train on" in message
    assert "'true_queries_too_long': 12" in message


def test_lora_is_merged_and_its_reference_is_the_model_without_adapters(recipe_for, tiny_policy):
    recipe, path = recipe_for(tuning="lora", lora_r=4, learning_rate=1e-2)
    cli.main(["dpo", "--config", str(path)])
    _, rows, model = results(recipe)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert not list(model.glob("adapter*"))
    tuned, base = parameters(model), parameters(tiny_policy)
    assert tuned.keys() == base.keys()
    changed = {name for name in base if not torch.equal(tuned[name], base[name])}
    assert changed
    assert all("proj" in name for name in changed), "embeddings, norms and the head stay as they were"


class Killed(Exception):
    pass


def test_interrupted_run_resumes_to_the_same_model(recipe_for, monkeypatch):
    (whole, path), (broken, broken_path) = recipe_for(), recipe_for()
    cli.main(["dpo", "--config", str(path)])

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_end", on_step_end)
        with pytest.raises(Killed):
            cli.main(["dpo", "--config", str(broken_path)])
    assert [p.name for p in (Path(broken.run_dir) / "rl_dpo" / "checkpoints").glob("c*")] == ["checkpoint-4"]
    cli.main(["dpo", "--config", str(broken_path)])
    assert_same(whole, broken, resumed_from=4)


def assert_same(whole, broken, resumed_from):
    facts, rows, model = results(broken)
    expected_facts, expected_rows, expected_model = results(whole)
    assert facts["resumed_from_step"] == resumed_from
    assert rows == expected_rows
    assert facts["last"] == expected_facts["last"]
    expected = parameters(expected_model)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(model).items())


@pytest.mark.slow
def test_kill_9_resumes_to_the_same_model(recipe_for):
    (whole, path), (broken, broken_path) = recipe_for(epochs=20.0), recipe_for(epochs=20.0)
    cli.main(["dpo", "--config", str(path)])
    command = [sys.executable, "-m", "tppo", "dpo", "--config", str(broken_path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    checkpoints = Path(broken.run_dir) / "rl_dpo" / "checkpoints"
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(broken.run_dir) / "rl_dpo" / "manifest.json").exists()
    cli.main(["dpo", "--config", str(broken_path)])
    resumed_from = results(broken)[0]["resumed_from_step"]
    assert resumed_from
    assert_same(whole, broken, resumed_from)


def test_evaluation_columns_mirror_training_columns():
    training, evaluation = dpo.METRICS
    assert {name.removeprefix("eval_") for name in evaluation} == training.keys() - {"grad_norm", "learning_rate"}
