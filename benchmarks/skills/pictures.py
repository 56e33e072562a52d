"""Prompts to pictures of 32 x 32 RGB pixels, with all that the caption leaves open drawn at random."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from benchmarks.skills.lettering import FONTS, lettering
from benchmarks.skills.prompts import SHARES, Prompt, training_prompt
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
_RADIUS: Final = 6.2
"""Of every thing in every picture: like letters, shapes come in one size."""
_NEAR, _FAR = 8, 24
"""Where centres stand, in pixels from the left or from above: things stand on a board of two by two."""


_TOP: Final = 7
"""Where a line of letters begins, in rows; it may be moved by `_TOP_MOVES` either way."""
_TOP_MOVES: Final = 2

Places = npt.NDArray[np.int64]


def draw(prompt: Prompt, random: np.random.Generator) -> ByteImages:
    """Return a picture [32, 32, 3] that shows what a prompt asks for."""
    pixels_HWC = _draw_word(prompt, random) if prompt.word is not None else _draw_things(prompt, random)
    drawn: ByteImages = np.rint(np.clip(pixels_HWC, 0, 1) * np.float32(255)).astype(np.uint8)
    return drawn


def draw_many(seed: tuple[int, ...], count: int, shares: Sequence[float] = SHARES) -> tuple[list[Prompt], ByteImages]:
    """Return training prompts and their pictures [N, 32, 32, 3]; a seed gives the same ones every time."""
    random = np.random.default_rng(seed)
    prompts = [training_prompt(random, shares=shares) for _ in range(count)]
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
    for thing, (x, y) in zip(prompt.things, _places(prompt, random), strict=True):
        pixels_HWC = _over(pixels_HWC, coverage(thing.shape, SIDE, float(x), float(y), _RADIUS), tints[thing.colour])
    return pixels_HWC


def _places(prompt: Prompt, random: np.random.Generator) -> Places:
    """Return the centres [N, 2] of the things, x and y: each in a cell of its own, and standing as the caption says."""
    if prompt.relation is None:
        cells = np.array([(x, y) for x in (_NEAR, _FAR) for y in (_NEAR, _FAR)])
        return cells[random.permutation(len(cells))[: len(prompt.things)]]
    first, second = (_NEAR, _FAR) if prompt.relation in ("left of", "above") else (_FAR, _NEAR)
    line = (_NEAR, _FAR)[int(random.integers(2))]
    if prompt.relation in ("left of", "right of"):
        return np.array([(first, line), (second, line)])
    return np.array([(line, first), (line, second)])


def _tint(colour: str, random: np.random.Generator) -> Floats:
    return np.asarray(RGB[colour], dtype=np.float32) + np.float32(random.uniform(-_JITTER, _JITTER))


def _over(pixels_HWC: Floats, filled_HW: Floats, tint_C: Floats) -> Floats:
    return pixels_HWC + filled_HW[..., None] * (tint_C - pixels_HWC)
