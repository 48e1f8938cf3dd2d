"""A language model as the judge: questions, the ledger in front of the server, verdicts.

`LLMJudge.judge` fills the same record as the offline judge. Requests that the ledger knows are answered from it;
the rest are asked (`tppo.judge.transport`). An abstention stays one; a question whose transport failed stops the
stage at the end, with everything else kept, so that labels never silently lack rows.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tppo.config import LLMJudge as Settings
from tppo.config import Rubric, judge_identity
from tppo.errors import UserError
from tppo.judge.ledger import JudgeLedger, Outcome
from tppo.judge.record import JUDGE_FILE, JudgeItem, Verdict, WordVerdict, split_response
from tppo.judge.templates import TEMPLATE_VERSION, Question, judge_question
from tppo.judge.transport import Asker, Tally
from tppo.progress import console, progress_bar
from tppo.run import cache_dir, write_json

_SECONDS_BETWEEN_LINES = 30.0  # without a terminal


class LLMJudge:
    """Implements `tppo.judge.record.Judge`.

    Raises:
        UserError: a setting is missing, or the endpoint is not on this machine and `allow_remote` is false.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.api_key = _checked_endpoint(settings)
        self.rubrics = tuple(settings.rubrics)
        self.name = f"llm/{settings.model}/{settings.template}-v{TEMPLATE_VERSION}"
        self.with_probability = settings.score == "probability"
        if self.with_probability:
            self.name += "-probability"
        self.ledger_path = ledger_path(settings)

    def judge(self, items: Sequence[JudgeItem], rubric: Rubric, description: str | None = None) -> list[Verdict]:
        """One verdict per item, in order. A response without any word is irrelevant, and nobody is asked.

        Raises:
            UserError: the server refused for good, could not be reached for some items, or the budget is used up.
        """
        questions = [judge_question(item, rubric, self.settings.template, self.with_probability) for item in items]
        asked = [bool(split_response(item.response).words) for item in items]
        outcomes = self.answers([q for q, ask in zip(questions, asked, strict=True) if ask], description)
        waiting = iter(outcomes)
        return [
            _verdict(next(waiting), question) if ask else Verdict([], 0.0, False, "ok", None)
            for question, ask in zip(questions, asked, strict=True)
        ]

    def answers(self, questions: Sequence[Question], description: str | None = None) -> list[Outcome]:
        """Outcome of every question, in order: from the ledger where it is finished, else from the server.

        The server is asked in the order of the texts: those that begin alike come in a row, so that a server that keeps
        what it computed for a common beginning reads a history once, not once for each answer to it.
        """
        by_key = {question.key(self.settings.model): question for question in questions}
        with JudgeLedger(self.ledger_path) as ledger:
            known = ledger.outcomes(by_key)
            missing = [(key, question) for key, question in by_key.items() if key not in known]
            missing.sort(key=lambda entry: (entry[1].system, entry[1].user))
            if missing:
                with _progress(description or "judging", len(missing), len(known)) as show:
                    asyncio.run(Asker(self.settings, ledger, self.api_key, show).ask(missing))
                known |= ledger.outcomes(key for key, _ in missing)
        failed = len(by_key.keys() - known.keys())
        if failed:
            raise UserError(
                f"{failed} of {len(by_key)} questions could not be brought to {self.settings.base_url} (reasons: "
                f"`tppo ledger --judge.ledger {self.ledger_path}`). The others are kept: the same command asks only "
                "for the missing ones"
            )
        return [known[question.key(self.settings.model)] for question in questions]

    def save(self, folder: Path) -> None:
        """Write judge.json: the settings that the verdicts depend on, not where the server is."""
        write_json(folder / JUDGE_FILE, {"kind": "llm", "judge": self.name, "settings": judge_identity(self.settings)})


def ledger_path(settings: Settings) -> Path:
    """The ledger of `judge.ledger`, or the one in the cache folder."""
    return Path(settings.ledger) if settings.ledger else cache_dir() / "judge.sqlite"


def _verdict(outcome: Outcome, question: Question) -> Verdict:
    if outcome.verdict is None:
        return Verdict(None, 0.0, False, "abstained", outcome.problem)
    sentence = outcome.verdict["sentence"]
    score = outcome.verdict["probability"] if question.with_probability else sentence
    words = None
    if question.template == "token":
        words = [WordVerdict(float(word["score"]), word["score"] == 1) for word in outcome.verdict["words"]]
    return Verdict(words, float(score), sentence == 1, "ok", None)


def _checked_endpoint(settings: Settings) -> str:
    """The API key to use, after every setting of the endpoint has been checked."""
    if not settings.model:
        raise UserError("judge.model is empty: name the model as the server at judge.base_url knows it")
    if not settings.rubrics:
        raise UserError("judge.rubrics is empty: name targets, history or both")
    for name in ("reply_attempts", "transport_attempts", "max_concurrency", "max_reply_tokens", "timeout"):
        if getattr(settings, name) <= 0:
            raise UserError(f"judge.{name}={getattr(settings, name)} has to be positive")
    if settings.cost_budget and not settings.prompt_price + settings.reply_price:
        raise UserError("judge.cost_budget needs judge.prompt_price and judge.reply_price")
    url = urlsplit(settings.base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(f"judge.base_url={settings.base_url!r} is no http(s) address such as http://127.0.0.1:8000/v1")
    local = _is_loopback(url.hostname)
    if not local and not settings.allow_remote:
        raise UserError(
            f"judge.base_url sends users' log data to {url.hostname}, which is not this machine: give "
            "--judge.allow_remote true if that is allowed"
        )
    key = os.environ.get(settings.api_key_env, "")
    if not key and not local:
        raise UserError(f"{url.hostname} needs an API key: put it into the environment variable {settings.api_key_env}")
    return key or "none"  # the client library insists on one


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def _progress(description: str, total: int, known: int) -> Iterator[Any]:
    """Progress of the questions: rate, abstentions, tokens, problems, time left."""
    if known:
        console.print(f"{description}: {known} verdicts from the ledger, {total} to ask")
    start = last_line = time.monotonic()
    with progress_bar(note=True) as bar:
        task = bar.add_task(description, total=total, note="")

        def show(tally: Tally) -> None:
            nonlocal last_line
            now = time.monotonic()
            rate = tally.done / max(now - start, 1e-9)
            problems = " ".join(f"{name} {count}" for name, count in sorted(tally.problems.items()))
            note = (
                f"{rate:.2f}/s, {tally.under_way} under way, {tally.abstained} abstained, {tally.failed} failed, "
                f"{tally.tokens:,} tokens{f' ({problems})' if problems else ''}"
            )
            bar.update(task, completed=tally.done, note=note)
            if not console.is_terminal and (now - last_line > _SECONDS_BETWEEN_LINES or tally.done == total):
                last_line = now
                left = (total - tally.done) / rate if rate else float("inf")
                console.print(f"{description}: {tally.done}/{total}, {note}, {left:.0f} s left", soft_wrap=True)

        yield show
