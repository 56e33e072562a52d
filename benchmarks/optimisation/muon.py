"""Muon instead of AdamW in the volunteers' steps: a matrix moves by the nearest orthogonal one to its momentum.

Source: https://kellerjordan.github.io/posts/muon, scaled as in arXiv 2502.16982, section 2.2, so that a learning rate
means what it means to AdamW; inside DiLoCo, arXiv 2505.23725. Only the matrices of the transformer's blocks move so;
embeddings, biases, norms and what follows the blocks stay with AdamW.
"""

from typing import Final

import torch
from torch import Tensor

from benchmarks.optimisation.crowd import BETA1, WEIGHT_DECAY, Moments, adamw
from diloco.schema import Schema

_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""Of the quintic whose iteration drives singular values towards one."""
_ITERATIONS: Final = 5
_RMS: Final = 0.2
"""Of a step's elements at a learning rate of one: what AdamW's usually have."""


class Muon:
    """An `Update`. First moments are AdamW's own, so that a unit's state is no larger.

    Args:
        schema: names and shapes of the tensors in the flat weights.
    """

    def __init__(self, schema: Schema) -> None:
        self._matrices: list[tuple[slice, int, int]] = []
        start = 0
        for spec in schema.tensors:
            stop = start + spec.num_elements
            if spec.name.startswith("transformer_blocks.") and len(spec.shape) == 2:
                self._matrices.append((slice(start, stop), *spec.shape))
            start = stop

    def __call__(self, flat_VP: Tensor, moments: Moments, gradient_VP: Tensor, rate_V1: Tensor) -> None:
        """See `Update`."""
        before_VP = flat_VP.clone()
        adamw(flat_VP, moments, gradient_VP, rate_V1)
        for place, rows, columns in self._matrices:
            ahead = torch.lerp(gradient_VP[:, place], moments.m[:, place], BETA1).view(-1, rows, columns)
            turned = orthogonal(ahead).flatten(1) * (_RMS * max(rows, columns) ** 0.5)
            flat_VP[:, place] = before_VP[:, place] * (1 - rate_V1 * WEIGHT_DECAY) - rate_V1 * turned


def orthogonal(matrices_VMN: Tensor) -> Tensor:
    """Return roughly U V^T of each matrix U S V^T: singular values end between 0.7 and 1.2."""
    wide = matrices_VMN if matrices_VMN.shape[1] <= matrices_VMN.shape[2] else matrices_VMN.mT
    x: Tensor = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-12)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices_VMN else x.mT
