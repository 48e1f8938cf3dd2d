"""Seconds per PPO update: tppo against TRL 1.9.0's PPOTrainer (the last TRL with PPO), side by side in one run.

    python benchmarks/rl_speed.py --output rl_speed.json
    python benchmarks/rl_speed.py --growth_batch 16 32 64 --growth_length 12 24 48 --growth_layers 6 12 24 --rounds 0

The work: a 12-layer cut of SmolLM2-135M, 32 prompts of 100 tokens, 24 new tokens, one PPO epoch, one optimiser step;
KL coefficient, GAE, clip ranges, whitening, k1 in the reward, one linear value head on the policy's last hidden state
alike. Rewards cost nothing on either side. Four contestants take turns, each time in a process of its own:

    tppo, ppo    ours: float32 weights under bf16 autocast, rollouts in bf16; token rewards, or one at the end
    trl fp32     TRL with float32 weights and products
    trl bf16     TRL with bf16 weights (which at a learning rate of 5e-6 mostly round their updates away)

The first update of a process is a warm-up and is left out. TRL lives in a virtual environment of its own, which this
script makes. The share of the GEMM peak is FLOPs of the update (`update_flops`) / seconds_update / best bf16 GEMM
measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tppo.core.show import Table

KL_COEF, LEARNING_RATE = 0.05, 5e-6
TRL = ("torch==2.13.0", "trl==1.9.0", "transformers==5.23.0")
CONTESTANTS = ("tppo", "trl fp32", "ppo", "trl bf16")
EOS, PAD, FIRST_WORD = 0, 1, 2


@dataclass(frozen=True)
class Work:
    """Sizes of the model (SmolLM2-135M's, but for the layers) and of an update."""

    layers: int = 12
    hidden: int = 576
    intermediate: int = 1536
    heads: int = 9
    kv_heads: int = 3
    vocabulary: int = 49152
    batch: int = 32
    micro_batch: int = 16
    prompt_tokens: int = 100
    new_tokens: int = 24


def update_flops(work: Work) -> float:
    """Floating-point operations of one PPO epoch over a batch, forward and backward, 2 per multiply-add.

    Forward, with N = batch x (prompt + new) tokens, S = prompt + new, D hidden, F intermediate, H heads, K key-value
    heads:

        layers x [ 2 N (2 D D + 2 D D K/H + 3 D F)  projections and MLP
                 + batch x 4 D S (S + 1) / 2 ]      scores and their use, causal half only
        + 2 batch (new + 1) D vocabulary            logits, at the positions that are needed

    Backward costs twice the forward. Embedding look-ups, norms, softmax, the value head and the optimiser are left
    out, as is work an implementation does beyond this (logits of the prompt, recomputation).
    """
    d, tokens = work.hidden, work.prompt_tokens + work.new_tokens
    per_token = 2 * d * d + 2 * d * d * work.kv_heads / work.heads + 3 * d * work.intermediate
    layer = 2 * work.batch * tokens * per_token + work.batch * 4 * d * tokens * (tokens + 1) / 2
    logits = 2 * work.batch * (work.new_tokens + 1) * d * work.vocabulary
    return 3 * (work.layers * layer + logits)


def write_inputs(work: Work, weights: str, folder: Path, seed: int) -> None:
    """The model folder and prompts.json that both sides read."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    if weights == "cut":
        from tppo.core.models import load_policy

        model, tokenizer = load_policy("smollm2")
        model.model.layers = model.model.layers[: work.layers]
        model.config.num_hidden_layers = work.layers
    else:
        words = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(FIRST_WORD, work.vocabulary)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), eos_token="<eos>", pad_token="<pad>"
        )
        config = LlamaConfig(
            vocab_size=work.vocabulary,
            hidden_size=work.hidden,
            intermediate_size=work.intermediate,
            num_hidden_layers=work.layers,
            num_attention_heads=work.heads,
            num_key_value_heads=work.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        model = LlamaForCausalLM(config)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    special = set(tokenizer.all_special_ids)
    ids = torch.randint(0, work.vocabulary, (work.batch, work.prompt_tokens)).tolist()
    prompts = [[token if token not in special else FIRST_WORD + 98 for token in row] for row in ids]
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")


def build_trainer(folder: Path, work: Work, algorithm: str, seed: int) -> Any:
    """Our trainer on this work. The only place that knows its constructor and its reward function's form."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tppo.core.config import RL
    from tppo.rl.trainer import TokenPPOTrainer

    def parity(samples: Any) -> Any:
        """tppo: 1 for every odd token; ppo: 1 for an odd last token, as on TRL's side."""
        if algorithm == "ppo":
            return [float(sample.response_ids[-1] % 2) for sample in samples]
        return [[float(token % 2) for token in sample.response_ids] for sample in samples]

    config = RL(
        batch_size=work.batch,
        minibatch_size=work.batch,
        micro_batch_size=work.micro_batch,
        ppo_epochs=1,
        learning_rate=LEARNING_RATE,
        warmup_updates=1,
        kl_coef=KL_COEF,
        clip_range=0.2,
        value_clip_range=0.2,
        value_coef=0.1,
        gamma=1.0,
        gae_lambda=0.95,
        whiten_advantages=True,
        temperature=1.0,
        precision="bf16",
    )
    # Not by `load_policy`, which refuses a tokenizer that writes no queries: the random one knows no text.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TokenPPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval(),
        parity,
        json.loads((folder / "prompts.json").read_text(encoding="utf-8")),
        config,
        tokenizer=tokenizer,
        max_response_tokens=work.new_tokens,
        seed=seed,
    )


def gemm_peak(work: Work, seconds: float = 1.0) -> dict[str, float]:
    """Best floating-point operations per second of a matrix product, by dtype: square ones and the MLP's own."""
    import torch

    shapes = [(n, n, n) for n in (1024, 2048, 4096)]
    shapes.append((work.micro_batch * (work.prompt_tokens + work.new_tokens), work.hidden, work.intermediate))
    best = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        rates = []
        for m, k, n in shapes:
            a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
            deadline = time.perf_counter() + seconds
            while not rates or time.perf_counter() < deadline:
                start = time.perf_counter()
                a @ b
                rates.append(2 * m * k * n / (time.perf_counter() - start))
        best[name] = max(rates)
    return best


def run_ours(folder: Path, work: Work, algorithm: str, updates: int, seed: int, probe_seconds: float) -> dict[str, Any]:
    """Updates of our trainer in this process."""
    import torch

    peak = gemm_peak(work, probe_seconds)
    trainer = build_trainer(folder, work, algorithm, seed)
    rows = [trainer.step().metrics for _ in range(updates)]
    return {
        "seconds": [row["seconds"] for row in rows],
        "parts": {name: [row[name] for row in rows] for name in rows[0] if name.startswith("seconds_")},
        "response_length": statistics.fmean(row["response_length"] for row in rows),
        "kl": [row["kl"] for row in rows],
        "gemm_peak": peak,
        "threads": torch.get_num_threads(),
    }


def trl_python(folder: Path) -> Path:
    """The interpreter of TRL's environment, which is made when it is not there. torch first: it is a CPU build then."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for requirement in (TRL[:1], TRL[1:]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *requirement], check=True)
    return python


def last_json(command: list[Any]) -> dict[str, Any]:
    """Run a contestant and read the JSON on its last line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def compete(contestant: str, work: Work, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One turn of one contestant, without its warm-up update."""
    flags = ["--updates", arguments.updates + 1, "--seed", arguments.seed]
    if contestant.startswith("trl"):
        command = [trl_python(arguments.trl_venv), Path(__file__).with_name("rl_speed_trl.py"), *flags]
        command += ["--model", folder, "--prompts", folder / "prompts.json", "--dtype", contestant.split()[1]]
        command += ["--batch", work.batch, "--micro_batch", work.micro_batch, "--new_tokens", work.new_tokens]
        command += ["--kl_coef", KL_COEF, "--learning_rate", LEARNING_RATE]
    else:
        command = [sys.executable, __file__, *flags, "--side", contestant, "--folder", folder]
        command += ["--probe_seconds", arguments.probe_seconds, "--work", json.dumps(asdict(work))]
    result = last_json(command)
    result["seconds"] = result["seconds"][1:]
    result["parts"] = {name: values[1:] for name, values in result.get("parts", {}).items()}
    return result


def spread(values: list[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def merged(turns: list[dict[str, Any]], work: Work) -> dict[str, Any]:
    """All turns of one contestant: seconds of every update, and for ours the parts and the share of the peak."""
    result: dict[str, Any] = {"seconds": [value for turn in turns for value in turn["seconds"]], "turns": turns}
    if turns[0]["parts"]:
        result["parts"] = {
            name: [value for turn in turns for value in turn["parts"][name]] for name in turns[0]["parts"]
        }
        result["share_of_peak"] = [
            update_flops(work) / value / turn["gemm_peak"]["bf16"]
            for turn in turns
            for value in turn["parts"]["seconds_update"]
        ]
    return result


def show(title: str, results: dict[str, dict[str, Any]]) -> None:
    """Median and range over all measured updates."""
    parts = next(iter(result["parts"] for result in results.values() if "parts" in result), {})
    rows = []
    for name, result in results.items():
        cells = [spread(result["parts"][part]) if "parts" in result else "" for part in parts]
        share = spread([100 * value for value in result["share_of_peak"]], 1) if "parts" in result else ""
        rows.append([name, str(len(result["seconds"])), spread(result["seconds"]), *cells, share])
    names = [name.removeprefix("seconds_") for name in parts]
    print(Table(("", "updates", "s / update", *names, "% of bf16 GEMM peak"), rows, title=title).markdown())


def race(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    """Alternating rounds of all contestants."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory() as name:
        write_inputs(work, arguments.weights, Path(name), arguments.seed)
        for _ in range(arguments.rounds):
            for contestant in CONTESTANTS:
                turns[contestant].append(compete(contestant, work, Path(name), arguments))
    results = {name: merged(found, work) for name, found in turns.items()}
    show(f"{work}, {arguments.weights} weights, {arguments.rounds} rounds of {arguments.updates} updates", results)
    middle = {name: statistics.median(result["seconds"]) for name, result in results.items()}
    ratios = {
        "trl fp32 / tppo": middle["trl fp32"] / middle["tppo"],
        "trl bf16 / tppo": middle["trl bf16"] / middle["tppo"],
        "tppo / ppo": middle["tppo"] / middle["ppo"],
    }
    first = turns["tppo"][0]
    print(f"ratios of medians: {', '.join(f'{name} {value:.2f}' for name, value in ratios.items())}")
    print(
        f"update: {update_flops(work) / 1e9:.0f} GFLOP; GEMM peak bf16 {first['gemm_peak']['bf16'] / 1e9:.0f}, "
        f"fp32 {first['gemm_peak']['fp32'] / 1e9:.0f} GFLOP/s; threads {first['threads']}; response length "
        f"{first['response_length']:.1f}; TRL {turns['trl fp32'][0]['versions']}"
    )
    return {"results": results, "ratios": ratios, "update_flops": update_flops(work)}


def growth(work: Work, arguments: argparse.Namespace) -> dict[str, Any]:
    """Our trainer alone at other sizes, one at a time."""
    results = {}
    for field, values in (
        ("batch", arguments.growth_batch),
        ("new_tokens", arguments.growth_length),
        ("layers", arguments.growth_layers),
    ):
        for value in values:
            changed = replace(work, **{field: value})
            changed = replace(changed, micro_batch=min(changed.micro_batch, changed.batch))
            with tempfile.TemporaryDirectory() as name:
                write_inputs(changed, arguments.weights, Path(name), arguments.seed)
                results[f"{field} {value}"] = merged([compete("tppo", changed, Path(name), arguments)], changed)
    if results:
        show(f"growth from {work}", results)
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Work()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--weights", choices=["random", "cut"], default="random", help="cut: SmolLM2-135M's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="measured updates of a turn, beside its warm-up")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--probe_seconds", type=float, default=1.0, help="of GEMM probing per shape and dtype")
    parser.add_argument("--growth_batch", type=int, nargs="*", default=[])
    parser.add_argument("--growth_length", type=int, nargs="*", default=[], help="new tokens")
    parser.add_argument("--growth_layers", type=int, nargs="*", default=[])
    parser.add_argument("--trl_venv", type=Path, default=Path(".venv-trl"), help="made when it is not there")
    parser.add_argument("--output", type=Path, help="write every measured second as JSON")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.side:
        work = Work(**arguments.work)
        result = run_ours(
            arguments.folder, work, arguments.side, arguments.updates, arguments.seed, arguments.probe_seconds
        )
        print(json.dumps(result))
        return
    work = Work(**{name: getattr(arguments, name) for name in asdict(Work())})
    measured = {"work": asdict(work)}
    if arguments.rounds:
        measured |= race(work, arguments)
    measured["growth"] = growth(work, arguments)
    if arguments.output:
        arguments.output.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
