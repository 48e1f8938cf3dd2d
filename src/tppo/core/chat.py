"""A prompt in the model's chat format (`task.prompt: chat`): a user's message between the template's control tokens.

The ids are those that `apply_chat_template` gives for a message that spells no control token, which is checked when the
template is first used; a message that does spell one (`<|im_end|>`) stays text. So nobody renders the message into the
template and tokenises the whole: the control tokens are the template's, everything between them is text
(`tppo.core.encode`). A response ends with what the template puts after the assistant's message, which need not be the
tokenizer's end-of-sequence token: `end_with_turn` makes it that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

from tppo.core.common import UserError
from tppo.core.encode import control_tokens, encode_text, made_once

_USER, _ANSWER = "\ue000user\ue001", "\ue000answer\ue001"
_TRIAL = "search: cheap flights to rome 2024\nsearch: rome hotels\nnext searches:"
_TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""Put before a template that writes the date, so that a prompt is the same whenever it is made. The date is the one
that Llama 3's template takes for want of a clock."""
_WAY_OUT = "use task.prompt=plain, or a model whose template does"


@dataclass(frozen=True)
class ChatFormat:
    """A template as ids and text around one message of the user."""

    head: tuple[int, ...]
    """Ids up to the last control token before the message."""
    before: str
    """Text between that token and the message."""
    after: str
    tail: tuple[int, ...]
    """Ids from the first control token after the message on; the response follows."""
    continues: bool
    """Whether the tokenizer takes the text for the middle of a text rather than its beginning (no space before it)."""
    end: str
    """Token that ends the assistant's message."""

    def encode(self, tokenizer: Any, message: str) -> list[int]:
        """Ids of the prompt with this message; no part of it becomes a control token."""
        text = self.before + message + self.after
        return [*self.head, *(_continued if self.continues else encode_text)(tokenizer, text), *self.tail]


_made: WeakKeyDictionary[Any, tuple[Any, ChatFormat]] = WeakKeyDictionary()


def chat_format(tokenizer: Any) -> ChatFormat:
    """The tokenizer's chat template, taken apart; made once for a tokenizer.

    Raises:
        UserError: there is none, or it cannot be followed token by token.
    """
    state = (len(tokenizer), tokenizer.chat_template, tokenizer.eos_token)
    return made_once(_made, tokenizer, state, _take_apart)


def end_with_turn(tokenizer: Any) -> None:
    """Make the token that ends an assistant's message the tokenizer's end-of-sequence token.

    Raises:
        UserError: as `chat_format`, or the template's own text depends on the end-of-sequence token.
    """
    end, before = chat_format(tokenizer).end, _rendered(tokenizer, _TRIAL)
    # Not by the attribute: only this also makes the token a special one, which decoding leaves out.
    tokenizer.add_special_tokens({"eos_token": end})
    if _rendered(tokenizer, _TRIAL) != before:
        raise UserError(
            f"task.prompt=chat: the chat template writes the end-of-sequence token elsewhere than {end!r}, which ends "
            f"an answer: {_WAY_OUT}"
        )


def _take_apart(tokenizer: Any) -> ChatFormat:
    if not tokenizer.chat_template:
        raise UserError(
            "task.prompt=chat: the tokenizer has no chat template: use task.prompt=plain, or start from a chat "
            "(instruct) model"
        )
    controls = sorted(control_tokens(tokenizer), key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, controls)) or "(?!)")
    start, rest = _around(_rendered(tokenizer, _USER), _USER)
    _, closing = _around(_rendered(tokenizer, _USER, _ANSWER), _ANSWER)
    last = max((match.end() for match in control.finditer(start)), default=0)
    first = match.start() if (match := control.search(rest)) else len(rest)
    head, tail = (_ids(tokenizer, text) for text in (start[:last], rest[first:]))
    end = match.group() if (match := control.search(closing)) else tokenizer.eos_token
    expected = _ids(tokenizer, _rendered(tokenizer, _TRIAL))
    # A control token may take the white space beside it along (AddedToken.rstrip, lstrip).
    for keep_left, keep_right, continues in product((True, False), (True, False), (False, True)):
        before = start[last:] if keep_left else start[last:].lstrip()
        after = rest[:first] if keep_right else rest[:first].rstrip()
        form = ChatFormat(tuple(head), before, after, tuple(tail), continues, end)
        if form.encode(tokenizer, _TRIAL) == expected:
            return form
    raise UserError(f"task.prompt=chat: the chat template does not leave the user's message as it is: {_WAY_OUT}")


def _rendered(tokenizer: Any, message: str, answer: str | None = None) -> str:
    """The template's text for a message: up to the response to come, or with an answer given."""
    messages = [{"role": "user", "content": message}]
    messages += [] if answer is None else [{"role": "assistant", "content": answer}]
    try:
        template = tokenizer.get_chat_template()
        template = _TODAY + template if "strftime_now" in template else template
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=answer is None
        )
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it divides by zero, counts too far, calls itself
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"task.prompt=chat: the chat template does not take a message ({first_line}): {_WAY_OUT}"
        ) from None


def _around(rendered: str, message: str) -> tuple[str, str]:
    """What a rendered template has before and after a message."""
    if (times := rendered.count(message)) != 1:
        raise UserError(f"task.prompt=chat: the chat template writes a message {times} times, not once: {_WAY_OUT}")
    start, _, rest = rendered.partition(message)
    return start, rest


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text of the template, control tokens included."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]) if text else []


def _continued(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text in the middle of a text: those after a line break, where the tokenizer puts no space."""
    line_break, ids = encode_text(tokenizer, "\n"), encode_text(tokenizer, "\n" + text)
    begins_so = ids[: len(line_break)] == line_break
    return ids[len(line_break) :] if begins_so else encode_text(tokenizer, text)
