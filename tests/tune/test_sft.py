from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from tests.helpers.policy_tokenizers import READABLE, llama3
from tests.helpers.tokenizer_kinds import get_tokenizer
from tppo.core.chat import end_with_turn
from tppo.core.common import UserError
from tppo.core.config import SFT, Task
from tppo.core.models import load_policy, save_model
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import load_examples
from tppo.core.text import Event, encode_prompt, render_response
from tppo.generate import respond, sample
from tppo.generate.engine import encode_examples, generate
from tppo.serve import app
from tppo.tune import sft
from tppo.tune.sft import IGNORED, encode_training, make_trainer
from tppo.tune.trl import EpochSampler, ProgressCallback, last_good_checkpoint


@pytest.fixture
def recipe_for(prepared_recipe, tiny_policy):
    def make(**settings):
        recipe = prepared_recipe()
        recipe.task.max_prompt_tokens = 200
        recipe.sft = SFT(
            **{
                "model": str(tiny_policy), "precision": "fp32", "batch_size": 8, "micro_batch_size": 4,
                "learning_rate": 1e-2, "epochs": 2.0, "save_steps": 2, **settings,
            }
        )  # fmt: skip
        return recipe

    return make


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_encoding_joins_prompt_and_response_with_one_end_of_sequence(tiny_tokenizer, example_factory):
    examples = example_factory(5)
    encoded = encode_training(tiny_tokenizer, examples, Task(max_prompt_tokens=300))
    eos = tiny_tokenizer.eos_token_id
    for example, row in zip(examples, encoded.rows, strict=True):
        prompt, _ = encode_prompt(tiny_tokenizer, example.history, 3, 300)
        response = row["input_ids"][len(prompt) :]
        assert row["input_ids"][: len(prompt)] == prompt
        assert response[-1] == eos
        assert response.count(eos) == 1
        assert tiny_tokenizer.decode(response[:-1]) == render_response(example.targets)
        assert row["labels"] == [IGNORED] * len(prompt) + response
        assert row["length"] == len(row["input_ids"])
    assert encoded.dropped_events == encoded.too_long_responses == 0


def test_a_target_that_spells_the_end_does_not_hold_it(tiny_tokenizer, example_factory):
    """It would teach the model to stop in the middle."""
    example = example_factory(1)[0]
    example.history[0] = Event("search", "seeds <|end|>")
    example.targets[0] = "what is <|end|> in python"
    [row] = encode_training(tiny_tokenizer, [example], Task(max_prompt_tokens=300, max_response_tokens=64)).rows
    assert row["input_ids"].count(tiny_tokenizer.eos_token_id) == 1
    assert tiny_tokenizer.decode(row["input_ids"][:-1]).endswith(render_response(example.targets))


@pytest.mark.parametrize(("family", "style", "end"), [
    ("llama2", "plain", "</s>"), ("llama3", "plain", "<|end_of_text|>"), ("llama3", "chat", "<|eot_id|>"),
    ("gemma", "chat", "<end_of_turn>"),
])  # fmt: skip
def test_the_tokenizers_own_beginning_and_end(family, style, end, example_factory):
    tokenizer = {make.__name__: make for make in READABLE}[family]()
    if style == "chat":
        end_with_turn(tokenizer)
    task = Task(max_prompt_tokens=900, max_response_tokens=200, prompt=style)
    examples = example_factory(4)
    prompts, _ = encode_examples(tokenizer, examples, task)
    for prompt, row in zip(prompts, encode_training(tokenizer, examples, task).rows, strict=True):
        assert row["input_ids"][: len(prompt)] == prompt
        assert prompt[0] == tokenizer.bos_token_id
        assert prompt.count(tokenizer.bos_token_id) == 1
        assert row["labels"].count(IGNORED) == len(prompt)
        assert tokenizer.convert_ids_to_tokens(row["input_ids"][-1]) == end
        assert row["labels"].count(tokenizer.eos_token_id) == 1


def test_responses_that_cannot_be_written_are_left_out_and_counted(example_factory):
    tokenizer = get_tokenizer("characters")
    examples = example_factory(2)
    examples[0].targets[:] = ["how to fix", "a flat"]
    examples[1].targets[:] = ["how to fix", "ж"]
    encoded = encode_training(tokenizer, examples, Task(max_prompt_tokens=900, max_response_tokens=200))
    assert (len(encoded.rows), encoded.unwritable_responses, encoded.too_long_responses) == (1, 1, 0)


def test_scratch_has_no_chat_template(recipe_for):
    recipe = recipe_for(model="scratch")
    recipe.task.prompt = "chat"
    with pytest.raises(UserError, match=r"task\.prompt=chat: sft\.model=scratch has no chat template"):
        run_stage(recipe, "sft", sft.run)


def test_every_stage_has_the_same_prompt_and_end_in_a_chat(recipe_for, tiny_policy, tmp_path, monkeypatch):
    model, _ = load_policy(tiny_policy)
    tokenizer = llama3()
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, tmp_path / "chat", "")
    recipe = recipe_for(model=str(tmp_path / "chat"), epochs=1.0)
    recipe.task = Task(max_prompt_tokens=400, max_response_tokens=60, prompt="chat")
    run_stage(recipe, "sft", sft.run)
    seen = []

    def spied(model, tokenizer, prompts, **settings):
        seen.append((tokenizer.eos_token, prompts))
        return generate(model, tokenizer, prompts, **settings)

    run = RunFolder(recipe)
    monkeypatch.setattr(respond, "generate", spied)
    run_stage(recipe, "sample", sample.run)
    monkeypatch.setattr(app, "generate", spied)
    model, tokenizer = load_policy(run.path("sft") / "model", task=recipe.task)
    [example, *_] = load_examples(run.path("prepare"), "train")
    client = TestClient(app.create_app({"sft": (model, tokenizer)}, recipe.task, 0.0))
    history = [{"kind": event.kind, "text": event.text} for event in example.history]
    assert client.post("/v1/suggest", json={"history": history}).status_code == 200
    *sampled, served = seen
    trained = encode_training(tokenizer, [example], recipe.task).rows[0]["input_ids"]
    assert {end for end, _ in seen} == {"<|eot_id|>"}
    assert served[1][0] == trained[: len(served[1][0])]
    assert served[1][0] in [prompt for _, prompts in sampled for prompt in prompts]
    assert trained[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>")


def test_long_responses_are_left_out_and_counted_never_cut(tiny_tokenizer, example_factory):
    examples = example_factory(12)
    lengths = [len(tiny_tokenizer(render_response(e.targets))["input_ids"]) + 1 for e in examples]
    limit = sorted(lengths)[len(lengths) // 2]
    encoded = encode_training(tiny_tokenizer, examples, Task(max_response_tokens=limit))
    assert encoded.too_long_responses == sum(length > limit for length in lengths) > 0
    assert len(encoded.rows) == sum(length <= limit for length in lengths)


def trainer_for(tiny_model, tokenizer, rows, tmp_path, **settings):
    return make_trainer(tiny_model, tokenizer, rows, [], SFT(precision="fp32", **settings), 0, tmp_path)


def test_loss_is_that_of_the_response_tokens(tiny_model, tiny_tokenizer, example_factory, tmp_path):
    rows = encode_training(tiny_tokenizer, example_factory(3), Task(max_prompt_tokens=300)).rows
    trainer = trainer_for(tiny_model, tiny_tokenizer, rows, tmp_path)
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(tiny_model, dict(batch))
    reference = tiny_model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(
        trainer.compute_loss(tiny_model, dict(batch), num_items_in_batch=torch.tensor(7)),
        reference * (batch["labels"] != IGNORED).sum() / 7,
    )


def test_logits_are_made_for_the_last_positions_only(tiny_model, tiny_tokenizer, example_factory, tmp_path):
    rows = encode_training(tiny_tokenizer, example_factory(4), Task(max_prompt_tokens=300)).rows
    trainer = trainer_for(tiny_model, tiny_tokenizer, rows, tmp_path)
    widths = []
    tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    trainer.compute_loss(tiny_model, trainer.data_collator(rows))
    first = min(row["labels"].count(IGNORED) for row in rows)
    assert widths == [max(row["length"] for row in rows) - first + 1]


def test_accumulated_micro_batches_are_one_batch(tiny_tokenizer, tiny_policy, example_factory, tmp_path):
    rows = encode_training(tiny_tokenizer, example_factory(8), Task(max_prompt_tokens=300)).rows
    weights = []
    for micro in (8, 2):
        model, _ = load_policy(tiny_policy)
        # With Adam a first step depends on the sign of the gradient only; later ones on its size.
        trainer = trainer_for(
            model,
            tiny_tokenizer,
            rows,
            tmp_path,
            batch_size=8,
            micro_batch_size=micro,
            epochs=3,
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-4)


def test_bf16_means_float32_weights_and_bf16_products(tiny_model, tiny_tokenizer, example_factory, tmp_path):
    rows = encode_training(tiny_tokenizer, example_factory(8), Task(max_prompt_tokens=300)).rows
    trainer = make_trainer(
        tiny_model,
        tiny_tokenizer,
        rows,
        [],
        SFT(precision="bf16", batch_size=4, micro_batch_size=4),
        0,
        tmp_path,
    )
    seen = set()
    tiny_model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in tiny_model.parameters()} == {torch.float32}


def test_stage_learns_and_writes_what_the_contract_says(recipe_for):
    recipe = recipe_for(epochs=6.0)
    assert run_stage(recipe, "sft", sft.run)
    run = RunFolder(recipe)
    folder, facts = run.path("sft"), run.manifest("sft")["facts"]
    rows = rows_of(folder)
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19))
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 9, 18]
    assert all(set(row) in ({"step", "loss", "learning_rate"}, {"step", "eval_loss"}) for row in rows)
    assert losses[-1] < 0.5 * losses[0]
    assert evals[-1] < 0.5 * evals[0]
    assert facts["steps"] == 18
    assert facts["train_examples"] == 24
    assert facts["resumed_from_step"] is None
    assert not (folder / "checkpoints").exists()
    load_policy(folder / "model")
    assert json.loads((folder / "model" / "config.json").read_text())["dtype"] == "float32"
    assert "made-up" not in (folder / "model" / "README.md").read_text()


def test_bf16_run_saves_bf16(recipe_for):
    recipe = recipe_for(precision="bf16", epochs=1.0)
    run_stage(recipe, "sft", sft.run)
    config = json.loads((RunFolder(recipe).path("sft") / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


def test_lora_is_merged_into_the_saved_model(recipe_for, tiny_policy):
    recipe = recipe_for(tuning="lora", lora_r=4)
    run_stage(recipe, "sft", sft.run)
    folder = RunFolder(recipe).path("sft") / "model"
    assert not list(folder.glob("adapter*"))
    tuned, _ = load_policy(folder)
    base, _ = load_policy(tiny_policy)
    assert [n for n, _ in tuned.named_parameters()] == [n for n, _ in base.named_parameters()]
    changed = {
        name for (name, a), b in zip(tuned.named_parameters(), base.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed
    assert all("proj" in name for name in changed), "embeddings and norms stay as they were"


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_saved_model_samples_as_it_was_trained(recipe_for, tiny_policy, tmp_path, tuning):
    """At temperature 1 and no other settings, whatever the start model's; its stop ids are kept."""
    start = Path(shutil.copytree(tiny_policy, tmp_path / "start"))
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(5)]})
    tokenizer.save_pretrained(start)
    settings = {
        "do_sample": False,
        "top_p": 0.5,
        "repetition_penalty": 1.5,
        "max_new_tokens": 2,
        "eos_token_id": [0, 5],
    }
    (start / "generation_config.json").write_text(json.dumps(settings))
    recipe = recipe_for(tuning=tuning, epochs=1.0, model=str(start))
    run_stage(recipe, "sft", sft.run)
    saved = json.loads((RunFolder(recipe).path("sft") / "model" / "generation_config.json").read_text())
    saved.pop("transformers_version")
    limit = recipe.task.max_response_tokens
    assert saved == {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": limit} | {
        "eos_token_id": [0, 5],
        "pad_token_id": 0,
    }


def test_order_depends_on_seed_and_epoch_only():
    lengths = [10 + i % 7 for i in range(400)]
    sampler = EpochSampler(4, lengths, seed=1)
    first = list(sampler)
    torch.manual_seed(9)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert sorted(second) == list(range(400)), "every example once"
    assert list(EpochSampler(4, lengths, seed=2)) != first
    spread = [max(part) - min(part) for part in ([lengths[i] for i in first[b : b + 4]] for b in range(0, 400, 4))]
    assert sum(spread) / len(spread) < 1, "batches hold similar lengths"


class Killed(Exception):
    pass


def interrupt_at(monkeypatch, step):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    monkeypatch.setattr(ProgressCallback, "on_step_end", on_step_end)


def test_interrupted_run_resumes_to_the_same_model(recipe_for, monkeypatch):
    whole, broken = recipe_for(), recipe_for()
    run_stage(whole, "sft", sft.run)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(Killed):
            run_stage(broken, "sft", sft.run)
    folder = RunFolder(broken).path("sft")
    assert [p.name for p in (folder / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"], "one is kept"
    assert run_stage(broken, "sft", sft.run)
    facts = RunFolder(broken).manifest("sft")["facts"]
    assert facts["resumed_from_step"] == 4
    models = [load_policy(RunFolder(r).path("sft") / "model")[0] for r in (whole, broken)]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert rows_of(folder) == rows_of(RunFolder(whole).path("sft"))


@pytest.mark.parametrize("victim", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_checkpoint_broken_by_a_kill_is_skipped(
    tiny_model, tiny_tokenizer, example_factory, tmp_path, victim, damage, capsys
):
    rows = encode_training(tiny_tokenizer, example_factory(8), Task(max_prompt_tokens=300)).rows
    trainer = trainer_for(tiny_model, tiny_tokenizer, rows, tmp_path, batch_size=4, micro_batch_size=4, save_steps=2)
    trainer.train()
    good = tmp_path / "checkpoint-2"
    assert last_good_checkpoint(tmp_path) == good
    newer = tmp_path / "checkpoint-10"
    shutil.copytree(good, newer)
    file = newer / victim
    if damage == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    assert last_good_checkpoint(tmp_path) == good
    assert not newer.exists()


def test_no_checkpoint_yet(tmp_path):
    assert last_good_checkpoint(tmp_path / "checkpoints") is None


def test_user_mistakes(recipe_for):
    recipe = recipe_for(batch_size=8, micro_batch_size=3)
    with pytest.raises(UserError, match="multiple of"):
        run_stage(recipe, "sft", sft.run)
    recipe = recipe_for()
    recipe.task.max_response_tokens = 2
    with pytest.raises(UserError, match=r"24 of 24 have a response above task\.max_response_tokens=2"):
        run_stage(recipe, "sft", sft.run)


def test_rows_in_a_file_are_those_in_memory(tiny_tokenizer, example_factory, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "_AT_ONCE", 4)
    examples = example_factory(11)
    limit = sorted(len(tiny_tokenizer(render_response(e.targets))["input_ids"]) + 1 for e in examples)[5]
    task = Task(max_prompt_tokens=60, max_response_tokens=limit)
    whole = encode_training(tiny_tokenizer, examples, task)
    mapped = sft.encode_to_file(tiny_tokenizer, examples, task, tmp_path / "parts" / "rows.arrow")
    assert list(mapped.rows) == whole.rows
    assert mapped._replace(rows=[]) == whole._replace(rows=[])
    assert mapped.too_long_responses > 0
    assert mapped.rows.cache_files, "mapped from a file"
    empty = sft.encode_to_file(tiny_tokenizer, [], task, tmp_path / "none.arrow")
    assert (len(empty.rows), empty.too_long_responses, empty.dropped_events) == (0, 0, 0)
