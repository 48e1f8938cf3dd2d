"""Responses in the terminal: every token shows its reward, and nothing of the log reaches a redirected one."""

import io
import json

import pytest
from rich.console import Console

from tppo.rl import loop
from tppo.rl.loop import show_samples, shown_tokens, token_style, train

ROW = {
    "update": 7,
    "prompt": "search: rome\nsearch: rome hotels\nnext searches:\n",
    "response": "rome visa\ncats",
    "tokens": [["rome", 0.5, 2], [" visa", 0.25, 2], ["\n", 0, 0], ["cats", -0.5, 1], ["", 0, 0]],
    "reward": 0.25,
}


def shown(rows, **settings):
    settings = {"force_terminal": True, "width": 200, "_environ": {}} | settings
    console = Console(file=io.StringIO(), **settings)
    show_samples(rows, console)
    return console.file.getvalue()


def test_shades_are_shares_of_the_largest_reward_shown():
    other = ROW | {"tokens": [["dogs", 1.0, 2], ["\x1b[31m", 0.0, 0]]}
    assert [token.shade for token in shown_tokens([ROW])[0]] == [1, 0.5, 0, 1, 0]
    assert [token.shade for token in shown_tokens([ROW, other])[0]] == [0.5, 0.25, 0, 0.5, 0]
    assert [token.text for row in shown_tokens([ROW, other]) for token in row] == [
        *("rome", " visa", "⏎", "cats", "∎"),
        *("dogs", "·[31m"),
    ]
    assert shown_tokens([ROW | {"tokens": [["a", 0.0, 0]]}])[0][0].shade == 0


def test_green_red_and_dim():
    strong, weak, negative, zero = (
        token_style(0.5, 1.0),
        token_style(0.1, 0.2),
        token_style(-0.5, 1.0),
        token_style(0, 0),
    )
    green, pale, red = (style.bgcolor.get_truecolor() for style in (strong, weak, negative))
    assert green.green > green.red
    assert green.red < pale.red < 255
    assert red.red > red.green
    assert negative.underline
    assert not strong.underline
    assert zero.dim
    assert zero.bgcolor is None


def test_with_colour_every_token_has_its_own():
    text = shown([ROW], color_system="truecolor")
    assert "\x1b[30;48;2;46;160;67mrome\x1b[0m" in text
    assert "\x1b[4;30;48;2;218;54;51mcats\x1b[0m" in text
    assert "\x1b[2m⏎\x1b[0m" in text
    assert "(+0.50)" not in text
    assert "update 7" in text
    assert "sum +0.25" in text
    assert "search: rome hotels" in text


@pytest.mark.parametrize("settings", [{"_environ": {"NO_COLOR": "1"}}, {"color_system": None}])
def test_without_colour_numbers_say_it(settings):
    text = shown([ROW], **settings)
    assert "rome(+0.50) visa(+0.25)⏎cats(-0.50)∎  sum +0.25" in text
    assert "48;2" not in text
    assert "(number) behind a token" in text


def test_nothing_is_shown_where_no_terminal_is():
    assert shown([ROW], force_terminal=False) == ""
    assert shown([]) == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_training_shows_the_newest_rollout_on_a_terminal_only(make_trainer, tmp_path, monkeypatch, terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, _environ={"NO_COLOR": "1"})
    monkeypatch.setattr(loop, "console", console)
    train(make_trainer(updates=3, save_every=2), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    text = console.file.getvalue()
    for update in (1, 2, 3):
        assert (f"update {update}, rewards of tokens" in text) == (terminal and update > 1)
    assert (rows[-1]["prompt"] in text) == terminal
