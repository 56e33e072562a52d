"""Prompts to pictures of 32 x 32 RGB pixels, with all that the caption leaves open drawn at random."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.skills.lettering import FONTS, lettering
from benchmarks.skills.prompts import Prompt, training_prompt
from benchmarks.skills.shapes import coverage
from commonweight.png import png_bytes
from diloco.tables import Floats
from mmdit.space import ByteImages

SIDE: Final = 32
RGB: Final[Mapping[str, tuple[float, float, float]]] = {
    "red": (0.88, 0.14, 0.16),
    "green": (0.14, 0.64, 0.22),
    "blue": (0.14, 0.32, 0.88),
    "yellow": (0.98, 0.86, 0.16),
    "purple": (0.60, 0.20, 0.76),
    "orange": (0.98, 0.52, 0.08),
    "white": (0.96, 0.96, 0.96),
    "black": (0.07, 0.07, 0.07),
}
_JITTER: Final = 0.05
_GAP: Final = 1.6
"""Pixels left free between two things, and between a thing and the edge half as many."""
_RADII: Final[Mapping[int, tuple[float, float]]] = {1: (7.0, 10.0), 2: (5.0, 6.6), 3: (4.6, 5.8), 4: (4.2, 5.2)}
"""Of the things in a picture with so many."""


_TOP: Final = 7
"""Where a line of letters begins, in rows; it may be moved by `_TOP_MOVES` either way."""
_TOP_MOVES: Final = 2
_TRIES: Final = 64
"""Places drawn at once, of which the first that will do is taken."""

Doubles = npt.NDArray[np.float64]
Trues = npt.NDArray[np.bool_]


def draw(prompt: Prompt, random: np.random.Generator) -> ByteImages:
    """Return a picture [32, 32, 3] that shows what a prompt asks for."""
    pixels_HWC = _draw_word(prompt, random) if prompt.word is not None else _draw_things(prompt, random)
    drawn: ByteImages = np.rint(np.clip(pixels_HWC, 0, 1) * np.float32(255)).astype(np.uint8)
    return drawn


def draw_many(seed: tuple[int, ...], count: int) -> tuple[list[Prompt], ByteImages]:
    """Return training prompts and their pictures [N, 32, 32, 3]; a seed gives the same ones every time."""
    random = np.random.default_rng(seed)
    prompts = [training_prompt(random) for _ in range(count)]
    return prompts, np.stack([draw(prompt, random) for prompt in prompts])


def write_folder(folder: Path, seed: int, count: int) -> None:
    """Write training pictures and captions as `commonweight data prepare` reads them: 000000.png and 000000.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts, pictures = draw_many((seed,), count)
    for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        (folder / f"{number:06d}.png").write_bytes(png_bytes(picture))
        (folder / f"{number:06d}.txt").write_text(f"{prompt.caption}\n", encoding="utf-8")


def _draw_word(prompt: Prompt, random: np.random.Generator) -> Floats:
    assert prompt.word is not None
    ink_YX, down, right = lettering(prompt.word, FONTS[int(random.integers(len(FONTS)))])
    rows, columns = ink_YX.shape
    top = _TOP + down + int(random.integers(-_TOP_MOVES, _TOP_MOVES + 1))
    left = min(max(0, right + 1 + int(random.integers(2))), SIDE - columns)
    filled_HW = np.zeros((SIDE, SIDE), dtype=np.float32)
    filled_HW[top : top + rows, left : left + columns] = ink_YX
    ground_HWC = np.broadcast_to(_tint(prompt.ground, random), (SIDE, SIDE, 3))
    return _over(ground_HWC, filled_HW, _tint(prompt.ink, random))


def _draw_things(prompt: Prompt, random: np.random.Generator) -> Floats:
    level = random.uniform(0.05, 0.2) if random.integers(2) else random.uniform(0.82, 0.96)
    pixels_HWC = np.full((SIDE, SIDE, 3), level, dtype=np.float32)
    tints = {thing.colour: _tint(thing.colour, random) for thing in prompt.things}
    for thing, (x, y, radius) in zip(prompt.things, _places(prompt, random), strict=True):
        pixels_HWC = _over(pixels_HWC, coverage(thing.shape, SIDE, x, y, radius), tints[thing.colour])
    return pixels_HWC


def _places(prompt: Prompt, random: np.random.Generator) -> list[tuple[float, float, float]]:
    """Return centre and radius of each thing: apart from each other, and standing as the caption says."""
    count = len(prompt.things)
    while True:
        radii_KN = random.uniform(*_RADII[count], (_TRIES, 1)) * random.uniform(0.92, 1.08, (_TRIES, count))
        low_KN, high_KN = radii_KN + _GAP / 2, SIDE - radii_KN - _GAP / 2
        places_KN2 = random.uniform(low_KN[..., None], high_KN[..., None], (_TRIES, count, 2))
        found = np.flatnonzero(_are_apart(places_KN2, radii_KN) & _stand(places_KN2, prompt.relation))
        if len(found):
            chosen = zip(places_KN2[found[0]], radii_KN[found[0]], strict=True)
            return [(float(x), float(y), float(radius)) for (x, y), radius in chosen]


def _are_apart(places_KN2: Doubles, radii_KN: Doubles) -> Trues:
    away_KNN = np.abs(places_KN2[:, :, None] - places_KN2[:, None]).max(3)
    needed_KNN = radii_KN[:, :, None] + radii_KN[:, None] + _GAP
    apart_KNN: Trues = (away_KNN >= needed_KNN) | np.eye(radii_KN.shape[1], dtype=bool)
    together_K: Trues = np.all(apart_KNN, axis=(1, 2))
    return together_K


def _stand(places_KN2: Doubles, relation: str | None) -> Trues:
    """Whether the first stands to the second as it should, and clearly: at most half as far off the other way."""
    if relation is None:
        return np.ones(len(places_KN2), dtype=bool)
    right_K, down_K = (places_KN2[:, 1] - places_KN2[:, 0]).T
    along_K = {"left of": right_K, "right of": -right_K, "above": down_K, "below": -down_K}[relation]
    across_K = down_K if relation in ("left of", "right of") else right_K
    stand_K: Trues = along_K > 2 * np.abs(across_K)
    return stand_K


def _tint(colour: str, random: np.random.Generator) -> Floats:
    return np.asarray(RGB[colour], dtype=np.float32) + np.float32(random.uniform(-_JITTER, _JITTER))


def _over(pixels_HWC: Floats, filled_HW: Floats, tint_C: Floats) -> Floats:
    return pixels_HWC + filled_HW[..., None] * (tint_C - pixels_HWC)
