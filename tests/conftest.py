"""Shared fixtures: a tiny random policy (two Llama layers, byte-level BPE) and small prepared examples."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tppo.core.config import Recipe, Scratch, Task
from tppo.core.run import RunFolder, run_stage
from tppo.core.tables import EXAMPLES, Example, write_table
from tppo.core.text import Event, render_prompt, render_response
from tppo.core.web import listen, server_of
from tppo.tune.scratch import llama_config, make_policy, train_tokenizer

TOPICS = {
    "garden": ["tomato seeds", "raised bed plans", "compost bin", "rose pruning", "drip hose", "garden shed"],
    "travel": [
        "cheap flights rome",
        "rome hotels",
        "vatican tickets",
        "italy rail pass",
        "travel adapter",
        "visa",
    ],
    "cars": [
        "used pickup trucks",
        "brake pads cost",
        "tire pressure chart",
        "oil filter",
        "car loan rates",
        "dents",
    ],
    "music": [
        "guitar chords",
        "bass strings",
        "piano lessons",
        "drum kit",
        "vinyl records",
        "concert tickets",
    ],
}


def make_examples(count: int, split: str = "train", first_user: int = 0) -> list[Example]:
    """Made-up examples, one user each: three searches and a click of a topic, then its other searches."""
    examples = []
    for i in range(count):
        user = first_user + i
        queries = TOPICS[list(TOPICS)[user % len(TOPICS)]]
        queries = queries[user % 3 :] + queries[: user % 3]
        history = [Event("search", query) for query in queries[:3]]
        history.insert(2, Event("click", f"{queries[1]} online"))
        examples.append(Example(f"e{user}", f"u{user}", split, history, queries[3:], datetime(2020, 1, 1 + user % 28)))
    return examples


def make_tokenizer(vocab_size: int = 400) -> Any:
    """A byte-level BPE tokenizer trained on the made-up queries; its end-of-sequence token also pads."""
    return train_tokenizer(
        (render_prompt(e.history, 3) + render_response(e.targets) for e in make_examples(12)), vocab_size
    )


TINY = Scratch(hidden_size=48, intermediate_size=96, layers=2, heads=4)


def make_model(vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, random weights large enough for a distribution that is far from uniform."""
    return make_policy(llama_config(TINY, vocab_size, 512, num_key_value_heads=2, initializer_range=0.3), seed)


@pytest.fixture(scope="session")
def example_factory() -> Callable[..., list[Example]]:
    """`make_examples(count, split="train", first_user=0)`."""
    return make_examples


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def tiny_model(tiny_tokenizer: Any) -> LlamaForCausalLM:
    return make_model(len(tiny_tokenizer))


@pytest.fixture(scope="session")
def prepared_recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """A function: recipe of a new run folder whose prepare stage is done, on made-up examples."""

    def make(train: int = 24, reward_eval: int = 8, task: Task | None = None) -> Recipe:
        recipe = Recipe(run_dir=str(tmp_path_factory.mktemp("run")), task=task or Task())
        recipe.prepare.source = ["made-up.tsv"]
        recipe.parts.disjoint = False  # two dozen users are too few to share among the stages
        examples = make_examples(train) + make_examples(reward_eval, "reward_eval", 1000)

        def write(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
            write_table(folder / "examples.parquet", [asdict(example) for example in examples], EXAMPLES)
            return {}

        run_stage(recipe, "prepare", write)
        return recipe

    return make


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that `tppo.core.models.load_policy` loads; made once, do not write into it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-policy"
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def _running(app: Any) -> Iterator[str]:
    listener = listen("127.0.0.1", 0)
    server = server_of(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)
    listener.close()


@pytest.fixture(scope="session")
def running() -> Callable[[Any], Any]:
    """A function: context manager around a real uvicorn on a free port that serves an app; yields its URL."""
    return _running
