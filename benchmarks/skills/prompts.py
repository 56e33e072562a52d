"""What is asked for: four skills, their captions, and the combinations that training never sees together.

    colour     a red circle
    count      three blue squares
    position   a green triangle left of a yellow circle
    spelling   the word "cat" in white on blue

A combination is held out by what the picture would show, not by how it is said: with "a circle left of a triangle" goes
"a triangle right of a circle".
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

Skill = Literal["colour", "count", "position", "spelling"]
SKILLS: Final[tuple[Skill, ...]] = ("colour", "count", "position", "spelling")
SHARES: Final = (0.10, 0.15, 0.27, 0.48)
"""How much of the training each skill gets at first, in the order of `SKILLS`."""
LATER_SHARES: Final = (0.06, 0.12, 0.50, 0.32)
"""And once shapes and letters are drawn, when what is left to learn is who stands where."""

COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES: Final = ("circle", "square", "triangle", "cross", "ring", "heart")
NUMBERS: Final = {2: "two", 3: "three", 4: "four"}
RELATIONS: Final = ("left of", "right of", "above", "below")
NEUTRAL: Final = ("white", "black")

HELD_COLOURS: Final = frozenset(
    {
        ("red", "heart"),
        ("green", "cross"),
        ("blue", "circle"),
        ("yellow", "triangle"),
        ("purple", "square"),
        ("orange", "ring"),
    }
)
"""No training picture, of whatever skill, has one of these in it."""
HELD_COUNTS: Final = frozenset({(2, "cross"), (2, "heart"), (3, "circle"), (3, "ring"), (4, "square"), (4, "triangle")})
HELD_BESIDE: Final = frozenset((left, SHAPES[(i + 2) % 6]) for i, left in enumerate(SHAPES))
"""The left and the right shape of two that stand side by side."""
HELD_STACKED: Final = frozenset((upper, SHAPES[(i + 4) % 6]) for i, upper in enumerate(SHAPES))
"""The upper and the lower shape of two that stand one above the other."""
# The low contrast of the rest would test eyes, not spelling.
INKS: Final = tuple(
    pair
    for colour in COLOURS
    for neutral in NEUTRAL
    for pair in ((neutral, colour), (colour, neutral))
    if {colour, neutral} not in ({"yellow", "white"}, {"orange", "white"}, {"blue", "black"}, {"purple", "black"})
)
"""Colours of the letters and of the ground behind them."""

_WORDS: Final = """\
ace act age air ant ape apt arm art ash ask axe bag bat bay bed bee big bit box boy bud bug bus cab can cap car cat
cow cub cup day den dew dig dip dog dot dry ear eel egg elk elm end eye fan far fig fin fir fly fog fox fun fur gap
gem gum hat hay hen hid hip hop hot hug ice ink ivy jam jar jaw jet job joy jug key kid kit lap law leg lid lip log
map mat mix mud mug nap net new nod nut oak oar oat odd oil old one orb owl pan paw pea peg pen pet pie pig pin pit
pod pot ram rat raw red rib rod row rug rye sap saw sea sky sly sow spy sum sun tea ten tie tin toe top toy tub two
urn use van vet vow wag war wax way web wet wig win wit yak yam yes zip zoo
"""
HELD_WORDS: Final = tuple(_WORDS.split())
"""No training picture spells one of these; any other three letters may come."""
_HELD_WORDS: Final = frozenset(HELD_WORDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A shape of a colour."""

    colour: str
    shape: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One caption and what it asks for.

    Args:
        things: in the caption's order; several of one kind for a count; none if it asks for a word.
        relation: how the first thing stands to the second, if the caption says so.
        word: three letters, with the colours of ink and ground.
    """

    skill: Skill
    caption: str
    things: tuple[Thing, ...] = ()
    relation: str | None = None
    word: str | None = None
    ink: str = ""
    ground: str = ""

    @property
    def is_held_out(self) -> bool:
        """Whether training must not see it."""
        if self.word is not None:
            return self.word in _HELD_WORDS
        if any((thing.colour, thing.shape) in HELD_COLOURS for thing in self.things):
            return True
        if self.relation is None:
            return (len(self.things), self.things[0].shape) in HELD_COUNTS
        shapes = tuple(thing.shape for thing in self.things)
        if self.relation in ("right of", "below"):
            shapes = shapes[::-1]
        return shapes in (HELD_BESIDE if self.relation in ("left of", "right of") else HELD_STACKED)


def coloured(thing: Thing) -> Prompt:
    """Ask for one thing."""
    return Prompt(skill="colour", caption=_one(thing), things=(thing,))


def counted(number: int, thing: Thing) -> Prompt:
    """Ask for two to four things of one kind."""
    plural = f"{thing.shape}{'es' if thing.shape == 'cross' else 's'}"
    caption = f"{NUMBERS[number]} {thing.colour} {plural}"
    return Prompt(skill="count", caption=caption, things=(thing,) * number)


def placed(first: Thing, relation: str, second: Thing) -> Prompt:
    """Ask for one thing beside, above or below another one."""
    caption = f"{_one(first)} {relation} {_one(second)}"
    return Prompt(skill="position", caption=caption, things=(first, second), relation=relation)


def spelt(word: str, ink: str, ground: str) -> Prompt:
    """Ask for a word."""
    return Prompt(
        skill="spelling", caption=f'the word "{word}" in {ink} on {ground}', word=word, ink=ink, ground=ground
    )


def training_prompt(
    random: np.random.Generator, skill: Skill | None = None, shares: Sequence[float] = SHARES
) -> Prompt:
    """Draw a prompt that is not held out; of one skill, or of all by their shares."""
    chosen = skill or SKILLS[int(np.searchsorted(np.cumsum(shares)[:-1], random.random(), side="right"))]
    while (prompt := _any(random, chosen)).is_held_out:
        pass
    return prompt


def heldout_prompts(random: np.random.Generator, skill: Skill, count: int) -> list[Prompt]:
    """Return prompts of held-out combinations, each combination as often as any other, give or take one.

    Only what the skill is about is held out: a count is of things whose colour and shape training has seen.
    """
    rounds = _heldout_rounds(random, skill)
    return [next(rounds) for _ in range(count)]


def almost(random: np.random.Generator, prompt: Prompt) -> Prompt:
    """Return a prompt that differs in one point: a colour, a shape, a number by one, who stands where, or a letter."""
    if prompt.word is not None:
        place = int(random.integers(3))
        others = [letter for letter in string.ascii_lowercase if letter != prompt.word[place]]
        letter = others[int(random.integers(len(others)))]
        return spelt(prompt.word[:place] + letter + prompt.word[place + 1 :], prompt.ink, prompt.ground)
    first = prompt.things[0]
    if prompt.relation is not None:
        return placed(prompt.things[1], prompt.relation, first)
    if len(prompt.things) > 1:
        other = {2: 3, 3: 2 + 2 * int(random.integers(2)), 4: 3}[len(prompt.things)]
        return counted(other, first)
    if random.integers(2):
        return coloured(Thing(colour=_another(random, COLOURS, first.colour), shape=first.shape))
    return coloured(Thing(colour=first.colour, shape=_another(random, SHAPES, first.shape)))


def _another(random: np.random.Generator, names: tuple[str, ...], than: str) -> str:
    others = [name for name in names if name != than]
    return others[int(random.integers(len(others)))]


def _heldout_rounds(random: np.random.Generator, skill: Skill) -> Iterator[Prompt]:
    while True:
        if skill == "colour":
            ordered = [coloured(Thing(colour=colour, shape=shape)) for colour, shape in sorted(HELD_COLOURS)]
        elif skill == "count":
            ordered = [counted(number, _thing(random, shape)) for number, shape in sorted(HELD_COUNTS)]
        elif skill == "position":
            ordered = [_stood(random, pair, beside=True) for pair in sorted(HELD_BESIDE)]
            ordered += [_stood(random, pair, beside=False) for pair in sorted(HELD_STACKED)]
        else:
            ordered = [spelt(word, *INKS[int(random.integers(len(INKS)))]) for word in HELD_WORDS]
        yield from (ordered[int(i)] for i in random.permutation(len(ordered)))


def _stood(random: np.random.Generator, pair: tuple[str, str], *, beside: bool) -> Prompt:
    first, second = _two(random, *pair)
    if random.integers(2):
        return placed(first, "left of" if beside else "above", second)
    return placed(second, "right of" if beside else "below", first)


def _any(random: np.random.Generator, skill: Skill) -> Prompt:
    if skill == "spelling":
        letters = random.integers(len(string.ascii_lowercase), size=3)
        return spelt("".join(string.ascii_lowercase[i] for i in letters), *INKS[int(random.integers(len(INKS)))])
    shapes = [SHAPES[i] for i in random.integers(len(SHAPES), size=2)]
    if skill == "colour":
        return coloured(_thing(random, shapes[0]))
    if skill == "count":
        return counted(int(random.integers(2, 5)), _thing(random, shapes[0]))
    first, second = _two(random, *shapes)
    return placed(first, RELATIONS[int(random.integers(len(RELATIONS)))], second)


def _thing(random: np.random.Generator, shape: str, *, other_than: str = "") -> Thing:
    """Return a shape in a colour that it has in training."""
    colours = [c for c in COLOURS if (c, shape) not in HELD_COLOURS and c != other_than]
    return Thing(colour=colours[int(random.integers(len(colours)))], shape=shape)


def _two(random: np.random.Generator, first: str, second: str) -> tuple[Thing, Thing]:
    """Return two shapes in different colours."""
    thing = _thing(random, first)
    return thing, _thing(random, second, other_than=thing.colour)


def _one(thing: Thing) -> str:
    article = "an" if thing.colour == "orange" else "a"
    return f"{article} {thing.colour} {thing.shape}"
