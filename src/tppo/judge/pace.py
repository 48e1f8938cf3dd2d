"""How fast a judge model is asked, and how much may be spent on it."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import anyio

from tppo.core.common import UserError
from tppo.core.config import JudgeSettings
from tppo.judge.prompts import Question

START_CONCURRENCY = 2.0
TOLERATED_REFUSALS = 0.15
"""Share of refusals in a round that is no reason to ask less."""
CHAT_FORMAT_TOKENS = 64
"""Allowance for the tokens a chat format adds to two messages."""


class AdaptiveLimit:
    """How many questions may be under way (each holds one of `places`), by the server's answers.

    `limit` grows by 1 for every answer until the first refusal (429, 503, or no answer in time): slow start, it doubles
    each round of `limit` answers. Then it grows by 1 each round, and at the round's end is multiplied by 1 - excess/2,
    with excess the share of refusals above `TOLERATED_REFUSALS` (as DCTCP, RFC 8257): a few cost nothing, a server that
    refuses everybody is left alone at once. A question that waits out a refusal keeps its place, so that waiting
    throttles the rest, too.
    """

    def __init__(self, maximum: int) -> None:
        self.maximum = maximum
        self.limit = min(START_CONCURRENCY, maximum)
        self.places = anyio.CapacityLimiter(int(self.limit))
        self._slow_start = True
        self._answers = self._refusals = 0

    def note(self, refused: bool) -> None:
        """Count an answer of the server."""
        self._answers += 1
        self._refusals += refused
        if not refused:
            self.limit += 1.0 if self._slow_start else 1.0 / self.limit
        elif self._slow_start:
            self._slow_start = False
            self._answers = self._refusals = 1
        if self._answers >= self.limit:
            excess = self._refusals / self._answers - TOLERATED_REFUSALS
            self.limit *= 1 - max(excess, 0.0) / 2
            self._answers = self._refusals = 0
        self.limit = min(max(self.limit, 1.0), float(self.maximum))
        self.places.total_tokens = int(self.limit)


class Usage(NamedTuple):
    """Tokens of one request, or of many."""

    prompt_tokens: int
    reply_tokens: int

    def plus(self, other: Usage, times: int = 1) -> Usage:
        return Usage(self.prompt_tokens + times * other.prompt_tokens, self.reply_tokens + times * other.reply_tokens)


class Budget:
    """Tokens and money that may still be spent, enforced before sending.

    What a request can cost at most is set aside before it is sent: a token has at least one byte, so the bytes of
    the messages bound its prompt tokens. When nothing more fits, requests under way are waited for (most cost less
    than was set aside), then `UserError` ends the run.
    """

    def __init__(self, settings: JudgeSettings, spent: tuple[int, int]) -> None:
        self.settings = settings
        self.spent = Usage(*spent)
        self.reserved = Usage(0, 0)
        self._settled = asyncio.Event()

    def estimate(self, question: Question) -> Usage:
        num_bytes = len(question.system.encode()) + len(question.user.encode())
        return Usage(num_bytes + CHAT_FORMAT_TOKENS, self.settings.max_reply_tokens)

    def cost(self, usage: Usage) -> float:
        return (usage.prompt_tokens * self.settings.prompt_price + usage.reply_tokens * self.settings.reply_price) / 1e6

    def _fits(self, estimate: Usage) -> bool:
        total = self.spent.plus(self.reserved).plus(estimate)
        tokens, money = self.settings.token_budget, self.settings.cost_budget
        return (not tokens or sum(total) <= tokens) and (not money or self.cost(total) <= money)

    async def reserve(self, estimate: Usage) -> None:
        while not self._fits(estimate):
            if self.reserved == (0, 0):
                raise UserError(
                    f"the next request might exceed the budget: {sum(self.spent):,} tokens are spent on "
                    f"{self.settings.model} (cost {self.cost(self.spent):.2f}), judge.token_budget="
                    f"{self.settings.token_budget:,}, judge.cost_budget={self.settings.cost_budget}. Every verdict so "
                    "far is kept: raise the budget and give the same command again"
                )
            self._settled.clear()
            await self._settled.wait()
        self.reserved = self.reserved.plus(estimate)

    def settle(self, estimate: Usage, used: Usage) -> None:
        self.reserved = self.reserved.plus(estimate, times=-1)
        self.spent = self.spent.plus(used)
        self._settled.set()
