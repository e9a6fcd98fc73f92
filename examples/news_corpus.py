"""A synthetic news corpus: short articles and highlights that are true summaries of them.

Each article reports one event. Its lead says who did what and where; two of the event's three details, a
quote and background follow in random order, with other people, places and numbers that the summary must not
pick up. The highlights are the event in one sentence and, in a second one, the detail that comes first in
the article: there is exactly one right summary, and it can be written only by reading the article.

Everything is drawn from a seeded generator, so the same seed gives the same corpus. The held-out part is
about people whose full names occur nowhere in the training part (see `is_held_out`). Most of this file is a
flat table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random

PROMPT_SUFFIX = " TL;DR:"


@dataclass(frozen=True)
class Pair:
    """One article, its highlights, and the full names of the people in it."""

    article: str
    highlights: str
    people: tuple[str, ...]


@dataclass(frozen=True)
class Detail:
    """A fact of an event: two wordings for the article, and the one sentence for the highlights."""

    sentence: str
    paraphrase: str
    highlight: str


@dataclass(frozen=True)
class Event:
    """A kind of news: ways to open the article, the first sentence of the highlights, and details."""

    leads: tuple[str, ...]
    highlight: str
    details: tuple[Detail, Detail, Detail]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    """Anna Boris Clara David Elena Felix Grace Henrik Irene Jonas Karin Leo Maria Nadia Oscar Paula Quentin
    Rosa Samuel Tara Ulrich Vera Walter Yasmin Adrian Bianca Carlos Dora Emil Fiona"""
)
LAST_NAMES = _words(
    """Abbott Brandt Castell Dorn Ekberg Farrow Galvin Holt Ivarsson Jansen Keller Lindqvist Moreau Novak
    Okafor Pereira Quist Rahimi Sorensen Tanaka Ullman Vargas Whitlock Yilmaz Zeller Ashby Bellamy Corwin
    Draper Fenwick"""
)
CITIES = _words(
    """Halden Norwick Casterly Brevik Alderton Marlow Ostrava Pinefield Lindau Sandhurst Torvik Velden
    Westmere Ardale Bexford Calder Dunmore Eastport Fairhaven Glenrock Harwell Kingsbury Langford Milbrook"""
)
COMPANIES = tuple(
    f"{name} {trade}"
    for name in _words("Orbis Velta Talvik Corona Meridian Summit Polaris Atlas Kestrel Lumen Vertex Zenith")
    for trade in _words("Bank Foods Motors Steel Energy Airlines")
)
CLUBS = _words("Rovers United Wanderers Rangers Athletic City")
TOPICS = _words("asthma diabetes malaria arthritis migraine insomnia")
CARGOES = _words("timber grain copper fertiliser medicine furniture")
PRODUCTS = _words("batteries turbines tractors trams cameras engines")
CRIMES = _words("fraud bribery theft forgery smuggling arson")
BUILDINGS = _words("warehouse hotel school theatre bakery library")
ROLES = ("chief executive", "finance director", "chairman", "head of research", "sales director")
JOBS = ("mayor", "police chief", "union leader", "lawyer", "surgeon", "city councillor", "fire chief")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")

EVENTS = (
    Event(
        leads=(
            "{org} has named {person} as its new {role}, the company said in {city} on {day}.",
            "{person} will take over as {role} of {org}, the board announced in {city} on {day}.",
            "The board of {org} in {city} has picked {person} for the post of {role}.",
        ),
        highlight="{person} becomes {role} of {org}.",
        details=(
            Detail(
                "{surname} joined the company {years} years ago as a trainee.",
                "After {years} years in the company, {surname} knows every part of it.",
                "{surname} has been with the company for {years} years.",
            ),
            Detail(
                "{other}, who held the post before, stepped down in {month} after a fall in sales.",
                "The post had been empty since {other} left in {month}.",
                "{other} left the post in {month}.",
            ),
            Detail(
                "The company employs {many} people and plans to hire more.",
                "It has {many} workers on its payroll.",
                "The company has {many} employees.",
            ),
        ),
    ),
    Event(
        leads=(
            "A fire that broke out on {day} has gutted a {building} in {city}.",
            "Firefighters in {city} could not save a {building} from the flames on {day}.",
            "A {building} in the centre of {city} burned down on {day}.",
        ),
        highlight="Fire destroys {building} in {city} on {day}.",
        details=(
            Detail(
                "{few} people were taken to hospital with burns.",
                "Doctors treated {few} people who had breathed in smoke.",
                "{few} people were injured.",
            ),
            Detail(
                "The owner, {person}, put the damage at {money} million dollars.",
                "{person}, who owns the {building}, expects to lose {money} million dollars.",
                "Owner {person} puts the damage at ${money} million.",
            ),
            Detail(
                "Some {many} residents had to leave their homes.",
                "Police moved {many} neighbours to a sports hall.",
                "{many} residents were moved to safety.",
            ),
        ),
    ),
    Event(
        leads=(
            "{org} will build a plant for {product} in {city}, the company announced on {day}.",
            "{city} has won the race for a new factory in which {org} will make {product}.",
            "Work on a factory for {product} starts in {city} next {month}, {org} said.",
        ),
        highlight="{org} to make {product} in {city}.",
        details=(
            Detail(
                "The plant will give work to {many} people.",
                "It is expected to bring {many} jobs to the area.",
                "The factory will create {many} jobs.",
            ),
            Detail(
                "The project costs {money} million dollars, a third of it paid by the state.",
                "{person}, who leads the project, spoke of an investment of {money} million dollars.",
                "The project costs ${money} million.",
            ),
            Detail(
                "Local farmers led by {other} have gone to court to stop it.",
                "{other} heads a group of neighbours who are fighting the plan.",
                "{other} leads the protest against it.",
            ),
        ),
    ),
    Event(
        leads=(
            "{city} {club} beat {town} {rivals} on {day} in front of {many} supporters from abroad.",
            "There was joy in {city} on {day} after {city} {club} won against {town} {rivals}.",
            "{town} {rivals} lost at home to {city} {club} on {day}.",
        ),
        highlight="{city} {club} beat {town} {rivals}.",
        details=(
            Detail(
                "{person} scored the only goal in minute {minute}.",
                "The winning goal came from {person} in minute {minute}.",
                "{person} scored in minute {minute}.",
            ),
            Detail(
                "Coach {other} has now won {few} games this season.",
                "For the coach, {other}, it was win number {few} of the season.",
                "It is win number {few} for coach {other}.",
            ),
            Detail(
                "The goalkeeper broke an arm and will be out until {month}.",
                "Bad news came from the doctors: the captain cannot play before {month}.",
                "An injured player is out until {month}.",
            ),
        ),
    ),
    Event(
        leads=(
            "{person} was sentenced to {few} years in prison for {crime} by a court in {city}.",
            "A judge in {city} sent {person} to prison for {few} years on {day} in a case of {crime}.",
            "A court in {city} found {person} guilty of {crime} and set a term of {few} years.",
        ),
        highlight="{person} gets {few} years in prison for {crime}.",
        details=(
            Detail(
                "The court heard that {many} customers of {org} lost their savings.",
                "Among the victims were {many} clients of {org}.",
                "{many} customers of {org} were victims.",
            ),
            Detail(
                "Police found {money} million dollars in a garage in {town}.",
                "A search of a farm near {town} had turned up {money} million dollars in cash.",
                "Police found ${money} million in {town}.",
            ),
            Detail(
                "The lawyer {other} said there would be an appeal.",
                "{other}, for the defence, will take the case to a higher court.",
                "Lawyer {other} will appeal.",
            ),
        ),
    ),
    Event(
        leads=(
            "A team led by {person} at the University of {city} has tested a new drug against {topic}.",
            "Researchers in {city} say they have found a better treatment for {topic}.",
            "A new drug may help people who suffer from {topic}, a study from {city} suggests.",
        ),
        highlight="Study in {city} finds new drug for {topic}.",
        details=(
            Detail(
                "Over a year, {many} patients took the drug.",
                "The doctors followed {many} patients for a year.",
                "{many} patients took part.",
            ),
            Detail(
                "Symptoms went down by {percent} percent, {person} wrote.",
                "In the report {person} describes {percent} percent fewer attacks.",
                "{person} reports a drop of {percent} percent.",
            ),
            Detail(
                "{org} paid for the work and wants to sell the drug from {month}.",
                "The drug will be on the market in {month}, said {org}, which paid for the tests.",
                "{org} will sell it from {month}.",
            ),
        ),
    ),
    Event(
        leads=(
            "A ship carrying {cargo} ran aground off {city} on {day}.",
            "A freighter with {cargo} on board hit rocks near the port of {city} on {day}.",
            "Rescue boats raced to a cargo ship that got stuck off {city} on {day} with a load of {cargo}.",
        ),
        highlight="Ship with {cargo} runs aground near {city}.",
        details=(
            Detail(
                "All {few} sailors were brought ashore by helicopter.",
                "A helicopter lifted the crew of {few} to safety.",
                "The crew of {few} was rescued.",
            ),
            Detail(
                "The captain, {person}, is being questioned by police.",
                "Police are talking to {person}, who was in command.",
                "Captain {person} is questioned by police.",
            ),
            Detail(
                "About {many} tonnes of oil have leaked into the sea.",
                "A slick of {many} tonnes of oil is drifting towards {town}.",
                "{many} tonnes of oil spilled into the sea.",
            ),
        ),
    ),
    Event(
        leads=(
            "{person} has been elected mayor of {city} with {percent} percent of the vote.",
            "Voters in {city} chose {person} as their mayor on {day}, with {percent} percent in favour.",
            "{city} has a new mayor: {person} took {percent} percent of the vote on {day}.",
        ),
        highlight="{person} elected mayor of {city} with {percent} percent.",
        details=(
            Detail(
                "{other}, who had run the city for {years} years, admitted defeat.",
                "The result ends the {years} years in office of {other}.",
                "{other} loses after {years} years in office.",
            ),
            Detail(
                "The new mayor has promised to build {many} flats.",
                "In the campaign {surname} spoke of {many} new flats.",
                "{surname} promises {many} flats.",
            ),
            Detail(
                "The new council meets for the first time in {month}.",
                "{surname} will move into the town hall in {month}.",
                "{surname} takes office in {month}.",
            ),
        ),
    ),
    Event(
        leads=(
            "{org} is buying {target} for {money} million dollars, the companies said on {day}.",
            "In a deal worth {money} million dollars, {org} takes over {target}.",
            "{target} has been sold to {org} for {money} million dollars.",
        ),
        highlight="{org} buys {target} for ${money} million.",
        details=(
            Detail(
                "The offices in {city} will close and {many} people will lose their jobs.",
                "Unions fear for {many} jobs at the offices in {city}.",
                "{many} jobs in {city} are at risk.",
            ),
            Detail(
                "{person} will run the new group.",
                "The new group will be led by {person}.",
                "{person} will lead the group.",
            ),
            Detail(
                "Shares rose by {percent} percent after the news.",
                "Traders pushed the shares up by {percent} percent.",
                "Shares gain {percent} percent.",
            ),
        ),
    ),
    Event(
        leads=(
            "A storm hit {city} on {day} and left {many} homes without power.",
            "About {many} homes in {city} lost power on {day} when a storm swept the coast.",
            "Strong winds brought down power lines in {city} on {day}, and {many} homes went dark.",
        ),
        highlight="Storm cuts power to {many} homes in {city}.",
        details=(
            Detail(
                "{person} was hurt when a tree fell on a car.",
                "A falling tree injured {person}, a teacher.",
                "{person} was injured by a falling tree.",
            ),
            Detail(
                "The road to {town} is closed until {month}.",
                "Engineers will need until {month} to repair the bridge on the road to {town}.",
                "The road to {town} stays closed until {month}.",
            ),
            Detail(
                "Insurers expect claims of {money} million dollars.",
                "{org} put the cost of repairs at {money} million dollars.",
                "The damage is put at ${money} million.",
            ),
        ),
    ),
)

QUOTES = (
    '"This is a day that nobody here will forget," said {speaker}, a {job}.',
    '"We have waited for this for a long time," {speaker}, a {job}, told reporters.',
    'The {job} {speaker} asked for calm: "We need to know all the facts first."',
    '"I was surprised when I heard it on the radio," said the {job}, {speaker}.',
    "{speaker}, a {job}, refused to comment.",
)
BACKGROUND = (
    "A similar case made headlines in {month_before}.",
    "The town of {place} saw something like it {years_before} years ago.",
    "Reporters from {place} were among the first to arrive.",
    "The news spread quickly on social media.",
    "A public meeting is planned for {day_after} evening.",
    "It was the talk of the market square all week.",
    "More than {crowd} messages reached the local radio station.",
    "{bystander} was watching from the other side of the street.",
)
SCENES = (
    "It was a long night.",
    "Rumours had been going round for weeks.",
    "Few people had seen it coming.",
    "The streets were quiet on {day_after} morning.",
)


def is_held_out(first: int, last: int) -> bool:
    """Whether the person with these indices into FIRST_NAMES and LAST_NAMES belongs to the held-out part."""
    return (first + last) % 6 == 0


def _people(rng: Random, count: int, held_out: bool) -> list[str]:
    """`count` full names of one part of the split, no first or last name twice."""
    people: dict[int, str] = {}
    for first in rng.sample(range(len(FIRST_NAMES)), count):
        free = [i for i in range(len(LAST_NAMES)) if i not in people and is_held_out(first, i) == held_out]
        last = rng.choice(free)
        people[last] = f"{FIRST_NAMES[first]} {LAST_NAMES[last]}"
    return list(people.values())


def _slots(rng: Random, people: list[str]) -> Mapping[str, str]:
    """The facts of one article; slots drawn from one list differ from each other."""
    person, other, speaker, bystander = people
    city, town, place = rng.sample(CITIES, 3)
    org, target = rng.sample(COMPANIES, 2)
    club, rivals = rng.sample(CLUBS, 2)
    month, month_before = rng.sample(MONTHS, 2)
    day, day_after = rng.sample(DAYS, 2)
    many, crowd = rng.sample(range(100, 1000, 10), 2)
    years, years_before = rng.sample(range(2, 40), 2)
    return {
        "person": person,
        "surname": person.split()[-1],
        "other": other,
        "speaker": speaker,
        "bystander": bystander,
        "city": city,
        "town": town,
        "place": place,
        "org": org,
        "target": target,
        "club": club,
        "rivals": rivals,
        "month": month,
        "month_before": month_before,
        "day": day,
        "day_after": day_after,
        "many": str(many),
        "crowd": str(crowd),
        "years": str(years),
        "years_before": str(years_before),
        "few": str(rng.randint(3, 29)),
        "minute": str(rng.randint(2, 90)),
        "percent": str(rng.randint(31, 69)),
        "money": str(rng.randint(5, 95)),
        "role": rng.choice(ROLES),
        "job": rng.choice(JOBS),
        "topic": rng.choice(TOPICS),
        "cargo": rng.choice(CARGOES),
        "product": rng.choice(PRODUCTS),
        "crime": rng.choice(CRIMES),
        "building": rng.choice(BUILDINGS),
    }


def _pair(rng: Random, held_out: bool) -> Pair:
    people = _people(rng, 4, held_out)
    slots = _slots(rng, people)
    event = rng.choice(EVENTS)
    details = rng.sample(event.details, 2)
    body = [rng.choice((detail.sentence, detail.paraphrase)) for detail in details]
    for sentence in (rng.choice(QUOTES), *rng.sample(BACKGROUND, rng.randint(1, 2))):
        body.insert(rng.randint(0, len(body)), sentence)
    scene = [rng.choice(SCENES)] if rng.random() < 0.3 else []
    article = " ".join([*scene, rng.choice(event.leads), *body]).format_map(slots)
    highlights = f"{event.highlight} {details[0].highlight}".format_map(slots)
    return Pair(article, highlights, tuple(name for name in people if name in article))


def news(*, seed: int, held_out: bool) -> Iterator[Pair]:
    """An endless, reproducible stream of one part of the corpus; the parts share no full name of a person."""
    rng = Random(f"news-{seed}-{'held-out' if held_out else 'train'}")
    while True:
        yield _pair(rng, held_out)


def held_out_news(seed: int, count: int) -> list[Pair]:
    """The first `count` pairs of the held-out part."""
    return list(islice(news(seed=seed, held_out=True), count))


def to_jsonl(pairs: Iterable[Pair]) -> str:
    """One JSON object a line with the fields of CNN/DailyMail, `article` and `highlights`."""
    return "".join(json.dumps({"article": p.article, "highlights": p.highlights}) + "\n" for p in pairs)


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The pairs of a file that `to_jsonl` wrote, as {"article": ..., "highlights": ...}."""
    return [json.loads(line) for line in path.read_text().splitlines()]
