from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    DbrxConfig,
    FalconConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    WhisperConfig,
    XLNetConfig,
)

from tests.helpers.policy_tokenizers import LOSSY, READABLE, gpt2, llama3
from tppo.core.common import UserError
from tppo.core.config import Task
from tppo.core.encode import encode_text
from tppo.core.models import (
    check_positions,
    load_encoder_path,
    load_policy,
    position_limit,
    sampling_config,
    save_model,
    smollm2_folder,
    stop_ids,
    with_adapters,
)


def copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def test_load_sets_what_generation_relies_on(tiny_policy):
    model, tokenizer = load_policy(str(tiny_policy), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


def test_save_and_load_give_the_same_model(tiny_policy, tmp_path):
    model, tokenizer = load_policy(tiny_policy)
    save_model(model, tokenizer, tmp_path / "model", "# A card\n")
    again, tokenizer_again = load_policy(tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "no temporary folder stays behind"


def test_save_replaces_an_older_model_and_keeps_it_when_saving_fails(tiny_policy, tmp_path):
    model, tokenizer = load_policy(tiny_policy)
    save_model(model, tokenizer, tmp_path / "model", "old")
    with pytest.raises(AttributeError):
        save_model(model, None, tmp_path / "model", "broken")
    assert (tmp_path / "model" / "README.md").read_text() == "old"
    save_model(model, tokenizer, tmp_path / "model", "new")
    assert (tmp_path / "model" / "README.md").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folder_without_tokenizer(tiny_policy, tmp_path):
    folder = copy(tiny_policy, tmp_path / "m")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"no tokenizer.*save_pretrained"):
        load_policy(folder)


def test_folder_without_weights_and_with_broken_weights(tiny_policy, tmp_path):
    folder = copy(tiny_policy, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="no causal language model that loads"):
        load_policy(folder)
    weights.unlink()
    with pytest.raises(UserError, match="no causal language model that loads"):
        load_policy(folder)


def test_pickled_weights_are_refused(tiny_policy, tmp_path):
    folder = copy(tiny_policy, tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no causal language model that loads"):
        load_policy(folder)


def test_tokenizer_without_end_of_sequence(tiny_policy, tmp_path):
    model, tokenizer = load_policy(tiny_policy)
    tokenizer.eos_token = None
    save_model(model, tokenizer, tmp_path / "m", "")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_policy(tmp_path / "m")


def test_tokenizer_of_another_model(tiny_policy, tmp_path):
    model, tokenizer = load_policy(tiny_policy)
    tokenizer.add_tokens([f"extra{i}" for i in range(50)])
    save_model(model, tokenizer, tmp_path / "m", "")
    with pytest.raises(UserError, match="do not belong together"):
        load_policy(tmp_path / "m")


def edit(folder: Path, name: str, **fields) -> None:
    """Change fields of a JSON file of a model folder."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def make_special(folder: Path, id: int) -> None:
    """Make an ordinary token a special one, which may end a response."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(id)]})
    tokenizer.save_pretrained(folder)


SAMPLING = {
    "do_sample": False, "temperature": 0.3, "top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5, "min_new_tokens": 4,
    "max_new_tokens": 3, "suppress_tokens": [4], "begin_suppress_tokens": [3], "forced_eos_token_id": 2,
    "no_repeat_ngram_size": 2, "num_beams": 2,
}  # fmt: skip


def test_a_saved_folder_samples_as_it_was_trained(tiny_policy, tmp_path):
    """`model.generate` draws from the softmax at the trained temperature and nothing else, ended by the same ids."""
    folder = copy(tiny_policy, tmp_path / "m")
    make_special(folder, 5)
    edit(folder, "generation_config.json", **SAMPLING, eos_token_id=[0, 5])
    model, tokenizer = load_policy(folder)
    assert stop_ids(model, tokenizer) == (0, 5)
    model.generation_config = sampling_config(model, tokenizer, temperature=0.7, max_new_tokens=9)
    save_model(model, tokenizer, tmp_path / "saved", "")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    config, _ = again._prepare_generation_config(None)
    processors = again._get_logits_processor(
        config, input_ids_seq_length=3, encoder_input_ids=None, prefix_allowed_tokens_fn=None, logits_processor=[]
    )
    assert [type(p).__name__ for p in processors] == ["TemperatureLogitsWarper"]
    assert (config.do_sample, config.temperature, config.max_new_tokens) == (True, 0.7, 9)
    assert config.eos_token_id == [0, 5]
    torch.manual_seed(0)
    ids = torch.tensor([[5, 6, 7]] * 4000)
    first = again.generate(ids, max_new_tokens=1)[:, -1]
    with torch.no_grad():
        expected_V = torch.softmax(model(ids[:1]).logits[0, -1] / 0.7, -1)
    shares_V = torch.bincount(first, minlength=len(expected_V)) / len(ids)
    assert (shares_V - expected_V).abs().max() < 0.03
    assert load_policy(tmp_path / "saved")[0].generation_config.top_k == 0


@pytest.mark.parametrize(
    "invalid",
    [
        {"temperature": -1.0, "do_sample": True},
        {"do_sample": False, "num_return_sequences": 4},
        {"cache_implementation": "nonsense"},
        {"watermarking_config": {"greenlist_ratio": 7}},
        {"do_sample": False, "top_p": 0.9},
        {"top_k": "many"},
    ],
)
def test_invalid_sampling_settings_of_the_start_model_are_replaced_at_load(tiny_policy, tmp_path, invalid):
    folder = copy(tiny_policy, tmp_path / "m")
    edit(folder, "generation_config.json", **invalid)
    model, tokenizer = load_policy(folder)
    save_model(model, tokenizer, tmp_path / "saved", "")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: kept[name] for name in ("do_sample", "temperature", "top_p", "top_k")} == {
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
    }


@pytest.mark.parametrize(("text", "message"), [
    ("{", "cannot be read"), ("[1, 2]", "cannot be read"), ('{"eos_token_id": "<end>"}', "token's id"),
    ('{"eos_token_id": [[1]]}', "token's id"),
])  # fmt: skip
def test_stop_ids_that_cannot_be_read_are_refused(tiny_policy, tmp_path, text, message):
    folder = copy(tiny_policy, tmp_path / "m")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=f"generation_config.json .*{message}"):
        load_policy(folder)


def test_stop_ids_without_a_generation_config_are_the_models(tiny_policy, tmp_path):
    folder = copy(tiny_policy, tmp_path / "m")
    (folder / "generation_config.json").unlink()
    make_special(folder, 5)
    edit(folder, "config.json", eos_token_id=[5, 0, 99_999], repetition_penalty=1.3, max_length=20)
    model, tokenizer = load_policy(folder)
    assert stop_ids(model, tokenizer) == (0, 5), "the tokenizer's first; what the model cannot write is no stop"
    save_model(model, tokenizer, tmp_path / "saved", "")
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((tmp_path / "saved" / name).read_text())
        assert not {"repetition_penalty", "max_length"} & kept.keys()


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_ordinary_text_ends_no_response(tiny_policy, tmp_path, name, capsys):
    folder = copy(tiny_policy, tmp_path / "m")
    if name == "config.json":
        (folder / "generation_config.json").unlink()
    edit(folder, name, eos_token_id=[0, 3])
    assert stop_ids(*load_policy(folder)) == (0, 3)  # written on purpose
    assert "names 3, which is '#', ordinary text: it ends" in " ".join(capsys.readouterr().err.split())
    for file in ("config.json", name):
        edit(folder, file, eos_token_id=2)  # LlamaConfig's, whatever the tokenizer
    model, tokenizer = load_policy(folder)
    assert stop_ids(model, tokenizer) == (0,)
    assert model.generation_config.eos_token_id == 0
    assert "ordinary text: not used" in " ".join(capsys.readouterr().err.split())


def test_weights_that_the_configuration_does_not_have_are_named(tiny_policy, tmp_path, capsys):
    folder = copy(tiny_policy, tmp_path / "m")
    weights = load_file(folder / "model.safetensors") | {"further.weight": torch.zeros(2)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_policy(folder)
    assert "(1, first: further.weight): not used" in " ".join(capsys.readouterr().err.split())


def test_files_that_cannot_be_read_are_named(tiny_policy, tmp_path):
    folder = copy(tiny_policy, tmp_path / "m")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").mkdir()
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read"):
        load_policy(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^\S*[^_]config\.json does not load"):
        load_policy(folder)


def test_weights_that_would_be_random_are_named(tiny_policy, tmp_path):
    folder = copy(tiny_policy, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights .*first: model.layers.0.mlp.up_proj.weight"):
        load_policy(folder)


def test_configuration_that_a_family_does_not_take(tiny_policy, tmp_path):
    folder = copy(tiny_policy, tmp_path / "m")
    edit(folder, "config.json", num_attention_heads="many")
    with pytest.raises(UserError, match=r"does not load .*num_attention_heads"):
        load_policy(folder)


def test_adapters_that_are_not_merged_are_refused(tiny_policy, tmp_path):
    model, _ = load_policy(tiny_policy)
    with_adapters(model, 2).save_pretrained(tmp_path / "adapters")
    folder = copy(tiny_policy, tmp_path / "m")
    shutil.copytree(tmp_path / "adapters", folder, dirs_exist_ok=True)
    edit(folder, "adapter_config.json", base_model_name_or_path=str(tiny_policy))
    with pytest.raises(UserError, match=r"has adapters \(PEFT\): merge them"):
        load_policy(folder)


def test_a_model_without_anything_to_adapt_names_full_tuning(tiny_policy):
    model, _ = load_policy(tiny_policy)
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(UserError, match=r"takes no LoRA adapters .*tuning=full"):
        with_adapters(model, 2)


@pytest.mark.parametrize("name", ["smollm3", "./nowhere", "/nowhere/at/all", Path("models/mine")])
def test_unknown_names_say_the_way_out(name):
    for load in (load_policy, load_encoder_path):
        with pytest.raises(UserError, match=r"neither bundled, nor a folder.*smollm2"):
            load(name)


def test_hub_name_while_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    with pytest.raises(UserError, match=r"nobody/nothing.*HF_HUB_OFFLINE is set.*local Hugging Face folder"):
        load_policy("nobody/nothing")


def test_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"without config\.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer"):
        load_encoder_path(tmp_path)


def test_bundled_encoder_is_a_model_folder():
    folder = Path(load_encoder_path("minilm"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    assert load_encoder_path(folder) == str(folder)


@pytest.mark.slow
def test_bundled_policy_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TPPO_CACHE", str(tmp_path))
    model, tokenizer = load_policy("smollm2", dtype=torch.bfloat16)
    assert tokenizer.eos_token == "<|im_end|>"
    assert getattr(model.config, "quantization_config", None) is None
    stamp = (tmp_path / "smollm2" / "model.safetensors").stat().st_mtime_ns
    assert smollm2_folder() == tmp_path / "smollm2"
    assert (tmp_path / "smollm2" / "model.safetensors").stat().st_mtime_ns == stamp
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.parametrize("theirs", ["notes.txt", "model/notes.txt", "file"])
def test_save_replaces_only_what_was_saved(tiny_policy, tmp_path, theirs):
    model, tokenizer = load_policy(tiny_policy)
    folder = tmp_path / "model"
    if theirs == "file":
        folder.write_text("mine")
    elif "/" in theirs:
        save_model(model, tokenizer, folder, "old")
        (folder / "notes.txt").write_text("mine")
    else:
        shutil.copytree(tiny_policy, folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"model.* was put there by somebody else: move it"):
        save_model(model, tokenizer, folder, "new")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def with_tokenizer(folder, target, tokenizer):
    """The tiny policy's folder with another tokenizer, and embeddings for it."""
    model, _ = load_policy(folder)
    model.resize_token_embeddings(len(tokenizer))
    save_model(model, tokenizer, target, "")
    return target


@pytest.mark.parametrize("make", LOSSY)
def test_a_tokenizer_that_loses_line_breaks_is_refused_at_load(tiny_policy, tmp_path, make):
    folder = with_tokenizer(tiny_policy, tmp_path / "m", make())
    with pytest.raises(UserError, match=r"does not bring back what it is given: line breaks .*are lost"):
        load_policy(folder)


@pytest.mark.parametrize("make", READABLE)
def test_tokenizers_of_other_families_load(tiny_policy, tmp_path, make):
    _, tokenizer = load_policy(with_tokenizer(tiny_policy, tmp_path / "m", make()))
    assert encode_text(tokenizer, "a </s> b") == encode_text(make(), "a </s> b")


def test_a_task_longer_than_the_model_reads_is_refused_at_load(tiny_policy, tmp_path):
    load_policy(tiny_policy, task=Task(max_prompt_tokens=480, max_response_tokens=32))
    with pytest.raises(
        UserError,
        match=r"task\.max_prompt_tokens=490 and task\.max_response_tokens=32 make 522 tokens, .* has 512 positions",
    ):
        load_policy(tiny_policy, task=Task(max_prompt_tokens=490))
    config = GPT2Config(vocab_size=len(gpt2()), n_positions=64, n_embd=16, n_layer=1, n_head=2)
    save_model(GPT2LMHeadModel(config), gpt2(), tmp_path / "table", "")
    with pytest.raises(UserError, match="has 64 positions"):
        load_policy(tmp_path / "table", task=Task())


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=128), 128),
        (LlamaConfig(max_position_embeddings=128, rope_parameters={"rope_type": "linear", "factor": 4.0}), 512),
        (
            LlamaConfig(
                max_position_embeddings=512,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
            ),
            512,
        ),
        (LlamaConfig(max_position_embeddings=128, rope_parameters={"rope_type": "dynamic", "factor": 4.0}), 128),
        (
            LlamaConfig(
                max_position_embeddings=512,
                rope_parameters={
                    "rope_type": "longrope",
                    "factor": 4.0,
                    "original_max_position_embeddings": 128,
                    "short_factor": [1.0] * 64,
                    "long_factor": [2.0] * 64,
                },
            ),
            128,
        ),
        (DbrxConfig(max_seq_len=96), 96),
        (WhisperConfig(max_target_positions=48), 48),
        (FalconConfig(alibi=True), None),
        (BloomConfig(), None),
        (MambaConfig(), None),
        (XLNetConfig(), None),
        (Gemma3Config(text_config=Gemma3TextConfig(max_position_embeddings=96)), 96),
    ],
)
def test_how_long_a_model_reads(config, limit):
    assert position_limit(config) == limit


def test_a_model_without_a_name_is_the_model():
    with pytest.raises(UserError, match="make 9 tokens, but the model has 8 positions"):
        check_positions(LlamaConfig(max_position_embeddings=8), 5, 4, "a=5 and b", "")


def test_a_chat_task_ends_with_the_turn(tiny_policy, tmp_path):
    folder = with_tokenizer(tiny_policy, tmp_path / "m", llama3())
    assert load_policy(folder, task=Task())[1].eos_token == "<|end_of_text|>"
    assert load_policy(folder, task=Task(prompt="chat"))[1].eos_token == "<|eot_id|>"
    with pytest.raises(UserError, match=r"task\.prompt=chat: the tokenizer has no chat template"):
        load_policy(tiny_policy, task=Task(prompt="chat"))
