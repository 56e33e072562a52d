"""Pictures that are drawn once and never again: for each seed and round the same ones, whatever the method."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.optimisation.crowd import Batch
from benchmarks.procedural import COLUMNS, CONDITIONING, LIGHTS, ROWS, SHAPES, draw_pictures
from diloco.tables import TABLE_SIZE, logit_normal_table
from mmdit.conditioning import encode_caption

TEXT_DROPOUT = 0.1
HELDOUT = 1024
_HELDOUT_SEED = 999_999


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A round's work: volunteers, inner steps of each, and samples of a step."""

    volunteers: int
    steps: int
    batch: int

    @property
    def samples(self) -> int:
        """Samples of a round."""
        return self.volunteers * self.steps * self.batch


class RoundSamples:
    """What is trained on in one round."""

    def __init__(self, seed: int, number: int, shape: Shape) -> None:
        random = np.random.default_rng((seed, number))
        latent, captions = _pictures(random, shape.samples)
        dropped = torch.from_numpy(random.random(shape.samples) < TEXT_DROPOUT)
        text, pooled = _texts()
        texts, pooleds = text[captions].clone(), pooled[captions].clone()
        texts[dropped], pooleds[dropped] = 0.0, 0.0
        noise = torch.from_numpy(random.standard_normal(latent.shape, dtype=np.float32))
        moments = torch.from_numpy(logit_normal_table()[random.integers(0, TABLE_SIZE, shape.samples)])
        self._shape = shape
        self._all = tuple(
            part.view(shape.volunteers, shape.steps, shape.batch, *part.shape[1:])
            for part in (latent, texts, pooleds, noise, moments)
        )

    def of_crowd(self, step: int) -> Batch:
        """Return every volunteer's batch of a step, [V, B, ...]."""
        latent, text, pooled, noise, t = (part[:, step] for part in self._all)
        return latent, text, pooled, noise, t

    def together(self, step: int) -> Batch:
        """Return the same samples as one batch of one volunteer, [1, V B, ...]."""
        latent, text, pooled, noise, t = (part[:, step].flatten(0, 1).unsqueeze(0) for part in self._all)
        return latent, text, pooled, noise, t


@lru_cache(maxsize=1)
def heldout() -> Batch:
    """Return fixed samples that are never trained on, with noise, and timesteps spread evenly over their density."""
    random = np.random.default_rng((_HELDOUT_SEED,))
    latent, captions = _pictures(random, HELDOUT)
    text, pooled = _texts()
    noise = torch.from_numpy(random.standard_normal(latent.shape, dtype=np.float32))
    places = (2 * np.arange(HELDOUT) + 1) * TABLE_SIZE // (2 * HELDOUT)
    return latent, text[captions], pooled[captions], noise, torch.from_numpy(logit_normal_table()[places])


def _pictures(random: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    kinds_N4 = random.integers(0, [len(SHAPES), len(ROWS), len(COLUMNS), len(LIGHTS)], (count, 4))
    pixels_NHW = draw_pictures(kinds_N4.astype(np.float32), random.random((count, 6), dtype=np.float32))
    shape, row, column, light = kinds_N4.T
    captions = ((shape * len(ROWS) + row) * len(COLUMNS) + column) * len(LIGHTS) + light
    return torch.from_numpy(pixels_NHW[:, None] * np.float32(2) - np.float32(1)), torch.from_numpy(captions)


@lru_cache(maxsize=1)
def _texts() -> tuple[Tensor, Tensor]:
    """Return text [N, L, D] and pooled text [N, P] of every caption that there is."""
    captions = [f"{s} {r} {c} {b}" for s in SHAPES for r in ROWS for c in COLUMNS for b in LIGHTS]
    encoded = [encode_caption(caption, CONDITIONING) for caption in captions]
    text = np.zeros((len(captions), CONDITIONING.max_tokens, CONDITIONING.token_dim), dtype=np.float32)
    for place, (tokens, _) in enumerate(encoded):
        text[place, : len(tokens)] = tokens
    return torch.from_numpy(text), torch.from_numpy(np.stack([pooled for _, pooled in encoded]).astype(np.float32))
