"""Responses with every token coloured by its reward: in the terminal, and with the same shades in the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.style import Style
from rich.text import Text

SHOWN_PROMPT = 120
"""Characters of a prompt's end that are shown."""
_WHITE, _GREEN, _RED = (255, 255, 255), (46, 160, 67), (218, 54, 51)


class ShownToken(NamedTuple):
    text: str
    """As shown: ⏎ for a line break, ∎ for a token without text, · for what cannot be printed."""
    reward: float
    shade: float
    """Size of the reward, 0 to 1: a share of the largest among the responses shown together."""


def shown_tokens(rows: Sequence[dict[str, Any]]) -> list[list[ShownToken]]:
    """The tokens of rows of samples.jsonl that are shown together."""
    largest = max((abs(reward) for row in rows for _, reward, _ in row["tokens"]), default=0) or 1.0
    return [
        [ShownToken(_visible(text), reward, abs(reward) / largest) for text, reward, _ in row["tokens"]] for row in rows
    ]


def show_samples(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print responses of a rollout (rows of samples.jsonl). Only on a terminal: they hold text of a log's users.

    Without colour (NO_COLOR, a terminal that has none) the reward stands behind each token.
    """
    if not console.is_terminal or not rows:
        return
    coloured = console.color_system is not None and not console.no_color
    legend = Text(f"update {rows[0]['update']}, rewards of tokens (without KL): ")
    if coloured:
        for reward, text in ((1.0, "positive"), (-1.0, "negative"), (0.0, "zero")):
            legend.append(text, token_style(reward, 1.0)).append(", ")
        legend.append("the stronger the larger")
    else:
        legend.append("(number) behind a token, none is zero")
    console.print(legend)
    for row, tokens in zip(rows, shown_tokens(rows), strict=True):
        prompt = row["prompt"].rstrip()
        cut = "…" if len(prompt) > SHOWN_PROMPT else ""
        line = Text("  ").append(cut + _visible(prompt[-SHOWN_PROMPT:]), "dim").append("\n  ")
        for token in tokens:
            line.append(token.text, token_style(token.reward, token.shade) if coloured else "")
            if not coloured and token.reward:
                line.append(f"({token.reward:+.2f})")
        console.print(line.append(f"  sum {row['reward']:+.2f}"), soft_wrap=True)


def token_style(reward: float, shade: float) -> Style:
    """Green for positive, red and underlined for negative, dim for zero; pale for a small shade."""
    if not reward:
        return Style(dim=True)
    mixed = [
        round(white + (full - white) * (0.25 + 0.75 * shade))
        for white, full in zip(_WHITE, _GREEN if reward > 0 else _RED, strict=True)
    ]
    return Style(color="black", bgcolor="#{:02x}{:02x}{:02x}".format(*mixed), underline=reward < 0)


def _visible(text: str) -> str:
    """One line of printable characters: a sampled control character must not reach the terminal."""
    shown = text.replace("\n", "⏎") or "∎"
    return "".join(character if character.isprintable() else "·" for character in shown)
