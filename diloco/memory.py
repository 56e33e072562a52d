"""How much memory a training step takes, counted and not measured: nothing is allocated, whatever the model's size.

The count follows a step of `diloco.unit` in time: weights and moments are always there, activations grow block by block
on the way forward, and on the way back they make room for gradients. The peak is the largest of these moments.
`benchmarks/memory.py` holds it to what steps really take; what autograd keeps of each block stands in `_Kept`, and is
what changes when a block is computed in another way.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from diloco.execution import Execution
from diloco.optimizers import OptimizerName
from mmdit.config import MMDiTConfig

Precision = Literal["fp32", "bf16"]
DeviceKind = Literal["cpu", "cuda"]

CUDA_OVERHEAD: Final = 600_000_000
"""Bytes of a card that a process takes before its first tensor: CUDA's context, kernels, workspaces of cuBLAS."""
_FP32: Final = 4
_TIME_WIDTH: Final = 256
"""Width of the timestep's waves, as in `mmdit.layers`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a step does.

    Args:
        config: the model.
        image_tokens: patches of a picture, a latent's height times width over the square of the patch.
        text_tokens: text tokens of a sample.
        batch: samples of a step.
        precision: of the run.
        optimizer: of the run.
    """

    config: MMDiTConfig
    image_tokens: int
    text_tokens: int
    batch: int
    precision: Precision
    optimizer: OptimizerName


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes at the peak of a step, by kind; the first eight on the device, the last in main memory beside it.

    Args:
        weights: those in fp32, with the position table; with "host" only the table.
        copies: weights in the precision that the model computes in, if they are others.
        gradients: those that exist at the peak.
        moments: the optimiser's.
        inputs: the samples.
        activations: what autograd keeps for the way back, at the peak.
        temporary: what is freed again within a block, or within the update of a tensor.
        overhead: of CUDA.
        host: weights, gradients and moments in main memory (with "host").
    """

    weights: int
    copies: int
    gradients: int
    moments: int
    inputs: int
    activations: int
    temporary: int
    overhead: int
    host: int

    @property
    def device(self) -> int:
        """All bytes on the device."""
        return (
            self.weights
            + self.copies
            + self.gradients
            + self.moments
            + self.inputs
            + self.activations
            + self.temporary
            + self.overhead
        )


def footprint(work: Work, execution: Execution, kind: DeviceKind, *, widened: bool = False) -> Footprint:
    """Return what a step takes at its peak, from the second step on.

    Args:
        work: what a step does.
        execution: how.
        kind: of the device.
        widened: the device multiplies bf16 numbers in fp32 and holds them so (`mmdit.products`).
    """
    return _Count(work, execution, kind, widened=widened).peak()


def unit_host_bytes(config: MMDiTConfig) -> int:
    """Return the main memory that a unit takes beside its steps: for its delta in fp32, and for the delta's codes.

    The base that it starts from is read from its file, page by page.
    """
    return (_FP32 + 1) * parameters(config)


def drawn_bytes(work: Work, kind: DeviceKind) -> int:
    """Return the main memory of the batches that are drawn at once, whole: the one in work and the next.

    A GPU's next batch is drawn while the one in work is still being sent in parts.
    """
    latent = work.image_tokens * work.config.patch_size**2 * work.config.in_channels
    text = work.text_tokens * work.config.joint_attention_dim + work.config.pooled_projection_dim
    return (3 if kind == "cuda" else 2) * _FP32 * work.batch * (2 * latent + text)


def parameters(config: MMDiTConfig) -> int:
    """Return how many numbers are trained."""
    return _rest_parameters(config) + sum(_block_parameters(config, index) for index in range(config.num_layers))


def _block_parameters(config: MMDiTConfig, index: int) -> int:
    width, last, dual = config.hidden_size, index == config.num_layers - 1, index in config.dual_attention_layers
    linear = width * width + width
    norm = 2 * config.attention_head_dim if config.qk_norm else 0
    forward = 8 * width * width + 5 * width
    maps = (9 if dual else 6) + (2 if last else 6)  # of the modulation
    maps += 7 if last else 8  # of the joint attention
    maps += 4 if dual else 0
    return maps * linear + (3 if dual else 2) * norm + (1 if last else 2) * forward


def _rest_parameters(config: MMDiTConfig) -> int:
    width = config.hidden_size
    time = _TIME_WIDTH * width + width + width * width + width
    text = config.pooled_projection_dim * width + width + width * width + width
    patch = config.patch_size**2
    ends = patch * config.in_channels * width + width + patch * config.out_channels * (width + 1)
    return time + text + config.joint_attention_dim * width + width + 2 * width * (width + 1) + ends


def _largest_parameter(config: MMDiTConfig) -> int:
    width = config.hidden_size
    chunks = 9 if config.dual_attention_layers else 6
    return width * max(chunks * width, config.joint_attention_dim, config.pooled_projection_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What autograd keeps of one block, in tensors of the streams' width (those four times as wide count four).

    Args:
        image, text: tensors over the tokens of one stream.
        joint: over the tokens of both.
    """

    image: float
    text: float
    joint: float


class _Count:
    """One step's moments, and the largest of them."""

    def __init__(self, work: Work, execution: Execution, kind: DeviceKind, *, widened: bool) -> None:
        self._work = work
        self._config = work.config
        self._execution = execution
        self._kind = kind
        self._width = 2 if work.precision == "bf16" else _FP32  # bytes of a number that the model computes with
        # Bytes of a weight as the model computes with it, and of its gradient.
        self._held = _FP32 if widened and execution.keeping == "whole" else self._width
        self._samples = -(-work.batch // execution.parts)
        self._total = parameters(work.config)
        self._largest = _largest_parameter(work.config)

    def peak(self) -> Footprint:
        """Return the moment with the most bytes on the device."""
        return max(self._moments_of_a_step(), key=lambda footprint: footprint.device)

    def _moments_of_a_step(self) -> Iterator[Footprint]:
        layers = range(self._config.num_layers)
        kept = [self._kept_bytes(index) for index in layers]
        entering = self._entering_bytes()
        waiting = [entering] * len(kept) if self._execution.checkpointing else kept
        sizes = [_block_parameters(self._config, index) for index in layers]
        # On the way back: blocks before this one wait, this one is in work, gradients of those after it are there.
        for index in reversed(layers):
            done = _rest_parameters(self._config) + sum(sizes[index + 1 :])
            activations = sum(waiting[:index]) + kept[index] + self._ends_bytes()
            yield self._moment(self._gradient_bytes(done), activations, self._block_temporary(sizes[index]))
        yield self._moment(self._gradient_bytes(self._total), 0, 0)
        yield self._moment(self._kept_gradient_bytes(), 0, self._update_temporary())

    def _gradient_bytes(self, done: int) -> int:
        """Gradients on the device when the last part's way back has come to so many parameters."""
        several, whole = self._execution.parts > 1, self._execution.keeping == "whole"
        if whole and self._width != _FP32:
            # Autograd widens them last of all, since weights were narrowed first of all.
            return self._held * done + (_FP32 * self._total if several else 0)
        return self._kept_gradient_bytes() if several else self._width * done

    def _kept_gradient_bytes(self) -> int:
        """All gradients as they wait for the update, wherever they are."""
        wide = self._execution.keeping == "whole" or self._execution.parts > 1
        return (_FP32 if wide else self._width) * self._total

    def _moment(self, gradients: int, activations: int, temporary: int) -> Footprint:
        execution, total = self._execution, self._total
        table = _FP32 * self._config.pos_embed_max_size**2 * self._config.hidden_size
        away = execution.keeping == "host"
        copied = self._width != _FP32 or away
        moments = self._moment_bytes()
        return Footprint(
            weights=table + (0 if away else _FP32 * total),
            copies=self._held * total if copied else 0,
            gradients=0 if away else gradients,
            moments=0 if away else moments,
            inputs=self._input_bytes(),
            activations=activations,
            temporary=temporary,
            overhead=CUDA_OVERHEAD if self._kind == "cuda" else 0,
            host=_FP32 * total + self._kept_gradient_bytes() + moments if away else 0,
        )

    def _moment_bytes(self) -> int:
        if self._work.optimizer == "adamw":
            return 2 * _FP32 * self._total
        return self._width * self._total  # rows, columns and vectors are a thousandth of it

    def _input_bytes(self) -> int:
        """The samples in fp32, and again in the precision that the model computes in."""
        work, config = self._work, self._config
        latent = work.image_tokens * config.patch_size**2 * config.in_channels
        text = work.text_tokens * config.joint_attention_dim + config.pooled_projection_dim
        fp32 = _FP32 * (3 * latent + text)  # picture, noise, the point between
        narrow = self._width * (2 * latent + text) if self._width != _FP32 else _FP32 * latent
        return self._samples * (fp32 + narrow)

    # --- activations ---------------------------------------------------------------------------------------------

    def _tokens_bytes(self, tokens: int) -> int:
        """One tensor of the streams' width."""
        return self._samples * tokens * self._config.hidden_size * self._width

    def _kept(self, index: int) -> _Kept:
        config = self._config
        last, dual = index == config.num_layers - 1, index in config.dual_attention_layers
        normed = self._kept_by_head_norm()
        # Into the norm, out of it, modulated; the attention's output and its projection: before both halves. Then the
        # feed-forward net: into the norm, out of it, modulated, twice four times as wide, and its output.
        image = 3 + 2 + 3 + 8 + 1 + 2 * normed
        text, joint = image, 4.0  # queries, keys, values, and what attention gives
        if last:
            # Keys and values of the text only; queries and output of the picture alone.
            image, text, joint = image + 1, 3 + normed, 2.0
        if dual:
            image += 1 + 3 + 1 + 1 + 2 * normed
        return _Kept(image=image, text=text, joint=joint)

    def _kept_by_head_norm(self) -> float:
        """Tensors kept for one normalisation of queries or keys, beside its output."""
        if not self._config.qk_norm:
            return 0.0
        if self._kind == "cuda":
            return 1.0  # one kernel, which keeps its input
        return 2.0 * _FP32 / self._width  # computed in parts, in fp32: its input and the normalised one

    def _kept_bytes(self, index: int) -> int:
        kept, work = self._kept(index), self._work
        tokens = kept.image * work.image_tokens + kept.text * work.text_tokens
        tokens += kept.joint * (work.image_tokens + work.text_tokens)
        return int(tokens * self._tokens_bytes(1))

    def _entering_bytes(self) -> int:
        return self._tokens_bytes(self._work.image_tokens + self._work.text_tokens)

    def _ends_bytes(self) -> int:
        """Before the first and after the last block: the norm, its output, modulated; the velocity in fp32 and bf16."""
        work, config = self._work, self._config
        patches = work.image_tokens * config.patch_size**2 * config.out_channels
        return 3 * self._tokens_bytes(work.image_tokens) + self._samples * patches * 3 * _FP32

    def _block_temporary(self, size: int) -> int:
        """On the way back through a block: gradients of its streams, of the wide tensors, of the weights in work."""
        tokens = 7 * self._work.image_tokens + 2 * self._work.text_tokens
        return self._tokens_bytes(tokens) + size // 8 * self._width

    def _update_temporary(self) -> int:
        """One tensor's gradient in fp32, and what the optimiser makes of it."""
        factored = 3 if self._work.optimizer == "adamw-factored" else 0
        if self._execution.keeping == "whole":
            return factored * _FP32 * self._largest
        return 0 if self._execution.keeping == "host" else (2 + factored) * _FP32 * self._largest
