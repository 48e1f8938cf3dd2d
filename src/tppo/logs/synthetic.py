"""Stage `synthetic`: a made-up interaction log, seeded, so that everything runs without anybody's data.

Each user has one to three interests, favourite things and habits of refining within them. They search in missions of
four to seven queries: a mission starts somewhere in a topic, then adds a refinement, swaps it, goes on to the next
question about the same thing, or asks the same about another thing. Searches lead to clicks (a page title or a URL),
visits and purchases. So the next queries follow from the history in topic, thing and habit, but are not determined
by it.

As in a real log there is noise: repeats, typos, site names instead of searches, personal data (fake: reserved
telephone numbers, test card numbers, example domains), rows that cannot be read, and users with hardly any event.

A user depends on the seed and the user's number only: a log of more users begins with the log of fewer.

Since the log is made, it is known what a user may search next: `user_queries` and `relevant_words` are the true
relevance that no judge is needed for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml

from tppo.core.common import UserError, track
from tppo.core.config import Recipe, Synthetic
from tppo.core.run import RunFolder
from tppo.core.words import split_words

HEADER = ("user_id", "time", "kind", "text")
START = datetime(2026, 1, 5)
DAYS = 90
EVENTS_PER_USER = 60
"""Mean number of events of a user: a history and several windows for each. For a larger log ask for more users."""
_Event = tuple[str, str]
"""Kind and text."""
_NAVIGATIONAL = ["google", "yahoo mail", "ebay", "www.facebook.com", "youtube.com", "mapquest", "weather"]
_PERSONAL = [
    "email jane.doe@mail.example",
    "who called from 212-555-0147",
    "card 4111 1111 1111 1111 declined",
    "ssn 078-05-1120",
    "track parcel 99999000012345",
]
_NOISE = {"repeat": 0.05, "return": 0.05, "navigational": 0.04, "typo": 0.02, "personal": 0.004, "unreadable": 0.004}
"""Share of searches that are preceded by one of these."""


class Topic(NamedTuple):
    """A topic of topics.yaml. In a text, {} is the thing (in a refinement: the query so far)."""

    things: list[str]
    questions: list[str]
    """In order: a mission tends to go on to the next."""
    refinements: list[str]
    sites: list[str]
    product: str


TOPICS = {
    name: Topic(**fields)
    for name, fields in yaml.safe_load((Path(__file__).parent / "topics.yaml").read_text(encoding="utf-8")).items()
}


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Write log.tsv (header user_id, time, kind, text; users one after the other)."""
    rows = write_log(recipe.synthetic, recipe.seed, folder / "log.tsv")
    return {"rows": rows, "users": recipe.synthetic.users, "topics": recipe.synthetic.topics}


def write_log(config: Synthetic, seed: int, path: Path) -> int:
    """Write the log as TSV; returns the number of rows after the header."""
    rows = 0
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(HEADER) + "\n")
        for row in generate_rows(config, seed):
            file.write("\t".join(row) + "\n")
            rows += 1
    temporary.replace(path)
    return rows


def generate_rows(config: Synthetic, seed: int) -> Iterator[tuple[str, ...]]:
    """Rows (user_id, time, kind, text) of all users, streaming; a few are broken on purpose."""
    if config.users < 1:
        raise UserError(f"synthetic.users={config.users} must be at least 1")
    if not 1 <= config.topics <= len(TOPICS):
        raise UserError(f"synthetic.topics={config.topics} must be between 1 and {len(TOPICS)}")
    for user in track(range(config.users), "synthetic users"):
        yield from user_rows(user, config, seed)


def user_rows(user: int, config: Synthetic, seed: int) -> list[tuple[str, ...]]:
    """Rows of one user, oldest first."""
    random = _user_random(user, seed)
    left, interests = _draw_user(random, config)
    missions: list[list[_Event]] = []
    searched: list[str] = []
    interest = interests[0]
    while left > 0:
        if random.random() < 0.4:
            interest = random.choice(interests)
        missions.append(_mission(random, interest, searched)[:left])
        left -= len(missions[-1])
    events = zip(chain.from_iterable(missions), _times(random, missions), strict=True)
    return [_row(random, user_name(user), time, kind, text) for (kind, text), time in events]


def user_name(user: int) -> str:
    """The user id in the log."""
    return f"user{user:06d}"


def user_queries(user: int, config: Synthetic, seed: int) -> list[tuple[str, ...]]:
    """Every search about their interests that a user can make, as words, sorted.

    Known from how the log is made, not from the log: a question of the interest about one of the user's own things, as
    it is or refined in one of the user's own ways. Typos, site names and personal data are noise and not among them.
    """
    interests = _draw_user(_user_random(user, seed), config)[1]
    return sorted(
        {
            tuple(split_words(refinement.format(question.format(thing))))
            for interest in interests
            for question in interest.topic.questions
            for thing in interest.things
            for refinement in ("{}", *interest.habits)
        }
    )


def relevant_words(query: Sequence[str], possible: Sequence[tuple[str, ...]]) -> list[bool]:
    """Which words (lower case) of a query its user could have written in it.

    A query is read as the one of the user's possible queries that it shares the most words with (the shortest of
    those), and the shared words are relevant, each as often as it stands there. So it does not pay to mix what belongs
    to several queries, nor to say a word again.
    """
    written = Counter(query)

    def likeness(other: tuple[str, ...]) -> tuple[int, int]:
        return sum(min(count, other.count(word)) for word, count in written.items()), -len(other)

    nearest: tuple[str, ...] = max([(), *possible], key=likeness)
    left = Counter(nearest)
    marks = []
    for word in query:
        marks.append(left[word] > 0)
        left[word] -= 1
    return marks


def _user_random(user: int, seed: int) -> Random:
    return Random(f"synthetic/{seed}/{user}")


def _draw_user(random: Random, config: Synthetic) -> tuple[int, list[_Interest]]:
    """Number of events and interests of a user: the first draws of their stream."""
    # One user in 25 hardly shows up; the mean of the others makes up for it.
    rare = random.random() < 0.04
    count = random.randint(1, 4) if rare else 1 + round(random.gammavariate(4, EVENTS_PER_USER / 4))
    names = random.sample(sorted(TOPICS)[: config.topics], min(random.choice((1, 2, 2, 3)), config.topics))
    return count, [_Interest(random, TOPICS[name]) for name in names]


class _Interest:
    """A topic as one user sees it: few things, and habits of refining, the first of them strongest."""

    def __init__(self, random: Random, topic: Topic) -> None:
        self.topic = topic
        self.things = random.sample(topic.things, random.choice((3, 4, 5)))
        self.habits = random.sample(topic.refinements, 4)
        self.site = random.choice(topic.sites)


def _mission(random: Random, interest: _Interest, searched: list[str]) -> list[_Event]:
    """Events of one mission; new searches are appended to `searched`."""
    topic = interest.topic
    thing = random.choice(interest.things)
    question = min(int(random.expovariate(0.7)), len(topic.questions) - 1)
    refinement = random.choice(interest.habits) if random.random() < 0.3 else "{}"
    events: list[_Event] = []
    for _ in range(random.randint(4, 7)):
        subject = topic.questions[question].format(thing)
        query = refinement.format(subject)
        events += _noise(random, query, searched)
        events.append(("search", query))
        searched.append(query)
        if random.random() < 0.45:
            events.append(("click", _page(random, interest, subject)))
        # Refine, ask the next question, or turn to another thing; something not asked before if it comes up.
        for _ in range(4):
            draw = random.random()
            if draw < 0.45:
                refinement = interest.habits[min(int(random.expovariate(1.2)), 3)]
            elif draw < 0.85:
                question = (question + 1) % len(topic.questions)
                refinement = "{}" if random.random() < 0.6 else refinement
            else:
                thing = random.choice(interest.things)
            if refinement.format(topic.questions[question].format(thing)) not in searched:
                break
    if random.random() < 0.25:
        events.append(("visit", f"https://www.{interest.site}.example/{thing.replace(' ', '-')}"))
    if random.random() < 0.2:
        events.append(("purchase", topic.product.format(thing)))
    return events


def _page(random: Random, interest: _Interest, subject: str) -> str:
    """A clicked page: its title, or its URL."""
    site = interest.site if random.random() < 0.6 else random.choice(interest.topic.sites)
    if random.random() < 0.4:
        return f"http://www.{site}.example/{subject.replace(' ', '-')}?id={random.randrange(10**8)}"
    return f"{subject.capitalize()} - {site.capitalize()}"


def _noise(random: Random, query: str, searched: list[str]) -> list[_Event]:
    """Now and then, something of little use that comes before a search."""
    match _noise_kind(random.random()):
        case "repeat":
            return [("search", query)]
        case "return" if searched:
            return [("search", random.choice(searched))]
        case "navigational":
            return [("search", random.choice(_NAVIGATIONAL))]
        case "typo":
            at = random.randrange(len(query) - 1)
            return [("search", query[:at] + query[at + 1] + query[at] + query[at + 2 :])]
        case "personal":
            return [("search", random.choice(_PERSONAL))]
        case "unreadable":
            return [random.choice((("hover", query), ("search", "-"), ("search", ""), ("", query)))]
    return []


def _noise_kind(draw: float) -> str | None:
    """The kind that a number between 0 and 1 falls on, or none."""
    for kind, share in _NOISE.items():
        if draw < share:
            return kind
        draw -= share
    return None


def _times(random: Random, missions: list[list[Any]]) -> Iterator[datetime]:
    """Increasing times: missions are spread over the days, their events half a minute apart."""
    starts = sorted(random.random() * DAYS * 86400 for _ in missions)
    second = 0.0
    for start, events in zip(starts, missions, strict=True):
        second = max(start, second + 1800)
        for _ in events:
            yield START + timedelta(seconds=int(second))
            second += 4 + random.expovariate(1 / 30)


def _row(random: Random, user: str, time: datetime, kind: str, text: str) -> tuple[str, ...]:
    """The row of an event; one in a thousand has a broken time, one in a thousand lacks its last column."""
    draw = random.random()
    if draw < 0.001:
        return user, f"{time:%d/%m/%y %H.%M}", kind, text
    return (user, str(time), kind) if draw < 0.002 else (user, str(time), kind, text)
