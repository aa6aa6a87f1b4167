"""Generated records in LongBench's form, fitted to a length, each with the place of its evidence.

Ten kinds: questions about one document and over two passages, a summary, few-shot classification,
passage retrieval, counting, code, a needle, key-value pairs, and a continuation whose loss is
asked for. Texts are put together from the tables below by a seeded generator, the same everywhere;
code and continuation are cut from the sources and help texts of the Python that runs, so they move
with its version. Names, places and values of the warm-up are none of the test's.

**Length.** A record is fitted to a number of tokens without any tokenizer: `estimate_tokens` counts
words, digits, marks and indentation, with weights that were fitted to SmolLM2's tokenizer once. So
all models see the same texts. Prompt and answer together have at most `length` tokens of SmolLM2
and at least nine tenths of that.

**Evidence.** `evidence` lists the spans of `prompt`, in characters, that the answer rests on. The
answer of a question stands nowhere else.
"""

from __future__ import annotations

import keyword
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tasks.base import Item
from tasks.longbench_protocol import Scorer

Shown = Literal["whole", "evidence", "nothing"]
"""What a prompt holds of its context: all, the evidence alone, nothing."""

GENERATOR_SEED = 20230814
WARM_UP = "warm-up"

# --- tables --------------------------------------------------------------------------------------

_FIRST_NAMES = (
    "Adam", "Alice", "Anna", "Arthur", "Bruno", "Carla", "Cecil", "Clara", "Daniel", "Diana",
    "Edgar", "Elena", "Emma", "Eric", "Felix", "Flora", "Frank", "George", "Grace", "Hannah",
    "Henry", "Ida", "Irene", "Jack", "Jane", "Julia", "Karen", "Laura", "Leo", "Linda",
    "Lucy", "Marco", "Maria", "Martin", "Nina", "Nora", "Oscar", "Paul", "Peter", "Ralph",
    "Rita", "Robert", "Rosa", "Sarah", "Simon", "Sofia", "Thomas", "Victor", "Vera", "Walter",
)  # fmt: skip
_LAST_NAMES = (
    "Abbott", "Archer", "Baker", "Barnes", "Bishop", "Blake", "Brooks", "Carter", "Chapman",
    "Clark", "Collins", "Cooper", "Dawson", "Dixon", "Ellis", "Evans", "Fisher", "Foster",
    "Gardner", "Graham", "Hardy", "Harper", "Hayes", "Howard", "Hunter", "Jensen", "Keller",
    "Knight", "Lambert", "Lawson", "Marshall", "Mason", "Miller", "Morgan", "Murphy", "Nelson",
    "Norton", "Owens", "Palmer", "Parker", "Perry", "Porter", "Quinn", "Reed", "Rogers", "Sawyer",
    "Shaw", "Spencer", "Stone", "Taylor", "Turner", "Walsh", "Warren", "Watson", "Weaver", "Young",
)  # fmt: skip
_CITIES = (
    "Amsterdam", "Athens", "Berlin", "Boston", "Brussels", "Cairo", "Chicago", "Copenhagen",
    "Dallas", "Denver", "Dublin", "Edinburgh", "Florence", "Geneva", "Hamburg", "Helsinki",
    "Istanbul", "Kyoto", "Lisbon", "London", "Madrid", "Melbourne", "Miami", "Milan", "Montreal",
    "Moscow", "Mumbai", "Munich", "Naples", "Oslo", "Oxford", "Paris", "Prague", "Rome",
    "Seattle", "Seoul", "Stockholm", "Sydney", "Tokyo", "Toronto", "Venice", "Vienna", "Warsaw",
    "Zurich",
)  # fmt: skip
_JOBS = (
    "architect", "baker", "barber", "butcher", "carpenter", "chemist", "dentist", "doctor",
    "driver", "editor", "engineer", "farmer", "gardener", "journalist", "judge", "lawyer",
    "librarian", "mechanic", "nurse", "painter", "photographer", "pilot", "plumber", "sailor",
    "sculptor", "surgeon", "tailor", "teacher", "translator", "waiter",
)  # fmt: skip
_INSTRUMENTS = (
    "accordion", "banjo", "cello", "clarinet", "drums", "flute", "guitar", "harp", "organ",
    "piano", "saxophone", "trombone", "trumpet", "tuba", "violin",
)  # fmt: skip
_ANIMALS = (
    "camel", "cat", "cow", "crocodile", "dog", "dolphin", "donkey", "duck", "eagle", "elephant",
    "fox", "frog", "giraffe", "goat", "goose", "hamster", "horse", "kangaroo", "lion", "monkey",
    "owl", "parrot", "penguin", "pig", "rabbit", "shark", "sheep", "snake", "spider", "squirrel",
    "swan", "tiger", "turtle", "whale", "wolf", "zebra",
)  # fmt: skip
_FOODS = (
    "apples", "bananas", "beans", "bread", "butter", "carrots", "cheese", "cherries", "chocolate",
    "eggs", "fish", "grapes", "honey", "lemons", "mushrooms", "noodles", "olives", "onions",
    "oranges", "pancakes", "pasta", "peaches", "pears", "pizza", "potatoes", "rice", "salad",
    "soup", "strawberries", "tomatoes",
)  # fmt: skip
_COLOURS = (
    "black", "blue", "brown", "golden", "green", "grey", "orange", "pink", "purple", "red",
    "silver", "white", "yellow",
)  # fmt: skip
_THINGS = (
    "bag", "basket", "blanket", "book", "bottle", "box", "bridge", "candle", "chair", "clock",
    "coat", "cup", "desk", "door", "fence", "garden", "hat", "key", "knife", "ladder", "lamp",
    "letter", "map", "mirror", "picture", "plate", "ring", "river", "road", "roof", "rope",
    "shelf", "shoe", "spoon", "stone", "street", "table", "tower", "tree", "wall", "wheel",
    "window",
)  # fmt: skip
_ADJECTIVES = (
    "ancient", "bright", "broken", "clean", "cold", "dark", "dusty", "empty", "heavy", "large",
    "little", "long", "narrow", "new", "old", "plain", "quiet", "round", "short", "simple",
    "small", "soft", "strange", "thin", "warm", "wide", "wooden",
)  # fmt: skip
_SUBJECTS = (
    "The old woman", "The old man", "A young woman", "The children", "The neighbours",
    "A traveller", "The boys", "The guests", "The workers", "A stranger", "The shopkeeper",
    "The students",
)  # fmt: skip
_VERBS = (
    "carried", "cleaned", "drew", "forgot", "found", "kept", "left", "looked at", "lost", "moved",
    "opened", "painted", "passed", "repaired", "saw", "touched", "walked past", "wanted",
)  # fmt: skip
_PLACES = (
    "behind the house", "beside the church", "by the lake", "in the afternoon", "in the kitchen",
    "in the morning", "in the rain", "in the village", "near the station", "on the hill",
    "on the way home", "under the trees", "before dinner", "after the storm", "near the market",
)  # fmt: skip

_CLASSES: Mapping[str, Sequence[str]] = {
    "person": (
        "Who {verb} the {adjective} {thing}?",
        "Which {job} {verb} the {thing}?",
        "What is the name of the {job} from {city}?",
        "Who is the best {job} in {city}?",
    ),
    "place": (
        "Where is the {adjective} {thing}?",
        "In which city is the {adjective} {thing}?",
        "Where did the {job} find the {thing}?",
        "What country is {city} in?",
    ),
    "time": (
        "When was the {adjective} {thing} found?",
        "In what year did the {job} come to {city}?",
        "When did the {job} lose the {thing}?",
        "What day is the market in {city}?",
    ),
    "number": (
        "How many {animals} live near {city}?",
        "How much does the {adjective} {thing} cost?",
        "How many people saw the {thing} in {city}?",
        "What is the weight of the {adjective} {thing}?",
    ),
    "animal": (
        "Which animal is on the {adjective} {thing}?",
        "What kind of animal does the {job} keep?",
        "Which animal lives longest in {city}?",
        "What pet does the {job} from {city} have?",
    ),
    "reason": (
        "Why is the {thing} {adjective}?",
        "Why did the {job} leave {city}?",
        "What is the reason that the {job} kept the {thing}?",
        "Why do {animals} like the {adjective} {thing}?",
    ),
}
# What a class is called says nothing about it: only the examples do.
_LABELS = ("red", "blue", "green", "black", "white", "yellow")
_RELATIONS = ("teacher", "neighbour", "doctor", "cousin", "boss", "landlord")

# Modules whose style the estimate of tokens fits within a few percent; long and little changing.
_MODULES = (
    "typing", "traceback", "zipfile", "threading", "subprocess", "pdb", "ftplib", "mailbox",
    "http.cookiejar", "tarfile", "plistlib", "pprint", "smtplib", "pickle", "nntplib", "bdb",
)  # fmt: skip
_TOPICS = (
    "specialnames", "types", "formatstrings", "string-methods", "typesseq", "debugger",
    "attribute-access", "customization", "typesmapping", "assignment", "comparisons",
)  # fmt: skip
_WARMUP_MODULES, _WARMUP_TOPICS = ("shutil",), ("compound",)


def _table(values: Sequence[str], seed: str) -> list[str]:
    """Return the part of a table that a seed may use: every third entry is for the warm-up."""
    return [v for n, v in enumerate(values) if (n % 3 == 2) == (seed == WARM_UP)]


# --- length --------------------------------------------------------------------------------------

_PIECE = re.compile(
    r" ?[A-Z]?[a-z]+| ?[A-Z]+(?![a-z])| ?\d| ?_+|\n[ \n]*|  +(?= )| ?[^\w\s]+|[^\w\s]| "
)


def estimate_tokens(text: str) -> float:
    """Return about how many tokens of SmolLM2 a text has.

    Weights are a least-squares fit on 200 texts of all kinds that this module makes. Generated
    texts come out within 2%, code and help texts within 3% (standard deviation; 6% at the worst).
    """
    return sum(map(_piece_tokens, _PIECE.findall(text)))


@cache
def _piece_tokens(piece: str) -> float:
    body = piece.strip(" ")
    if not body:
        return 0.611
    if body[0] == "\n":
        return 1.22 + 0.189 * (piece[-1] == " ") - 0.439 * (piece.count("\n") > 1)
    if body.isalpha() and body.isupper():
        return 1.798 + 0.184 * max(0, len(body) - 2)
    if body.isalpha() and piece[0] == " ":
        return 0.971 + 0.174 * max(0, len(body) - 7) - 1.118 * max(0, len(body) - 11)
    if body.isalpha():
        return 0.916 + 0.218 * max(0, len(body) - 4) - 0.056 * max(0, len(body) - 8)
    if body.isdigit():
        return 1.339
    if body[0] == "_":
        return 0.474
    return 1.049 - 0.076 * (len(body) - 1) + 0.189 * max(0, len(body) - 3)


# --- texts in the making -------------------------------------------------------------------------


class Sentence(NamedTuple):
    """A piece of a context, and whether the answer rests on it."""

    text: str
    is_evidence: bool = False


Paragraph = list[Sentence]


@dataclass
class Draft:
    """A context with what is asked about it.

    Attributes:
        context: The text.
        input: What is asked.
        answers: Right answers.
        classes: All classes, where there are some.
        evidence: Spans of the context.
        cue: First words of the answer, which the model goes on from: without them a small model
            does not begin to answer.
    """

    context: str
    input: str
    answers: list[str]
    classes: list[str] = field(default_factory=list)
    evidence: list[tuple[int, int]] = field(default_factory=list)
    cue: str = ""


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    Attributes:
        draft: Makes the context and what is asked, of about so many tokens; the number is that of
            the record's turn.
        template: Prompt, with `{context}`, `{input}` and `{cue}`.
        scorer: Of the answer; None for the continuation, whose loss is what counts.
        max_new_tokens: Longest answer.
        stop: Ends an answer.
        aim: Share of the length that the estimate aims at. It holds what the estimate misses in the
            words of this kind (names have more tokens than other words), so that texts come out at
            97%, those of code and help texts at 95%.
    """

    draft: Callable[[random.Random, float, int, str], Draft]
    template: str
    scorer: Scorer | None
    max_new_tokens: int = 16
    stop: tuple[str, ...] = ("\n",)
    aim: float = 0.97


def _assemble(
    gold: Sequence[Paragraph],
    others: Iterator[Paragraph],
    room: float,
    depth: float,
    separator: str = "\n\n",
) -> tuple[str, list[tuple[int, int]]]:
    """Put gold paragraphs between others until the room is used up.

    Args:
        gold: Paragraphs that must be there.
        others: As many as are needed; the last one may lose its last sentences.
        room: Tokens.
        depth: Where the first gold paragraph goes, from 0 (begin) to 1; the next ones follow at
            even distances, and after the end of the text at its begin.
        separator: Between paragraphs.

    Returns:
        The text, and the spans of its evidence.
    """
    border = estimate_tokens(separator)

    def size(sentence: Sentence) -> float:
        return estimate_tokens(" " + sentence.text)

    room -= sum(border + sum(map(size, paragraph)) for paragraph in gold)
    filled: list[Paragraph] = []
    while room > 0:
        room -= border
        kept: Paragraph = []
        for sentence in next(others):
            room -= size(sentence)
            # Half a sentence too much is nearer to the aim than half a sentence too little.
            if room < -size(sentence) / 2:
                break
            kept.append(sentence)
        if kept:
            filled.append(kept)
    slots = sorted(
        (int(((depth + n / len(gold)) % 1.0) * (len(filled) + 1)), n) for n in range(len(gold))
    )
    # From the back, so that the slots before stay where they are.
    for slot, n in reversed(slots):
        filled.insert(slot, gold[n])
    return _joined(filled, separator)


def _joined(paragraphs: Sequence[Paragraph], separator: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of paragraphs and the spans of their evidence."""
    text, spans = "", []
    for paragraph in paragraphs:
        text += separator if text else ""
        for place, sentence in enumerate(paragraph):
            text += " " if place else ""
            if sentence.is_evidence:
                spans.append((len(text), len(text) + len(sentence.text)))
            text += sentence.text
    return text, spans


def _depth(number: int) -> float:
    """Return a place in the text; any few numbers in a row are spread over it."""
    return (0.15 + number * 0.6180339887) % 1.0


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _many(animal: str) -> str:
    odd = {"fox": "foxes", "goose": "geese", "sheep": "sheep", "wolf": "wolves"}
    return odd.get(animal, f"{animal}s")


def _names(rng: random.Random, seed: str) -> Iterator[str]:
    """Yield full names, each once; when they are used up, again with an initial."""
    firsts, lasts = _table(_FIRST_NAMES, seed), _table(_LAST_NAMES, seed)
    rng.shuffle(firsts)
    rng.shuffle(lasts)
    # First names come again as late as can be: alike names are the hardest thing to tell apart.
    for initial in ("", *(f"{letter}. " for letter in "ABCDEFGHJKLMNPRSTW")):
        for turn in range(len(lasts)):
            for place, first in enumerate(firsts):
                yield f"{first} {initial}{lasts[(place + turn) % len(lasts)]}"


def _scene(rng: random.Random) -> str:
    """Return a sentence that says nothing of interest."""
    return (
        f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} "
        f"{rng.choice(_THINGS)} {rng.choice(_PLACES)}."
    )


def _scenes(rng: random.Random, sentences: int) -> Iterator[Paragraph]:
    while True:
        yield [Sentence(_scene(rng)) for _ in range(sentences)]


# --- kinds ---------------------------------------------------------------------------------------


class _Fact(NamedTuple):
    statement: str
    question: str
    values: Sequence[str]


_FACTS: Sequence[_Fact] = (
    _Fact("{name} was born in {value}.", "In which city was {name} born?", _CITIES),
    _Fact("{name} works as {a_value}.", "What does {name} work as?", _JOBS),
    _Fact("{name} plays the {value}.", "Which instrument does {name} play?", _INSTRUMENTS),
    _Fact("{name} keeps {a_value}.", "Which animal does {name} keep?", _ANIMALS),
    _Fact("{name} likes to eat {value}.", "What does {name} like to eat?", _FOODS),
    _Fact("{name} drives a car that is {value}.", "What colour is the car of {name}?", _COLOURS),
)


def _stated(fact: _Fact, name: str, value: str) -> str:
    return fact.statement.format(name=name, value=value, a_value=_a(value))


def _docqa(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """Paragraphs about people; one fact of one of them is asked for."""
    names = _names(rng, seed)
    asked, name = _FACTS[number % len(_FACTS)], next(names)
    answer = rng.choice(_table(asked.values, seed))

    def person(who: str, *, is_asked: bool) -> Paragraph:
        facts = [fact for fact in rng.sample(_FACTS, 3) if fact is not asked][:2]
        paragraph = [
            Sentence(_stated(fact, who, rng.choice(_table(fact.values, seed)))) for fact in facts
        ]
        values = [v for v in _table(asked.values, seed) if v != answer]
        if is_asked:
            paragraph.append(Sentence(_stated(asked, who, answer), is_evidence=True))
        elif rng.random() < 0.5:
            paragraph.append(Sentence(_stated(asked, who, rng.choice(values))))
        rng.shuffle(paragraph)
        return [*paragraph, Sentence(_scene(rng))]

    others = (person(who, is_asked=False) for who in names)
    context, spans = _assemble([person(name, is_asked=True)], others, room, _depth(number))
    cue = asked.statement[: asked.statement.rindex("{")].rstrip().format(name=name)
    return Draft(context, asked.question.format(name=name), [answer], evidence=spans, cue=cue)


def _multihop(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """One passage leads to a second person, another passage says where that one lives.

    The answer names both, so that each hop counts by itself, and another pair of passages is
    answered first to show how: asked for the city alone, a small model names any.
    """
    names = _names(rng, seed)
    relation = rng.choice(_RELATIONS)
    cities = _table(_CITIES, seed)
    first, second, answer = next(names), next(names), rng.choice(cities)
    shown = next(names), next(names), rng.choice([each for each in cities if each != answer])

    def passages(one: str, other: str, city: str, *, is_asked: bool) -> list[Paragraph]:
        return [
            [
                Sentence(f"The {relation} of {one} is {other}.", is_evidence=is_asked),
                Sentence(_scene(rng)),
            ],
            [Sentence(f"{other} lives in {city}.", is_evidence=is_asked), Sentence(_scene(rng))],
        ]

    def others() -> Iterator[Paragraph]:
        # Longer texts have no more people; they are longer by what says nothing.
        for place in range(10**6):
            if place < 3:
                city = rng.choice([each for each in cities if each != answer])
                pair = shown if place == 0 else (next(names), next(names), city)
                both = passages(*pair, is_asked=False)
                rng.shuffle(both)
                yield from both
            yield [Sentence(_scene(rng)), Sentence(_scene(rng))]

    gold = passages(first, second, answer, is_asked=True)
    context, spans = _assemble(gold, others(), room, _depth(number))
    question = "In which city does the {relation} of {name} live?"
    cue = "The {relation} of {name} is"
    asked = (
        f"Question: {question.format(relation=relation, name=shown[0])}\n"
        f"Answer: {cue.format(relation=relation, name=shown[0])} {shown[1]} -> {shown[2]}\n\n"
        f"Question: {question.format(relation=relation, name=first)}"
    )
    return Draft(
        context,
        asked,
        [f"{second} -> {answer}"],
        evidence=spans,
        cue=cue.format(relation=relation, name=first),
    )


def _summary(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """A report in which one finding is the main one, and some others are not."""
    city, *cities = rng.sample(_table(_CITIES, seed), 4)
    animals = rng.sample(_table(_ANIMALS, seed), 3)

    def finding(animal: str, place: str) -> str:
        direction = rng.choice(("rose", "fell"))
        percent = rng.randint(11, 89)
        return f"the number of {_many(animal)} in {place} {direction} by {percent} percent."

    answer = finding(animals[0], city)
    gold = [[Sentence(f"The main finding is that {answer}", is_evidence=True)]]
    minor = [
        [Sentence(f"One small finding is that {finding(*each)}")]
        for each in zip(animals[1:], cities, strict=False)
    ]
    context, spans = _assemble(
        _spread(gold, minor, rng), _scenes(rng, 3), room, _depth(number), "\n"
    )
    return Draft(context, "", [answer], evidence=spans)


def _spread(gold: list[Paragraph], others: list[Paragraph], rng: random.Random) -> list[Paragraph]:
    """Return both in random order."""
    both = [*gold, *others]
    rng.shuffle(both)
    return both


def _few_shot(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """Questions with their types under made-up names; the type of one more is asked for."""
    classes = list(_CLASSES)
    labels = dict(zip(classes, rng.sample(_LABELS, len(_LABELS)), strict=True))

    def question(name: str) -> str:
        tables = {
            "verb": _VERBS,
            "adjective": _ADJECTIVES,
            "thing": _THINGS,
            "job": _JOBS,
            "city": _CITIES,
            "animal": _ANIMALS,
        }
        words = {key: rng.choice(_table(values, seed)) for key, values in tables.items()}
        words["animals"] = _many(words["animal"])
        return rng.choice(_CLASSES[name]).format(**words)

    answer = classes[number % len(classes)]
    asked = question(answer)

    def shots() -> Iterator[Paragraph]:
        while True:
            # Each class in turn, so that the last one seen says nothing.
            for name in rng.sample(classes, len(classes)):
                text = question(name)
                if text != asked:
                    shot = f"Question: {text}\nType: {labels[name]}"
                    yield [Sentence(shot, is_evidence=name == answer)]

    context, spans = _assemble([], shots(), room, 0.0, "\n")
    return Draft(context, asked, [labels[answer]], list(_LABELS), spans)


def _retrieval(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """Numbered paragraphs; which one does this sentence come from?

    The number stands behind its sentence, where an attention head that looks for what followed the
    same words last time finds it: a model of this size cannot look back for a number before them.
    Paragraphs are shuffled, since behind 1, 2 and 3 it would say 4 whatever is asked.
    """
    paragraphs: list[Paragraph] = []
    border = estimate_tokens("\n\n")
    # Longer texts have no more paragraphs than a small model can tell apart, but longer ones.
    sentences = 1 + int(room / 110)

    while True:
        paragraph = [Sentence(_scene(rng)) for _ in range(sentences)]
        paragraph.append(Sentence(f"{_scene(rng).removesuffix('.')} in Paragraph"))
        size = border + sum(estimate_tokens(" " + each.text) for each in paragraph)
        size += estimate_tokens(" 1.")
        if size > room and len(paragraphs) > 1:
            break
        room -= size
        paragraphs.append(paragraph)
    # What is left is filled by sentences in front of the first paragraph's own.
    extra: Paragraph = []
    while room > 7:
        extra.append(Sentence(_scene(rng)))
        room -= estimate_tokens(" " + extra[-1].text)
    chosen = int(_depth(number) * len(paragraphs))
    words = paragraphs[chosen][-1].text.split()
    dropped = rng.randrange(1, len(words) - 3)  # nothing of " in Paragraph", nor the word before
    query = " ".join(word for place, word in enumerate(words[:-1]) if place != dropped)
    labels = rng.sample(range(1, len(paragraphs) + 1), len(paragraphs))
    for place, (paragraph, label) in enumerate(zip(paragraphs, labels, strict=True)):
        paragraph[-1] = Sentence(f"{paragraph[-1].text} {label}.", is_evidence=place == chosen)
    paragraphs[0] = [*extra, *paragraphs[0]]
    context, spans = _joined(paragraphs, "\n\n")
    return Draft(context, query, [f"Paragraph {labels[chosen]}"], evidence=spans)


def _count(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """Paragraphs with repetitions; how many different ones are there?"""
    distinct = 2 + number % 5
    texts: list[str] = []
    while len(texts) < distinct:
        text = _scene(rng)
        if text not in texts:
            texts.append(text)

    def others() -> Iterator[Paragraph]:
        while True:
            yield [Sentence(rng.choice(texts), is_evidence=True)]

    gold = [[Sentence(text, is_evidence=True)] for text in texts]
    context, spans = _assemble(gold, others(), room, _depth(number), "\n\n")
    return Draft(context, "", [str(distinct)], evidence=spans)


def _needle(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """Secret numbers of cities between scenes; one of them is asked for."""
    cities = rng.sample(_table(_CITIES, seed), 4)
    numbers = rng.sample(range(1000, 10000), 4)
    needles = [
        [
            Sentence(_scene(rng)),
            Sentence(f"The secret number of {city} is {secret}.", is_evidence=city == cities[0]),
            Sentence(_scene(rng)),
        ]
        for city, secret in zip(cities, numbers, strict=True)
    ]
    context, spans = _assemble(needles, _scenes(rng, 3), room, _depth(number), "\n")
    return Draft(context, cities[0], [str(numbers[0])], evidence=spans)


def _key_value(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """Eight keys with values, between other lines; one value is asked for."""
    names = _names(rng, seed)
    values = [f"{c} {food}" for c in _table(_COLOURS, seed) for food in _table(_FOODS, seed)]
    rng.shuffle(values)
    key, answer = next(names), values[0]

    def others() -> Iterator[Paragraph]:
        for place, name in enumerate(names):
            # Longer texts have no more keys, but more between them.
            if place < 7:
                yield [Sentence(f'"{name}": "{values[1 + place]}",')]
            yield [Sentence(_scene(rng))]

    gold = [[Sentence(f'"{key}": "{answer}",', is_evidence=True)]]
    context, spans = _assemble(gold, others(), room, _depth(number), "\n")
    return Draft(context, key, [answer], evidence=spans)


@cache
def _source(module: str) -> tuple[str, ...]:
    """Return the lines of a module of the standard library; none if this Python lacks it."""
    found = find_spec(module)
    if found is None or not found.origin:
        return ()
    return tuple(Path(found.origin).read_text(encoding="utf-8").split("\n"))


_IDENTIFIER = re.compile(r"[A-Za-z_]\w{3,}")


def _code(rng: random.Random, room: float, number: int, seed: str) -> Draft:
    """A file of the standard library, cut before a line whose names stand above it."""
    modules = [m for m in (_WARMUP_MODULES if seed == WARM_UP else _MODULES) if _source(m)]
    for module in modules[number % len(modules) :] + modules[: number % len(modules)]:
        if draft := _cut(_source(module), rng, room):
            return draft
    raise ValueError(f"no module is long enough for a context of {room:.0f} tokens.")


@cache
def _line_sizes(lines: tuple[str, ...]) -> list[float]:
    return [estimate_tokens("\n" + line) for line in lines]


def _cut(lines: tuple[str, ...], rng: random.Random, room: float) -> Draft | None:
    """Return the lines before a line that they explain; None if there is no such line."""
    sizes = _line_sizes(lines)
    places = list(range(len(lines)))
    rng.shuffle(places)
    for place in places:
        line = lines[place]
        names = {n for n in _IDENTIFIER.findall(line) if not keyword.iskeyword(n)}
        if not names or not 12 <= len(line.strip()) <= 60 or estimate_tokens(line) > 14:
            continue
        if any(mark in line for mark in ("`", "#", "//", '"', "'")):
            continue
        start = _walk(sizes, place, -1, room)
        shown = lines[start:place]
        if sum(sizes[start:place]) < room or line.strip() in map(str.strip, shown):
            continue
        rare = max(names, key=lambda name: (len(name), name))
        spans, offset = [], 0
        for each in shown:
            if re.search(rf"\b{rare}\b", each):
                spans.append((offset, offset + len(each)))
            offset += len(each) + 1
        # A name that was not used above would have to be guessed.
        if spans and shown[-1].strip():
            return Draft("\n".join(shown), "", [line], evidence=spans)
    return None


@cache
def _topics() -> Mapping[str, str]:
    from pydoc_data.topics import topics

    return topics


@cache
def _topic_words(name: str) -> tuple[list[str], list[float]]:
    """Return the words of a help text, with the white space before them, and their sizes."""
    words = re.findall(r"\s*\S+", _topics()[name])
    return words, [estimate_tokens(word) for word in words]


CONTINUATION_TOKENS = 64


def _continuation(
    rng: random.Random, room: float, number: int, seed: str, tokens: int = CONTINUATION_TOKENS
) -> Draft:
    """A help text, and the `tokens` that come next in it: the loss of those is asked for."""
    names = [n for n in (_WARMUP_TOPICS if seed == WARM_UP else _TOPICS) if n in _topics()]
    turn = names[number % len(names) :] + names[: number % len(names)]
    for name in turn:
        words, sizes = _topic_words(name)
        if sum(sizes) < room + 2 * tokens:
            continue
        last = _walk(sizes, len(sizes), -1, tokens)
        first = _walk(sizes, 0, 1, room)
        middle = rng.randint(first, last)
        start = _walk(sizes, middle, -1, room)
        end = _walk(sizes, middle, 1, tokens)
        context = "".join(words[start:middle]).lstrip()
        answer = "".join(words[middle:end])
        return Draft(context, "", [answer], evidence=[(0, len(context))])
    raise ValueError(f"no help text is long enough for a context of {room:.0f} tokens.")


def _walk(sizes: Sequence[float], place: int, step: int, room: float) -> int:
    """Return how far from `place` the room lasts."""
    while room > 0 and 0 <= place + min(step, 0) < len(sizes):
        room -= sizes[place + min(step, 0)]
        place += step
    return place


KINDS: Mapping[str, Kind] = {
    "docqa": Kind(
        _docqa,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer: {cue}",
        "qa_f1",
        6,
        ("\n", "."),
        aim=0.891,
    ),
    "multihop": Kind(
        _multihop,
        "Answer the question based on the given passages.\n\nThe following are given passages.\n"
        "{context}\n\nAnswer the question based on the given passages.\n\n{input}\n"
        "Answer: {cue}",
        "qa_f1",
        14,
        aim=0.915,
    ),
    "summary": Kind(
        _summary,
        "You are given a report. Write a summary of the report in one sentence.\n\nReport:\n"
        "{context}\n\nNow, write a summary of the report in one sentence.\n\n"
        "Summary: It was found that",
        "rouge_l",
        16,
        aim=0.968,
    ),
    "few-shot": Kind(
        _few_shot,
        "Please determine the type of the question below. Here are some examples of questions.\n\n"
        "{context}\nQuestion: {input}\nType:",
        "classification",
        4,
        aim=1.04,
    ),
    "retrieval": Kind(
        _retrieval,
        "Here are some paragraphs with their numbers.\n\n{context}\n\nThe following sentence is "
        "from one of the paragraphs. Which one?\n\n{input} Paragraph",
        "retrieval",
        4,
        ("\n", "."),
        aim=0.955,
    ),
    "count": Kind(
        _count,
        "There are some paragraphs below. Some of them may be duplicates. Please determine how "
        "many unique paragraphs there are after removing duplicates.\n\n{context}\n\nThe number of "
        "unique paragraphs after removing duplicates is",
        "count",
        4,
        aim=0.882,
    ),
    "code": Kind(
        _code,
        "Please complete the code given below. \n{context}",
        "code_similarity",
        16,
        (),
        0.948,
    ),
    "needle": Kind(
        _needle,
        "Some numbers are hidden within the following text. Remember them.\n\n{context}\n\n"
        "Question: What is the secret number of {input}?\n"
        "Answer: The secret number of {input} is",
        "count",
        6,
        aim=0.97,
    ),
    "key-value": Kind(
        _key_value,
        "Here are keys with their values.\n\n{context}\n\nThe value of one key is asked for.\n\n"
        '"{input}": "',
        "qa_f1",
        8,
        ("\n", '"'),
        aim=0.977,
    ),
    "continuation": Kind(_continuation, "{context}", None, CONTINUATION_TOKENS, (), 0.95),
}


@cache
def make_item(
    kind: str,
    number: int,
    *,
    length: int,
    seed: str = "test",
    shown: Shown = "whole",
    continuation_tokens: int = CONTINUATION_TOKENS,
) -> Item:
    """Return a record; the same for the same arguments.

    Args:
        kind: Name of a kind.
        number: From 0; decides the depth of the evidence, with kind and seed everything else.
        length: Tokens of prompt and answer, about.
        seed: `test`, or `warm-up` for records that share no name, place or text with those.
        shown: What of the context the prompt holds; the record is otherwise the same.
        continuation_tokens: Tokens of a continuation, about.

    Raises:
        ValueError: The length is too short or too long for the kind.
    """
    rule = KINDS[kind]
    is_continued = kind == "continuation"
    aim = rule.aim * (length - (continuation_tokens if is_continued else rule.max_new_tokens))
    before, _, after = rule.template.partition("{context}")
    room = aim - estimate_tokens(before + after)
    if room < 100:
        raise ValueError(f"length {length} leaves no room for a context of '{kind}'.")
    # Kinds differ in their turn, so that the first record of each has its evidence elsewhere.
    turn = number + list(KINDS).index(kind)
    # Twice: what the question takes, and what the borders between pieces do, is known afterwards.
    for _ in range(2):
        # A generator for each record, so that none moves when another one changes.
        rng = random.Random(f"{GENERATOR_SEED} {seed} {kind} {number} {length}")
        if is_continued:
            draft = _continuation(rng, room, turn, seed, continuation_tokens)
        else:
            draft = rule.draft(rng, room, turn, seed)
        end = after.replace("{input}", draft.input).replace("{cue}", draft.cue)
        room += aim - estimate_tokens(before + draft.context + end)
    context, evidence = _shown(draft, shown)
    if not before + end + context:
        context = "\n"  # a model needs one token to begin with
    name = f"{kind}-{number:02}" if seed == "test" else f"{seed}/{kind}-{number}"
    fields: dict[str, Any] = {
        "_id": name,
        "dataset": kind,
        "language": "code" if kind == "code" else "en",
        "prompt": before + context + end,
        "input": draft.input,
        "context": context,
        "answers": draft.answers,
        "all_classes": draft.classes,
        "length": len(context.split()),
        "evidence": [[len(before) + start, len(before) + end] for start, end in evidence],
    }
    return Item(f"longbench-mini/{name}", fields)


def _shown(draft: Draft, shown: Shown) -> tuple[str, list[tuple[int, int]]]:
    """Return what is shown of a context, and the spans of the evidence in it.

    Evidence comes as lines: what stood between two pieces of it is gone.
    """
    if shown == "whole":
        return draft.context, draft.evidence
    lines, spans, place = [], [], 0
    for start, end in draft.evidence if shown == "evidence" else ():
        lines.append(draft.context[start:end])
        spans.append((place, place + end - start))
        place += end - start + 1
    return "\n".join(lines), spans
