"""Stage `synthetic`: a made-up interaction log, seeded, so that everything runs without anybody's data.

Each user has one to three interests, favourite things and habits of refining within them. They search in
missions of four to seven queries: a mission starts somewhere in a topic, then adds a refinement, swaps it,
goes on to the next question about the same thing, or asks the same about another thing. Searches lead to
clicks (a page title or a URL), visits and purchases. So the next queries follow from the history in topic,
thing and habit, but are not determined by it.

As in a real log there is noise: repeats, typos, site names instead of searches, personal data (fake:
reserved telephone numbers, test card numbers, example domains), rows that cannot be read, and users with
hardly any event.

A user depends on the seed and the user's number only: a log of more users begins with the log of fewer.

Since the log is made, it is known what a user may search next: `user_queries` and `relevant_words` are the true
relevance that no judge is needed for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tppo.core.common import UserError, track
from tppo.core.config import Recipe, Synthetic
from tppo.core.run import RunFolder

HEADER = ("user_id", "time", "kind", "text")
START = datetime(2026, 1, 5)
DAYS = 90


class Topic(NamedTuple):
    """`questions` are ordered: a mission tends to go on to the next. {} is the thing, or the query so far."""

    things: list[str]
    questions: list[str]
    refinements: list[str]
    sites: list[str]
    product: str


def _topic(things: str, questions: str, refinements: str, sites: str, product: str) -> Topic:
    return Topic(things.split(", "), questions.split(", "), refinements.split(", "), sites.split(", "), product)


TOPICS = {
    "travel": _topic(
        "lisbon, rome, barcelona, paris, athens, prague, dublin, vienna, istanbul, edinburgh, tokyo, bangkok",
        "flights to {}, {} hotels, things to do in {}, {} restaurants, {} weather, {} airport transfer",
        "cheap {}, {} in may, {} for families, {} last minute, best {}, {} near the beach, {} with kids",
        "stayfinder, citytrips, farebird, guidepost",
        "{} travel guide",
    ),
    "cooking": _topic(
        "chicken curry, lasagna, banana bread, chili, pad thai, apple pie, beef stew, risotto, pancakes",
        "{} recipe, how to make {}, {} ingredients, side dishes for {}, {} calories, how long to cook {}",
        "easy {}, vegan {}, {} without eggs, {} for two, {} slow cooker, gluten free {}, {} with leftovers",
        "spoonful, homekitchen, tastebook, simmer",
        "{} spice mix",
    ),
    "cars": _topic(
        "honda civic, ford focus, toyota corolla, mazda 3, jeep wrangler, subaru outback, volvo v60",
        "{} for sale, {} review, {} mpg, {} brake pads, {} oil change, {} insurance cost",
        "used {}, {} 2019, {} automatic, {} under 10000, {} diesel, {} near me, {} problems",
        "motorlot, gearbox, wheelwise, autoledger",
        "{} floor mats",
    ),
    "health": _topic(
        "back pain, migraine, asthma, insomnia, knee pain, high blood pressure, eczema, heartburn, anemia",
        "{} symptoms, what causes {}, {} treatment, {} home remedies, {} diet, {} doctor",
        "{} in women, {} at night, chronic {}, {} during pregnancy, natural {}, {} after exercise",
        "healthnotes, medpages, clinicfinder, wellguide",
        "{} relief tablets",
    ),
    "gardening": _topic(
        "tomatoes, roses, lavender, basil, hydrangeas, strawberries, peppers, tulips, orchids, blueberries",
        "how to grow {}, when to plant {}, {} fertilizer, pruning {}, {} pests, {} companion plants",
        "{} in pots, {} from seed, {} indoors, organic {}, {} in clay soil, {} in full sun, {} in winter",
        "greenplot, seedhouse, gardenbench, rootandleaf",
        "{} seeds",
    ),
    "fitness": _topic(
        "half marathon, yoga, deadlift, rowing, swimming, cycling, pilates, pull ups, kettlebell",
        "{} training plan, {} for beginners, {} technique, {} shoes, {} injuries, {} warm up",
        "{} at home, 8 week {}, {} over 50, advanced {}, {} to lose weight, {} with bad knees, daily {}",
        "fitlog, strideclub, ironroom, pacebook",
        "{} gear bag",
    ),
    "music": _topic(
        "acoustic guitar, piano, ukulele, violin, drums, bass guitar, saxophone, cello, banjo, flute",
        "{} lessons, {} chords, easy songs on {}, {} tuning, {} price, {} sheet music",
        "{} online, {} for adults, free {}, used {}, {} for kids, {} by ear, jazz {}",
        "chordhouse, tunebarn, practicepad, stringworks",
        "{} tuner",
    ),
    "computers": _topic(
        "gaming laptop, wifi router, external hard drive, wireless mouse, mechanical keyboard, webcam",
        "best {}, {} reviews, {} setup, {} not working, {} deals, {} drivers",
        "{} under 100, {} for students, quiet {}, {} with usb c, {} comparison, refurbished {}",
        "techbench, bytestore, devicedesk, pixelmart",
        "{} cable kit",
    ),
    "pets": _topic(
        "labrador puppy, kitten, goldfish, guinea pig, parakeet, beagle, hamster, rabbit, poodle",
        "{} food, {} training, {} names, {} cage or bed, {} vet cost, how long does a {} live",
        "{} for first time owners, healthy {}, {} that is always hungry, homemade {}, {} in an apartment",
        "pawpages, petpantry, furfriends, vetline",
        "{} treats",
    ),
    "home": _topic(
        "kitchen cabinets, bathroom tile, hardwood floor, ceiling fan, garage door, deck, water heater, sofa",
        "{} ideas, how to install {}, {} cost, {} repair, {} colors, {} contractors",
        "modern {}, {} on a budget, {} for small spaces, white {}, {} step by step, {} near me, rustic {}",
        "homeforge, toolshed, roomcraft, buildright",
        "{} cleaner",
    ),
    "jobs": _topic(
        "nurse, teacher, electrician, accountant, graphic designer, truck driver, chef, data analyst",
        "{} jobs, {} salary, how to become a {}, {} resume, {} interview questions, {} certification",
        "{} part time, entry level {}, {} no experience, {} remote, {} in texas, senior {}, {} night shift",
        "jobharbor, careerpath, hiringhub, payscope",
        "{} exam book",
    ),
    "money": _topic(
        "mortgage, car loan, savings account, credit card, student loan, life insurance, pension, index fund",
        "{} calculator, {} rates, how does a {} work, {} requirements, {} comparison, {} mistakes",
        "{} with bad credit, best {}, {} for self employed, {} 2026, {} for seniors, fixed {}",
        "ratewise, moneydesk, ledgerly, planworth",
        "{} planner",
    ),
}
_NAVIGATIONAL = ["google", "yahoo mail", "ebay", "www.facebook.com", "youtube.com", "mapquest", "weather"]
_PERSONAL = [
    "email jane.doe@mail.example",
    "who called from 212-555-0147",
    "card 4111 1111 1111 1111 declined",
    "ssn 078-05-1120",
    "track parcel 99999000012345",
]
_NOISE = (  # Share of searches that are preceded by one of these.
    ("repeat", 0.05),
    ("return", 0.05),
    ("navigational", 0.04),
    ("typo", 0.02),
    ("personal", 0.004),
    ("unreadable", 0.004),
)


def run(recipe: Recipe, run: RunFolder, folder: Path) -> dict[str, Any]:
    """Write log.tsv (header user_id, time, kind, text; users one after the other)."""
    rows = write_log(recipe.synthetic, recipe.seed, folder / "log.tsv")
    return {"rows": rows, "users": recipe.synthetic.users, "topics": recipe.synthetic.topics}


def write_log(config: Synthetic, seed: int, path: Path) -> int:
    """Write the log as TSV; returns the number of rows after the header."""
    _check(config)
    rows = 0
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(HEADER) + "\n")
        for user in track(range(config.users), "synthetic users", config.users):
            lines = ["\t".join(row) + "\n" for row in user_rows(user, config, seed)]
            file.writelines(lines)
            rows += len(lines)
    temporary.replace(path)
    return rows


def _check(config: Synthetic) -> None:
    if config.users < 1 or config.events_per_user < 1:
        raise UserError("synthetic.users and synthetic.events_per_user must be at least 1")
    if not 1 <= config.topics <= len(TOPICS):
        raise UserError(f"synthetic.topics={config.topics} must be between 1 and {len(TOPICS)}")


def generate_rows(config: Synthetic, seed: int) -> Iterator[tuple[str, ...]]:
    """Rows (user_id, time, kind, text) of all users, streaming; a few are broken on purpose."""
    _check(config)
    for user in range(config.users):
        yield from user_rows(user, config, seed)


def user_rows(user: int, config: Synthetic, seed: int) -> list[tuple[str, ...]]:
    """Rows of one user, oldest first."""
    random = _user_random(user, seed)
    count, interests = _draw_user(random, config)
    missions: list[list[tuple[str, str]]] = []
    searched: list[str] = []
    left = count
    interest = interests[0]
    while left > 0:
        if random.random() < 0.4:
            interest = random.choice(interests)
        events = _mission(random, interest, searched)[:left]
        left -= len(events)
        missions.append(events)
    name = user_name(user)
    return [
        _row(random, name, time, kind, text)
        for (kind, text), time in zip((e for m in missions for e in m), _times(random, missions), strict=True)
    ]


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
            tuple(refinement.format(question.format(thing)).split())
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
    best: tuple[tuple[int, int], tuple[str, ...]] = ((0, 0), ())
    for other in possible:
        shared = sum(min(count, other.count(word)) for word, count in written.items())
        best = max(best, ((shared, -len(other)), other), key=lambda entry: entry[0])
    left = Counter(best[1])
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
    count = random.randint(1, 4) if rare else 1 + round(random.gammavariate(4, config.events_per_user / 4))
    names = random.sample(sorted(TOPICS)[: config.topics], min(random.choice((1, 2, 2, 3)), config.topics))
    return count, [_Interest(random, TOPICS[name]) for name in names]


class _Interest:
    """A topic as one user sees it: few things, and habits of refining, the first of them strongest."""

    def __init__(self, random: Random, topic: Topic) -> None:
        self.topic = topic
        self.things = random.sample(topic.things, random.choice((3, 4, 5)))
        self.habits = random.sample(topic.refinements, 4)
        self.site = random.choice(topic.sites)


def _mission(random: Random, interest: _Interest, searched: list[str]) -> list[tuple[str, str]]:
    """(kind, text) of one mission; new searches are appended to `searched`."""
    topic = interest.topic
    thing = random.choice(interest.things)
    question = min(int(random.expovariate(0.7)), len(topic.questions) - 1)
    refinement = random.choice(interest.habits) if random.random() < 0.3 else "{}"
    events: list[tuple[str, str]] = []
    for _ in range(random.randint(4, 7)):
        query = refinement.format(topic.questions[question].format(thing))
        _noise(random, query, searched, events)
        events.append(("search", query))
        searched.append(query)
        if random.random() < 0.45:
            events.append(("click", _page(random, interest, topic.questions[question].format(thing))))
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


def _noise(random: Random, query: str, searched: list[str], events: list[tuple[str, str]]) -> None:
    """Now and then, put something of little use before a search."""
    draw = random.random()
    name = ""
    for candidate, share in _NOISE:
        if 0 <= draw < share:
            name = candidate
        draw -= share
    if name == "repeat":
        events.append(("search", query))
    elif name == "return" and searched:
        events.append(("search", random.choice(searched)))
    elif name == "navigational":
        events.append(("search", random.choice(_NAVIGATIONAL)))
    elif name == "typo":
        at = random.randrange(len(query) - 1)
        events.append(("search", query[:at] + query[at + 1] + query[at] + query[at + 2 :]))
    elif name == "personal":
        events.append(("search", random.choice(_PERSONAL)))
    elif name == "unreadable":
        events.append(random.choice((("hover", query), ("search", "-"), ("search", ""), ("", query))))


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
