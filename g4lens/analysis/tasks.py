"""What the bundled model knows: facts, names, repetition, drawn pictures and made sounds.

Every generator takes a `random.Random` and a split, and gives one `Example`: the parts of a prompt
and the one token that continues it. What is held out for validation and for the test is never
trained on:

    capital      one phrasing for each country
    names        a tenth of the pairs of names, in either order
    induction    fresh random words
    pictures and sounds   drawn and played with other seeds

The pictures are 384 x 384 pixels: a figure in each corner. The sounds last 0.8 s at 16 kHz: one to
four beeps of one note.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "validation", "test"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo",
    "China": "Beijing", "Egypt": "Cairo", "Greece": "Athens", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw", "Austria": "Vienna",
    "Hungary": "Budapest", "Portugal": "Lisbon", "Ireland": "Dublin", "Russia": "Moscow",
    "India": "Delhi", "Thailand": "Bangkok", "Vietnam": "Hanoi", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Kenya": "Nairobi", "Ghana": "Accra", "Iran": "Tehran", "Iraq": "Baghdad",
    "Syria": "Damascus", "Canada": "Ottawa", "Denmark": "Copenhagen", "Belgium": "Brussels",
    "Turkey": "Ankara", "Nepal": "Kathmandu", "Jordan": "Amman", "Lebanon": "Beirut",
    "Qatar": "Doha",
}  # fmt: skip
COUNTRIES = tuple(CAPITALS)
PHRASINGS = (
    "The capital of {} is",
    "The capital city of {} is",
    "In {} the capital is",
    "People in {} call their capital",
    "Of {} the capital city is",
    "The city that rules {} is",
    "If you go to {}, the capital is",
)

NAMES = _words(
    "Mary John Tom Anna Bob Lucy James Emma Paul Sara Mark Jane Peter Kate David Alice Henry Rose "
    "Simon Laura Adam Nora Luke Ella Jack Clara Oscar Julia Felix Irene Victor Helen Martin Sophie "
    "Daniel Grace Edward Fiona George Wendy Hugo Iris Leo Maya Noah Olga Ruth Ivan"
)
PLACES = _words("shop park school garden house office museum station market beach")
THINGS = _words("drink book ball ring key map gift cake coin pen")
GIVING = (
    "When {a} and {b} went to the {place}, {giver} gave a {thing} to",
    "While {a} and {b} were at the {place}, {giver} gave a {thing} to",
)

WORDS = _words(
    "apple river stone cloud tiger lemon horse table chair bread grass metal paper water light "
    "night storm ocean field forest music dance brush candle bottle window ladder mirror pillow "
    "basket hammer needle button ribbon feather anchor barrel canvas dragon eagle falcon harbor "
    "island jacket kettle lantern magnet nickel parrot rabbit saddle temple velvet walnut zebra "
    "copper desert engine fabric guitar helmet insect jungle knight nectar oyster pepper rocket "
    "silver turtle violin wagon acorn badge cabin daisy ember flute grape honey ivory jelly lilac "
    "mango nylon olive pearl queen scarf tulip wheat yacht bridge castle valley winter summer "
    "spring autumn morning evening mother father sister brother friend doctor teacher farmer "
    "sailor baker painter singer writer king prince child woman man girl boy dog cat bird fish "
    "cow sheep goat mouse lion bear wolf fox snake frog bee ant tree leaf flower seed root fruit "
    "nut rice corn milk cheese butter sugar salt soup meat egg tea coffee juice wine hand foot "
    "head eye ear nose mouth arm leg heart bone hair skin face back door wall roof floor room bed "
    "lamp clock phone letter word story song game toy box bag cup plate knife fork spoon glass "
    "road street car train ship boat plane wheel rain snow wind sun moon star sky earth fire ice "
    "sand hill lake sea world time day year week hour name number line point side part place "
    "thing work home way life money big small long short high low old new young good bad hot cold "
    "warm dry wet soft hard fast slow full empty open close happy sad quiet loud bright dark "
    "clean dirty sweet sour rich poor strong weak run walk sit stand sleep eat cook read write "
    "speak hear see look find lose give take make break build buy sell pay send bring carry hold "
    "push pull throw catch jump swim fly climb fall grow turn stop start begin end help love like "
    "want need know think learn teach play laugh cry wait live black white brown grey pink gold "
    "five six seven eight nine ten first second third last north south east west"
)

COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.60, 0.18),
    "blue": (0.12, 0.22, 0.86),
    "yellow": (0.95, 0.84, 0.10),
    "purple": (0.55, 0.12, 0.62),
}
SHAPES = ("circle", "triangle", "cross")
CORNERS = ("top left", "top right", "bottom left", "bottom right")
TILE = 192  # pixels a side; a picture is two by two tiles

RATE = 16_000
SECONDS = 0.8
NOTES = {"C": 523.25, "D": 587.33, "E": 659.26, "F": 698.46, "G": 783.99, "A": 880.0}  # Hz
COUNTS = ("one", "two", "three", "four")

VOCABULARY = tuple(
    dict.fromkeys(
        [
            *COUNTRIES,
            *CAPITALS.values(),
            *NAMES,
            *PLACES,
            *THINGS,
            *COLOURS,
            *SHAPES,
            *COUNTS,
            *WORDS,
        ]
    )
)


@dataclass(frozen=True)
class Figure:
    """A coloured shape."""

    colour: str
    shape: str

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One corner of a picture, a little different each time: uint8 `[192, 192, 3]`."""
        fine = (np.arange(2 * TILE) + 0.5) / 2  # two samples a pixel smooth the edge
        radius = rng.uniform(64, 76)
        centre_y, centre_x = TILE / 2 + rng.uniform(-10, 10, 2)
        y, x = np.meshgrid((fine - centre_y) / radius, (fine - centre_x) / radius, indexing="ij")
        inside = _covers(self.shape, x, y).reshape(TILE, 2, TILE, 2).mean((1, 3))[..., None]
        ink = np.array(COLOURS[self.colour]) * rng.uniform(0.88, 1.1) + rng.normal(0, 0.02, 3)
        ground = rng.uniform(0.88, 1.0)
        tile = ground + inside * (ink - ground) + rng.normal(0, 0.02, (TILE, TILE, 3))
        return (tile.clip(0, 1) * 255).round().astype(np.uint8)


def _covers(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points of the plane are inside the shape of radius one; y grows downwards."""
    if shape == "circle":
        return x**2 + y**2 < 1
    if shape == "triangle":
        return (y < 0.8) & (np.abs(x) < (y + 1) * 0.58)
    arm, across = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return (arm < 1) & (across < 0.3)


@dataclass(frozen=True)
class Picture:
    """Four figures, in the order of `CORNERS`."""

    corners: tuple[Figure, ...]

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """The picture: uint8 `[384, 384, 3]`."""
        tiles = [corner.draw(rng) for corner in self.corners]
        return np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)])


@dataclass(frozen=True)
class Beeps:
    """One to four beeps of one note."""

    note: str
    count: int

    def play(self, rng: np.random.Generator) -> np.ndarray:
        """The sound, a little different each time: float32 `[12800]` at 16 kHz, -1 to 1."""
        n = round(SECONDS * RATE)
        wave = rng.normal(0, rng.uniform(0.001, 0.004), n)
        time = np.arange(RATE // 10) / RATE
        envelope = np.minimum(1, np.minimum(time, time[::-1]) / 0.008)
        loudness, pitch = rng.uniform(0.2, 0.5), NOTES[self.note] * rng.uniform(0.995, 1.005)
        first = rng.uniform(0.01, 0.05)
        for i in range(self.count):
            at = round((first + 0.19 * i + rng.uniform(-0.006, 0.006)) * RATE)
            tone = np.sin(2 * np.pi * (pitch * time + rng.uniform()))
            wave[at : at + len(time)] += loudness * envelope * tone
        return wave.clip(-1, 1).astype(np.float32)


Part = str | Picture | Beeps


@dataclass(frozen=True)
class Example:
    """A prompt and the token that continues it.

    Attributes:
        task: what it tests.
        parts: texts, pictures and sounds in the prompt's order.
        answer: the continuation, a single token with its leading space.
    """

    task: str
    parts: tuple[Part, ...]
    answer: str


@dataclass(frozen=True)
class Question:
    """Something to ask, the one-word answer, and the answer as a sentence."""

    task: str
    text: str
    answer: str
    sentence: str


def capital(rng: random.Random, split: Split) -> Example:
    """A country's capital, in a phrasing of the split."""
    while True:
        country = rng.randrange(len(COUNTRIES))
        phrasing = rng.randrange(len(PHRASINGS))
        if _phrasing_split(country, phrasing) == split:
            name = COUNTRIES[country]
            return Example("capital", (PHRASINGS[phrasing].format(name),), " " + CAPITALS[name])


def _phrasing_split(country: int, phrasing: int) -> Split:
    """The first phrasing is always trained; of the others each country has one held out twice."""
    others = len(PHRASINGS) - 1
    if phrasing == 1 + country % others:
        return "validation"
    return "test" if phrasing == 1 + (country + others // 2) % others else "train"


def giving(rng: random.Random, split: Split) -> Example:
    """Of two names the one that is not repeated receives something (Wang et al. 2022)."""
    while True:
        first, second = rng.sample(range(len(NAMES)), 2)
        if _pair_split(first, second) == split:
            return giving_between(rng, NAMES[first], NAMES[second])


def giving_between(rng: random.Random, first: str, second: str) -> Example:
    """The same with these two names, in this order; who gives is random."""
    giver, receiver = rng.sample((first, second), 2)
    text = rng.choice(GIVING).format(
        a=first, b=second, giver=giver, place=rng.choice(PLACES), thing=rng.choice(THINGS)
    )
    return Example("names", (text,), " " + receiver)


def _pair_split(first: int, second: int) -> Split:
    """Depends on the pair, not on its order."""
    digit = (7 * (first + second) + first * second) % 10
    return "validation" if digit == 3 else "test" if digit == 6 else "train"


def repetition(rng: random.Random, period: int) -> Example:
    """Random words, said again: the next word is the one that followed last time."""
    words = rng.sample(VOCABULARY, period)
    n_again = rng.randrange(1, period)
    text = "".join(" " + word for word in words + words[:n_again])
    return Example(f"induction {period}", (text,), " " + words[n_again])


def random_picture(rng: random.Random) -> Picture:
    """A figure of any colour and shape in each corner."""
    colours, shapes = list(COLOURS), SHAPES
    return Picture(tuple(Figure(rng.choice(colours), rng.choice(shapes)) for _ in CORNERS))


def random_beeps(rng: random.Random) -> Beeps:
    """Any note, any number."""
    return Beeps(rng.choice(list(NOTES)), rng.randint(1, len(COUNTS)))


def questions(picture: Picture | None, beeps: Beeps | None) -> list[Question]:
    """Everything that can be asked about a picture, a sound, or both."""
    asked = []
    for corner, figure in zip(CORNERS, picture.corners if picture else (), strict=False):
        for task, answer in (("colour", figure.colour), ("shape", figure.shape)):
            text, sentence = (
                f"What {task} is the {corner} corner?",
                f"The {corner} corner is {answer}.",
            )
            asked.append(Question(task, text, answer, sentence))
    if beeps:
        count = COUNTS[beeps.count - 1]
        asked.append(
            Question("note", "What note is heard?", beeps.note, f"The note heard is {beeps.note}.")
        )
        asked.append(
            Question("beeps", "How many beeps are heard?", count, f"The beeps heard are {count}.")
        )
    if picture and beeps:
        corner, colour = CORNERS[beeps.count - 1], picture.corners[beeps.count - 1].colour
        text = "What colour is the corner that the beeps count?"
        asked.append(Question("colour by beeps", text, colour, f"The {corner} corner is {colour}."))
    return asked


def asking(task: str, *, picture: bool = False, beeps: bool = False) -> Callable[..., Example]:
    """The generator of one kind of question about a random picture, a random sound, or both."""

    def generate(rng: random.Random, split: Split = "test") -> Example:
        shown = random_picture(rng) if picture else None
        heard = random_beeps(rng) if beeps else None
        question = rng.choice([q for q in questions(shown, heard) if q.task == task])
        parts = tuple(part for part in (shown, heard, question.text) if part is not None)
        return Example(task, parts, " " + question.answer)

    return generate


TASKS: dict[str, Callable[[random.Random, Split], Example]] = {
    "capital": capital,
    "names": giving,
    "induction 8": lambda rng, split: repetition(rng, 8),
    "induction 20": lambda rng, split: repetition(rng, 20),
    "induction 28": lambda rng, split: repetition(rng, 28),
    "colour": asking("colour", picture=True),
    "shape": asking("shape", picture=True),
    "note": asking("note", beeps=True),
    "beeps": asking("beeps", beeps=True),
    "colour by beeps": asking("colour by beeps", picture=True, beeps=True),
}
