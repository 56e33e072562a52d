"""Does a picture show what its caption asks for? Judged from the pixels by rules, without any trained model.

A picture is right if all that the caption names is right: so many things and no more, each of its colour and shape, one
clearly to that side of the other; the word letter by letter, its ink and its ground of their colours.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.skills.prompts import COLOURS, NEUTRAL, Prompt
from benchmarks.skills.reading import LEAST_LIKENESS, read
from benchmarks.skills.seeing import Seen, filled, ground_of, nearest_colour, see
from diloco.tables import Floats
from mmdit.space import ByteImages

_INK_PIXELS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a picture is right, and in words what was seen."""

    right: bool
    saw: str


def judge(prompt: Prompt, picture: ByteImages) -> Verdict:
    """Look at one picture [H, W, 3], uint8."""
    if prompt.word is not None:
        return _judge_word(prompt, picture)
    seen = see(picture)
    asked = Counter(prompt.things) == Counter(each.thing for each in seen)
    right = asked and (prompt.relation is None or _stands(seen, prompt))
    return Verdict(right=right, saw=_in_words(seen))


def judge_all(prompts: Sequence[Prompt], pictures: ByteImages) -> list[Verdict]:
    """Look at each picture of [N, H, W, 3]."""
    return [judge(prompt, picture) for prompt, picture in zip(prompts, pictures, strict=True)]


def _stands(seen: Sequence[Seen], prompt: Prompt) -> bool:
    """Whether the first thing stands to the second as asked: further off that way than the other way."""
    first, second = (next(each for each in seen if each.thing == thing) for thing in prompt.things)
    right, down = second.x - first.x, second.y - first.y
    if prompt.relation in ("left of", "right of"):
        return (right if prompt.relation == "left of" else -right) > abs(down)
    return (down if prompt.relation == "above" else -down) > abs(right)


def _in_words(seen: Sequence[Seen]) -> str:
    return ", ".join(f"{e.thing.colour} {e.thing.shape} at {e.x:.0f},{e.y:.0f}" for e in seen) or "nothing"


def _judge_word(prompt: Prompt, picture: ByteImages) -> Verdict:
    assert prompt.word is not None
    pixels_HWC = picture.astype(np.float32) / np.float32(255)
    ground = ground_of(pixels_HWC)
    ink = _ink_of(pixels_HWC, ground)
    names = (*COLOURS, *NEUTRAL)
    ground_name, ink_name = nearest_colour(ground, names), nearest_colour(ink, names)
    reading = read(filled(pixels_HWC, ground, ink), prompt.word)
    word = reading.word if reading.likeness >= LEAST_LIKENESS else "?"
    right = (word, ink_name, ground_name) == (prompt.word, prompt.ink, prompt.ground)
    return Verdict(right=right, saw=f'"{word}" in {ink_name} on {ground_name}')


def _ink_of(pixels_HWC: Floats, ground: Floats) -> Floats:
    """Return the colour of the pixels that differ most from the ground: strokes are thin, most pixels are mixed."""
    pixels_NC = pixels_HWC.reshape(-1, 3)
    furthest = np.argsort(np.linalg.norm(pixels_NC - ground, axis=1))[-_INK_PIXELS:]
    ink: Floats = np.median(pixels_NC[furthest], axis=0).astype(np.float32)
    # A picture of one colour has no ink; any other colour will do to look for it.
    return ink if np.linalg.norm(ink - ground) > 0.05 else 1 - ground
