"""Which judge a stage uses: made anew (`make_judge`) or as the label stage saved it (`saved_judge`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tppo.config import JudgeKind, Recipe, judge_identity
from tppo.errors import UserError
from tppo.judge.llm import LLMJudge
from tppo.judge.record import JUDGE_FILE, Judge
from tppo.seeding import rng
from tppo.tables import Example


def make_judge(kind: JudgeKind, recipe: Recipe, examples: list[Example]) -> tuple[Judge, dict[str, Any]]:
    """A judge ready to use, and facts about how it was made.

    Args:
        examples: all examples of the run; the embedding judge is calibrated on those of training users.
    """
    if kind == "llm":
        return LLMJudge(recipe.judge), {"settings": judge_identity(recipe.judge)}
    from tppo.judge.embedding import EmbeddingJudge  # here: an LLM judge need not wait for torch to load

    settings = recipe.label
    judge = EmbeddingJudge(
        settings.encoder, {}, repeats_irrelevant=settings.repeats_irrelevant, batch_size=settings.batch_size
    )
    train = draw_examples([e for e in examples if e.split == "train"], settings.calibration_examples, recipe.data_seed)
    thresholds = judge.calibrate(train, settings.null_quantile, recipe.data_seed, "calibrating the judge")
    return judge, {"thresholds": thresholds}


def saved_judge(label_folder: Path, recipe: Recipe) -> Judge:
    """The judge of a finished label stage.

    Raises:
        UserError: no judge.json, or the judge it describes is not to be had any more.
    """
    path = label_folder / JUDGE_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        kind = saved.get("kind", "embedding")
    except (OSError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no saved judge ({error!r}): run `tppo label` first") from None
    if kind == "embedding":
        from tppo.judge.embedding import EmbeddingJudge

        return EmbeddingJudge.load(saved, path)
    if kind == "llm":
        if saved.get("settings") != judge_identity(recipe.judge):
            raise UserError(f"{path} was made with other settings of section `judge`: give `--redo label`")
        return LLMJudge(recipe.judge)
    raise UserError(f"{path} names a judge of kind {kind!r}; this version knows embedding and llm")


def draw_examples(examples: list[Example], count: int, seed: int) -> list[Example]:
    """`count` examples (all when there are fewer) drawn with the seed."""
    if len(examples) <= count:
        return examples
    chosen = rng(seed, "label").choice(len(examples), size=count, replace=False)
    return [examples[i] for i in chosen]
