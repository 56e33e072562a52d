"""Training steps whose memory is measured: on real tensors where they are small, on fake ones where they are not."""

from contextlib import nullcontext

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.allocations import Allocations
from benchmarks.plain_training import LR, plain_training
from diloco.draws import Batch
from diloco.execution import Execution
from diloco.memory import Work
from diloco.tables import Floats
from diloco.unit import TrainingSpec, make_trainer
from mmdit.config import MMDiTConfig
from mmdit.initial import POSITION_TABLE
from mmdit.products import bf16_products
from mmdit.transformer import trainable_schema

_STEPS = 2
"""Moments do not exist before the first update, so the second step is the one that counts."""


def measured_on_gpu(work: Work, execution: Execution) -> int:
    """Return the most bytes of tensors that lived at once on the GPU in the second step, as torch counts them."""
    trainer = make_trainer(_training(work), work.config, _base(work.config), device="cuda", execution=execution)
    for _ in range(_STEPS):
        torch.cuda.reset_peak_memory_stats()
        trainer.step(_batch(work), LR)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measured_bytes(work: Work, execution: Execution, *, fake: bool, widened: bool = False) -> int:
    """Return the most bytes of tensors that lived at once in the second step, on the CPU.

    Args:
        work: what a step does.
        execution: how.
        fake: on tensors without bytes, so that the model may be larger than this machine.
        widened: with bf16 products as a CPU has them that must make them in fp32.
    """
    allocations = Allocations()
    pretended = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with bf16_products(through_fp32=widened), pretended, allocations:
        trainer = make_trainer(_training(work), work.config, _base(work.config), device="cpu", execution=execution)
        for _ in range(_STEPS):
            allocations.reset()
            trainer.step(_batch(work), LR)
    return allocations.peak


def _training(work: Work) -> TrainingSpec:
    return plain_training(batch=work.batch, tokens=work.text_tokens, precision=work.precision, optimizer=work.optimizer)


def _base(config: MMDiTConfig) -> dict[str, Floats]:
    """Weights of one number, which take no memory: none of it counts, and bytes do not depend on it."""
    one = np.full((), 1e-3, dtype=np.float32)
    shapes = dict(trainable_schema(config))
    shapes[POSITION_TABLE] = (1, config.pos_embed_max_size**2, config.hidden_size)
    return {name: np.broadcast_to(one, shape) for name, shape in shapes.items()}


def _batch(work: Work) -> Batch:
    config = work.config
    side = round(work.image_tokens**0.5) * config.patch_size
    latent = (work.batch, config.in_channels, side, side)
    return Batch(
        latent=torch.zeros(latent),
        text=torch.ones(work.batch, work.text_tokens, config.joint_attention_dim),  # a CPU leaves out rows of zeros
        pooled=torch.zeros(work.batch, config.pooled_projection_dim),
        noise=torch.ones(latent),
        t=torch.full((work.batch,), 0.5),
    )
