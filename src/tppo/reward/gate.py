"""The gate between the reward models and RL: thresholds on measurements, a verdict with reasons, the refusal.

Pure but for `require_passed`. A requirement that cannot be told (too few rows, a number that is not defined) is not
met: silence is no pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tppo.config import RL, CheckReward, Recipe
from tppo.errors import UserError
from tppo.progress import console
from tppo.run import RunFolder

Status = Literal["passed", "failed", "cannot be told", "not required"]

TITLES = {"token": "token-level reward model", "sentence": "sentence-level reward model"}
LABELS = {
    "token_auc": "token AUC",
    "sentence_auc": "sentence AUC",
    "token_ece": "calibration error of words (ECE)",
    "sentence_ece": "calibration error of responses (ECE)",
    "length": "rank correlation with length, distance from the labels'",
    "shuffled": "real above another user's queries",
    "noise": "real above random words",
    "repeated": "real above one word repeated",
    "copied": "real above a copied history",
}
_MOST = 2.0  # no calibration error and no distance of correlations is larger


@dataclass(frozen=True)
class Evidence:
    """What a requirement is judged by: the number, its interval, and how much data it rests on."""

    value: float | None
    responses: int
    smallest_class: int | None = None
    """Rows of the rarer label, where the number needs both; else None."""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Check:
    """A requirement and how a reward model stands to it."""

    model: str
    name: str
    value: float | None
    low: float | None
    high: float | None
    setting: str
    limit: float
    status: Status
    reason: str | None
    """Why it is not met; None when it is, or when nothing is required."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "label": LABELS[self.name]}


def required(model: str, settings: CheckReward) -> dict[str, tuple[str, float]]:
    """Requirements on a reward model: name of the measurement -> setting and its limit."""
    names = {
        "token_auc": "min_token_auc",
        "sentence_auc": "min_sentence_auc",
        "token_ece": "max_ece",
        "sentence_ece": "max_ece",
        "length": "max_length_correlation",
        "shuffled": "min_real_over_shuffled",
        "noise": "min_real_over_noise",
        "repeated": "min_real_over_repeated",
        "copied": "min_real_over_copied",
    }
    # Each model is held to the calibration of what it pays with: words here, responses there.
    skipped = {"token": ("sentence_ece",), "sentence": ("token_auc", "token_ece")}[model]
    return {name: (setting, getattr(settings, setting)) for name, setting in names.items() if name not in skipped}


def assess(model: str, evidence: dict[str, Evidence], settings: CheckReward) -> list[Check]:
    """Hold the measurements of a reward model against its requirements.

    Args:
        evidence: one entry per name of `required`.
    """
    checks = []
    for name, (setting, limit) in required(model, settings).items():
        found = evidence[name]
        status, reason = _judge(found, setting, limit, settings)
        text = f"{LABELS[name]}: {reason}" if reason else None
        checks.append(Check(model, name, found.value, found.low, found.high, setting, limit, status, text))
    return checks


def _judge(found: Evidence, setting: str, limit: float, settings: CheckReward) -> tuple[Status, str | None]:
    at_least = setting.startswith("min_")
    if limit <= 0 if at_least else limit >= _MOST:
        return "not required", None
    few = found.responses < settings.min_responses
    if few or (found.smallest_class is not None and found.smallest_class < settings.min_class_count):
        rarer = "" if found.smallest_class is None else f", {found.smallest_class} rows of the rarer label"
        return "cannot be told", (
            f"cannot be told from {found.responses} held-out responses{rarer} "
            f"(check_reward.min_responses={settings.min_responses}, min_class_count={settings.min_class_count})"
        )
    if found.value is None:
        return "cannot be told", "not defined, since all its rewards (or all lengths, or all labels) are equal"
    if found.value >= limit if at_least else found.value <= limit:
        return "passed", None
    asked = "at least" if at_least else "at most"
    return "failed", f"{found.value:.3f}, and check_reward.{setting} asks for {asked} {limit:g}"


def reasons(checks: Sequence[Check]) -> list[str]:
    """Why the gate is closed; empty when it is open."""
    return [check.reason for check in checks if check.reason]


def paying_model(config: RL) -> str:
    """The reward model that pays `config.algorithm`, so whose failure refuses it."""
    return "sentence" if config.algorithm == "ppo" and config.sentence_reward == "rival" else "token"


def require_passed(recipe: Recipe, run: RunFolder, config: RL) -> dict[str, Any]:
    """The verdict on the reward model that pays `config.algorithm`: {model, passed, reasons}.

    Raises:
        UserError: the check has not been made, was made of another reward stage, or failed and
            `check_reward.allow_failed` does not let RL start all the same.
    """
    folder = run.require_current("check_reward")
    model = paying_model(config)
    why = run.facts("check_reward")["reasons"][model]
    verdict = {"model": model, "passed": not why, "reasons": why}
    if not why:
        return verdict
    told = f"the {TITLES[model]}, which pays {config.algorithm}, did not pass its check:\n  - " + "\n  - ".join(why)
    if recipe.check_reward.allow_failed:
        console.print(f"check_reward.allow_failed: RL starts although {told}", markup=False)
        return verdict
    raise UserError(
        f"{told}\nAll numbers: {folder / 'README.md'}. Make a better reward model (more labels: sample.train_examples; "
        "longer: reward.epochs; another reward.encoder or reward.rubric), hold out more rows where it cannot be told "
        "(sample.reward_eval_examples), or lower the named threshold and give `--redo check_reward`. "
        "`--check_reward.allow_failed true` starts RL all the same"
    )
