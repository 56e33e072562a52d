"""What one training step draws: samples, noise, timesteps, and which captions are dropped. All from the unit's seed."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from diloco.shards import EMPTY, KEPT, SILENT, ShardSet
from diloco.streams import Stream
from diloco.tables import logit_normal_table, normal_table


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Inputs of a step, fp32: latent [B, C, H, W], text [B, L, D], pooled [B, P], noise as latent, t [B] in (0, 1)."""

    latent: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    noise: torch.Tensor
    t: torch.Tensor

    def to(self, device: str) -> "Batch":
        """Return the batch on `device`."""
        return Batch(
            latent=self.latent.to(device),
            text=self.text.to(device),
            pooled=self.pooled.to(device),
            noise=self.noise.to(device),
            t=self.t.to(device),
        )

    def parts(self, count: int) -> tuple["Batch", ...]:
        """Return the batch in `count` parts of equal size, in order."""
        if count == 1:
            return (self,)
        columns = (tensor.chunk(count) for tensor in (self.latent, self.text, self.pooled, self.noise, self.t))
        return tuple(
            Batch(latent=latent, text=text, pooled=pooled, noise=noise, t=t)
            for latent, text, pooled, noise, t in zip(*columns, strict=True)
        )


def in_turn(draw: Callable[[int], Batch], steps: int, *, ahead: bool) -> Iterator[Batch]:
    """Yield the batches of all steps; with `ahead` the next one is drawn in a thread while the last one is used.

    Nothing that is drawn depends on when it is drawn.
    """
    if not ahead:
        yield from map(draw, range(steps))
        return
    with ThreadPoolExecutor(1, thread_name_prefix="draws") as pool:
        coming = pool.submit(draw, 0)
        for step in range(steps):
            batch = coming.result()
            if step + 1 < steps:
                coming = pool.submit(draw, step + 1)
            yield batch


class Draws:
    """The random inputs of a unit, addressed by step (from 0) and place in the batch (from 0)."""

    __slots__ = ("_dropout", "_noise", "_order", "_timestep")

    def __init__(self, seed: bytes) -> None:
        self._order = Stream(seed, "order")
        self._noise = Stream(seed, "noise")
        self._timestep = Stream(seed, "timestep")
        self._dropout = Stream(seed, "dropout")

    def index(self, step: int, place: int, n: int) -> int:
        """Return which of `n` samples, those that were not taken down, is trained on: the order stream's word mod n."""
        return self._order.word(step, place) % n

    def batch(
        self, step: int, size: int, shards: ShardSet, *, max_tokens: int, text_dropout: int, shift: float = 1.0
    ) -> Batch:
        """Return the batch of a step, on the CPU.

        Args:
            text_dropout: probability in units of 2^-16 that what an encoder says of a caption (tokens and pooled
                vector) is not heard; of each encoder by itself.
            shift: of the timesteps, towards noise.
        """
        places = range(size)
        indices = [self.index(step, place, shards.n) for place in places]
        count = len(shards.texts.layout.parts)
        heard = [self._heard(step, place, count, text_dropout) for place in places]
        latent_BCHW, text_BLD, pooled_BP = shards.batch(indices, max_tokens, heard)
        elements = latent_BCHW[0].numel()
        # One lookup for the whole batch: the streams give indices, the table gives numbers.
        noise = normal_table()[np.stack([self._noise.u16(step, place, elements) for place in places])]
        t = logit_normal_table()[np.concatenate([self._timestep.u16(step, place, 1) for place in places])]
        if shift != 1.0:
            # Separate fp32 operations; t stays within (0, 1).
            t = np.float32(shift) * t / (np.float32(1) + np.float32(shift - 1.0) * t)
        return Batch(
            latent=latent_BCHW,
            text=text_BLD,
            pooled=pooled_BP,
            noise=torch.from_numpy(noise).view_as(latent_BCHW),
            t=torch.from_numpy(t),
        )

    def _heard(self, step: int, place: int, count: int, text_dropout: int) -> list[int]:
        """Return for each encoder whether its text is heard.

        What is dropped is zeros in one half of the samples and the encoding of the empty caption in the other: Stable
        Diffusion 3 was trained with zeros, and `StableDiffusion3Pipeline` leads away from the empty caption.
        """
        drawn = self._dropout.u16(step, place, count)
        instead = EMPTY if int(drawn[0]) & 1 else SILENT
        return [instead if int(one) < text_dropout else KEPT for one in drawn]
