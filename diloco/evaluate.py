"""Losses on held-out pictures: the same (picture, timestep, noise) triples every time, so that checkpoints compare.

Not canonical: the last digits depend on the machine.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from diloco.shards import ShardSet
from diloco.streams import Stream
from diloco.tables import TABLE_SIZE, Floats, logit_normal_table
from mmdit.config import MMDiTConfig
from mmdit.flow import flow_loss_B
from mmdit.transformer import build


@dataclass(frozen=True, slots=True, kw_only=True)
class TripleLoss:
    """The velocity loss of one (picture, timestep, noise) triple, and its timestep t, 0 being the picture itself."""

    t: float
    loss: float


VALIDATION_LEVELS: Final = 8
"""Timesteps of the validation loss lie an eighth apart; that of pure noise is left out."""


def validation_loss(
    config: MMDiTConfig,
    weights: Mapping[str, Floats],
    shards: ShardSet,
    seed: bytes,
    *,
    count: int,
    batch: int,
    max_tokens: int,
    device: str,
) -> float:
    """Return the mean velocity loss at the timesteps 1/8, 2/8, ... 7/8: a run's headline number.

    It falls smoothly with training and with the size of the model, and goes with what people prefer (Stable Diffusion
    3, arXiv 2403.03206, section 5.3). Pictures and noise are fixed as in `heldout_losses`; the j-th triple has the
    level j mod 7.

    Args:
        seed: 32 bytes, fixed for the run.
        count: triples, a multiple of 7.
        batch: triples evaluated at once; does not choose the triples.

    Raises:
        ValueError: `count` gives the levels different numbers of triples.
    """
    levels = VALIDATION_LEVELS - 1
    if count < 1 or count % levels:
        raise ValueError(f"count is {count}; it must be a multiple of {levels}, so that every timestep counts alike")
    times = np.array([(1 + j % levels) / VALIDATION_LEVELS for j in range(count)], dtype=np.float32)
    triples = _losses(config, weights, shards, seed, times, batch=batch, max_tokens=max_tokens, device=device)
    return math.fsum(triple.loss for triple in triples) / count


def heldout_loss(
    config: MMDiTConfig,
    weights: Mapping[str, Floats],
    shards: ShardSet,
    seed: bytes,
    *,
    count: int,
    batch: int,
    max_tokens: int,
    device: str,
) -> float:
    """Return the mean velocity loss over `count` fixed triples of held-out samples; see `heldout_losses`."""
    triples = heldout_losses(
        config, weights, shards, seed, count=count, batch=batch, max_tokens=max_tokens, device=device
    )
    return math.fsum(triple.loss for triple in triples) / len(triples)


def heldout_losses(
    config: MMDiTConfig,
    weights: Mapping[str, Floats],
    shards: ShardSet,
    seed: bytes,
    *,
    count: int,
    batch: int,
    max_tokens: int,
    device: str,
) -> list[TripleLoss]:
    """Return the velocity losses of `count` fixed triples, in the order of their timesteps.

    Pictures are a fixed random permutation of the shards' samples (repeated if `count` is larger); the j-th one gets
    the (j + 1/2) / count quantile of the training density of timesteps, so that timesteps add no variance. The j-th
    triple is the same for all weights: losses before and after a delta can be compared pair by pair. Where a picture
    was taken down, its triples take the next one that is left; the others stay as they were.

    Args:
        seed: 32 bytes, fixed for the run.
        count: triples; a few hundred make the loss comparable to a per cent.
        batch: triples evaluated at once; does not choose the triples.
    """
    times = logit_normal_table()[[(2 * j + 1) * TABLE_SIZE // (2 * count) for j in range(count)]]
    return _losses(config, weights, shards, seed, times, batch=batch, max_tokens=max_tokens, device=device)


def _losses(
    config: MMDiTConfig,
    weights: Mapping[str, Floats],
    shards: ShardSet,
    seed: bytes,
    times: Floats,
    *,
    batch: int,
    max_tokens: int,
    device: str,
) -> list[TripleLoss]:
    """Return the losses of one triple for each timestep."""
    model = build(config, weights, device=device).eval()
    count = len(times)
    indices = _pictures(seed, shards)
    noise_stream = Stream(seed, "noise")
    losses: list[TripleLoss] = []
    with torch.inference_mode():
        for start in range(0, count, batch):
            places = range(start, min(start + batch, count))
            latent, text, pooled = shards.batch([indices[j % len(indices)] for j in places], max_tokens)
            noise = np.stack([noise_stream.normal(0, j, latent[0].numel()) for j in places])
            t = times[list(places)]
            inputs = (latent, text, pooled, torch.from_numpy(noise).view_as(latent), torch.from_numpy(t))
            values = flow_loss_B(model, *(tensor.to(device) for tensor in inputs)).tolist()
            losses += [TripleLoss(t=moment, loss=loss) for moment, loss in zip(t.tolist(), values, strict=True)]
    return losses


def _pictures(seed: bytes, shards: ShardSet) -> list[int]:
    """Return which of the samples that are left each triple shows, as many as there were before any was taken down."""
    places = shards.places_left()
    order = [places[i] for i in _permutation(seed, len(places))]
    following = next(place for place in order if place is not None)  # after the last one the first comes again
    for rank in reversed(range(len(order))):
        place = order[rank]
        if place is not None:
            following = place
        order[rank] = following
    return [place for place in order if place is not None]


def _permutation(seed: bytes, n: int) -> list[int]:
    order = Stream(seed, "order").words(0, 0, n)
    # Equal words are one in 2^64; a stable sort makes even them unambiguous.
    return [int(i) for i in np.argsort(order, kind="stable")]
