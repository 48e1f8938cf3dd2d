"""Which families of causal language models tppo trains: docs/models.md.

    PYTHONPATH=src python benchmarks/families.py [FAMILY ...] [--write docs/models.md]

Every family of transformers' own list of causal language models is made tiny, with random weights (seed 0), saved and
taken through what a run does with a start model:

1. it is loaded by `load_policy`, or refused there with a reason;
2. four prompts of different length, some of which end early, get the same greedy responses beside each other as each
   alone by the model's own `generate`;
3. three updates of token-level PPO, all weights and then LoRA with the value function that shares the policy's
   weights: the first ratio is 1 (the trainer's own guard), and the weights move and stay finite;
4. the trained policy is saved, loaded again and gives the same logits, with LoRA merged.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tppo.core.common import UserError
from tppo.core.config import RL
from tppo.core.models import load_policy, save_model
from tppo.generate.engine import generate
from tppo.rl.trainer import TokenPPOTrainer

VOCABULARY, WIDTH, HEADS, HEAD, POSITIONS = 288, 32, 4, 8, 128
LARGEST = 5_000_000
_HEAD_COUNTS = """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
    num_decoder_attention_heads num_encoder_attention_heads linear_num_heads linear_num_value_heads
    swa_num_attention_heads"""
_HEAD_SIZES = """head_dim v_head_dim qk_nope_head_dim dim_head attention_head_dim linear_head_dim index_head_dim
    swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim global_head_dim"""
_WIDTHS = """hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim attention_hidden_size embedding_dim
    input_embedding_size output_embedding_size lru_width"""
_INNER = """intermediate_size ffn_dim dff dim_ff d_inner n_inner ffn_hidden_size feed_forward_size decoder_ffn_dim
    encoder_ffn_dim moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
    shared_experts_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size intermediate_size_mlp
    dense_intermediate_size"""
_LAYERS = """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
    num_encoder_layers"""
_POSITIONS = """max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions
    max_sequence_length"""
_RANKS = "kv_lora_rank q_lora_rank o_lora_rank hidden_size_per_layer_input laurel_rank gated_norm_rank"
_SMALL = {
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size": VOCABULARY,
    "pronunciation_vocab_size shape_vocab_size": VOCABULARY,
    _WIDTHS: WIDTH,
    _INNER: 48,
    _LAYERS: 2,
    _HEAD_COUNTS: HEADS,
    _HEAD_SIZES: HEAD,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads num_global_key_value_heads linear_num_key_heads": 2,
    "qk_rope_head_dim rotary_dim": 4,
    _RANKS: 8,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k index_n_heads": 2,
    "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers": 1,
    _POSITIONS: POSITIONS,
    "sliding_window sliding_window_size attention_window_size": 6,
    "mamba_n_heads mamba_d_head mamba_d_state mamba_chunk_size mamba_num_heads mamba_head_dim": 8,
    "chunk_size ssm_state_size state_size pronunciation_embed_dim shape_embed_dim": 8,
    "mamba_d_ssm": 64,
    "n_mamba_heads n_groups mamba_n_groups": 2,
    "time_step_rank mamba_dt_rank": 4,
    "num_kv_shared_layers": 0,
}
SIZES = {name: size for names, size in _SMALL.items() for name in names.split()}
"""What a field of a configuration becomes, where its default is larger."""
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types")
_ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16, "attention_hidden_size": 64}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"],
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
    **{"indexer_budget": 8, "indexer_compress_ratio": 2},
}
FURTHER: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        **{"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        **{"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    },
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "falcon_mamba": {"intermediate_size": 64},
    "gemma3n_text": {"intermediate_size": [48, 48]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": HEAD},
    "hunyuan_v1_moe": {"head_dim": HEAD},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4},
    "mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": HEAD, "expand": 2},
    "ministral": {"head_dim": HEAD},
    "nemotron": {"head_dim": HEAD, "num_key_value_heads": 2},
    "qwen4_exp": _QWEN4,
    "qwen4_exp_text": _QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, **_ZAMBA},
    "zamba2": {"num_hidden_layers": 4, **_ZAMBA},
}
"""What sizes alone do not say."""
QUICK = ("llama", "opt", "bart", "rwkv", "mamba", "lfm2", "minimax", "mixtral")
"""One of every kind: CI takes these through `outcome` (tests/generate/test_families.py)."""


def tiny_config(family: str) -> PreTrainedConfig:
    """The family's default configuration with every size made small."""
    default = CONFIG_MAPPING[family]()
    return _shrunk(default, default.get_text_config(decoder=True), FURTHER.get(family, {}))


def _shrunk(default: PreTrainedConfig, text: PreTrainedConfig, further: dict[str, Any]) -> PreTrainedConfig:
    """`further` goes to the part that is `text`, or to the whole where no part is."""
    parts = {name: value for name, value in vars(default).items() if isinstance(value, PreTrainedConfig)}
    inside = any(part is text for part in parts.values())
    sizes = _small_fields(default) | (further if not inside else {})
    sizes |= {name: _shrunk(part, part, further if part is text else {}).to_dict() for name, part in parts.items()}
    return type(default)(**sizes)


def _small_fields(default: PreTrainedConfig) -> dict[str, Any]:
    default.allow_global_per_layer_attribute_access = True
    aliases = default.attribute_map or {}
    names = set(default.to_dict()) | set(aliases)
    fields: dict[str, Any] = {}
    for name in names & SIZES.keys() - aliases.keys():
        value = getattr(default, name, None)
        if type(value) is int:
            fields[name] = min(SIZES[name], value)
    if "kv_lora_rank" in names:  # multi-head latent attention
        fields.pop("head_dim", None)
        fields["num_key_value_heads"] = HEADS
    lists = {}
    for name in LAYER_LISTS:
        value = getattr(default, name, None)
        if (
            isinstance(value, list | tuple)
            and name not in aliases
            and not isinstance(getattr(type(default), name, None), property)
        ):
            lists[name] = value
    if lists:
        # A layer of every kind, two at least.
        kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
        kinds = (kinds * 2)[: max(2, len(kinds))]
        fields |= {name: [row[i] for row in kinds] for i, name in enumerate(lists)}
        fields["num_hidden_layers"] = len(kinds)
    return fields | {"bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0, "is_decoder": True}


def tokenizer() -> Any:
    """A token for every byte, and some more for almost every id (some families' tokenizers add one); 0 ends a response,
    1 begins a text."""
    tokens = ["<eos>", "<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"w{i}" for i in range(len(tokens), VOCABULARY - 2)]
    raw = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", bos_token="<bos>")


def make_folder(family: str, folder: Path) -> Path:
    """A model folder of the family as its makers would have saved it.

    Raises:
        ValueError: the configuration did not become small.
    """
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(tiny_config(family)).num_parameters()
    if weights > LARGEST:
        raise ValueError(f"its configuration makes {weights:,} weights at least, {LARGEST:,} is the limit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Outcome(NamedTuple):
    works: bool
    told: str
    """Why not."""


PROMPTS = [[2 + (i * j + j) % (VOCABULARY - 6) for j in range(1, 4 + 3 * i)] for i in range(4)]
LIMIT = 8


def check_greedy(model: Any, words: Any) -> None:
    """Greedy responses beside each other are the model's own, each alone; some end early."""
    config = model.generation_config
    stops = {row[:4][-1] for row in _greedy(model, words)[1:3]}  # made stop ids, so that two rows end early
    model.generation_config.eos_token_id = [0, *stops]
    found = _greedy(model, words)
    model.generation_config = config
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, max_new_tokens=LIMIT, eos_token_id=[0, *stops], pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    assert found == expected, f"greedy responses differ from the model's own: {found} {expected}"


def _greedy(model: Any, words: Any) -> list[list[int]]:
    return [g.response_ids for g in generate(model, words, PROMPTS, max_new_tokens=LIMIT, temperature=0)]


def check_training(folder: Path, tuning: str, value_function: str) -> None:
    """Three updates change the weights; saved and loaded, they say the same."""
    model, words = load_policy(folder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    config = replace(RL(), batch_size=4, minibatch_size=4, micro_batch_size=2, warmup_updates=1, learning_rate=1e-2)
    config = replace(config, tuning=tuning, value_function=value_function, precision="fp32", lora_r=2)

    def evens(samples: list[Any]) -> list[list[float]]:
        return [[float(token % 2) for token in sample.response_ids] for sample in samples]

    trainer = TokenPPOTrainer(model, evens, PROMPTS, config, tokenizer=words, max_response_tokens=LIMIT)
    for _ in range(3):
        trainer.step()
    trained, _ = trainer.policy_to_save()
    after = trained.state_dict()
    assert all(weight.isfinite().all() for weight in after.values() if weight.is_floating_point()), "weights not finite"
    assert any(not torch.equal(weight, before[name]) for name, weight in after.items() if name in before), "no change"
    save_model(trained, words, folder.parent / "trained", "")
    again, _ = load_policy(folder.parent / "trained")
    ids = torch.tensor(PROMPTS[-1:])
    with torch.no_grad():
        saved, kept, policy = (m(input_ids=ids).logits for m in (again, trained, trainer.policy.lm))
    far = (saved - kept).abs().max() / kept.std()
    assert far < 1e-4, f"saved and loaded, the model says something else: {far:.1g} standard deviations"
    far = (kept - policy).abs().max() / kept.std()
    assert far < 1e-3, f"merged, the policy says something else: {far:.1g} standard deviations"


def outcome(family: str) -> Outcome | str:
    """What became of the family; a text says why it could not be made."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = make_folder(family, Path(scratch) / "start")
            AutoModelForCausalLM.from_pretrained(folder)(input_ids=torch.tensor([[3, 4, 5]]))
        except Exception as error:  # whatever a family's own code raises
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:120]}"
        try:
            model, words = load_policy(folder)
        except UserError as error:
            return Outcome(False, "refused at load: " + str(error).partition("trained: ")[2].partition(". Take")[0])
        try:
            check_greedy(model, words)
            check_training(folder, "full", "probe")
            shutil.rmtree(folder.parent / "trained")
            check_training(folder, "lora", "shared")
        except UserError as error:
            return Outcome(False, f"UserError: {str(error)[:200]}")
        except Exception as error:  # a fault of ours: the table says so
            return Outcome(False, f"FAULT {type(error).__name__}: {str(error)[:200]}")
    return Outcome(True, "")


def page(found: dict[str, Outcome | str], command: str) -> str:
    """docs/models.md"""
    classes = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    works = [f for f, o in found.items() if isinstance(o, Outcome) and o.works]
    refused = {f: o.told for f, o in found.items() if isinstance(o, Outcome) and not o.works}
    unmade = {f: o for f, o in found.items() if isinstance(o, str)}
    rows = [f"| `{family}` | {classes[family]} | {told.replace('|', '/')} |" for family, told in refused.items()]
    more = [f"| `{family}` | {classes[family]} | {told.replace('|', '/')} |" for family, told in unmade.items()]
    return "\n".join(
        [
            INTRODUCTION,
            f"Made by `{command}`: transformers {transformers.__version__}, peft {peft.__version__}, torch "
            f"{torch.__version__}, Python {platform.python_version()}; one tiny model of each family (seed 0, about "
            "30,000 weights, two layers or one of each kind, windows of 6 tokens), float32.",
            "",
            f"**Works** ({len(works)} of {len(found)}): {', '.join(f'`{family}`' for family in works)}.",
            "",
            f"**Refused** ({len(refused)}):",
            "",
            "| family | class | why |",
            "|---|---|---|",
            *rows,
            "",
            f"**Not tried** ({len(unmade)}): a tiny model could not be made, or does not run by itself.",
            "",
            "| family | class | why |",
            "|---|---|---|",
            *more,
            "",
        ]
    )


INTRODUCTION = """# Start models

Any causal language model that transformers loads is checked when it is loaded, before anything is trained: two short
prompts beside each other, continued token by token with one of them ended early, must get the logits that each gets
alone, and so must a padded batch as training reads it (`tppo.core.causal.check_family`, seven forwards of eight tokens,
or twice as many). A model that does not pass is refused with the reason. So is one with weights missing, with adapters
that are not merged, and with a `generation_config.json` that cannot be read.

- **Padding.** Most families take prompts padded at the left. Some see that padding: positions are counted by column
  (BART and its kin), or a recurrent state reads every token (RWKV). The check finds out; their prompts are
  sampled in batches of one length, and trained with padding at the right only.
- **Stop ids.** A response is ended by the tokenizer's end-of-sequence id and by every id in the start model's
  `generation_config.eos_token_id`. SFT teaches the tokenizer's.
- **Sampling settings.** Nothing else of the start model's `generation_config` is used or kept. Saved folders (SFT, DPO,
  RL) have one that samples in `model.generate()` as tppo does: temperature as trained (RL: `rl.temperature`, else 1),
  no top-k, top-p or penalty, `max_new_tokens` = `task.max_response_tokens`, the same stop ids.
- **LoRA** (`tuning: lora`) puts adapters on every linear layer but the output layer. Fused experts (parameters of three
  dimensions, as in most mixtures of experts) get adapters where PEFT knows the family to have had linear experts
  (Mixtral, Qwen2-MoE and like); elsewhere they stay as they are and the other layers are adapted. Where there is
  nothing to adapt, `tuning: full` is named as the way out. A policy that has adapters already is refused: merge it.
- **Value function.** It reads what the output layer reads, whatever the family makes of its trunk's output before.

## Families tried
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="some families only")
    parser.add_argument("--write", type=Path, help="write the page there")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    found = {}
    for family in arguments.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found[family] = outcome(family)
        print(family, found[family], file=sys.stderr, flush=True)
    if arguments.write:
        arguments.write.write_text(
            page(found, "python benchmarks/families.py --write docs/models.md"), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
