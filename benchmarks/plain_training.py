"""The inner loop of benchmarks that measure single steps: nothing dropped, no warm-up, the usual numbers of AdamW."""

from typing import Final, Literal

from diloco.optimizers import OptimizerName
from diloco.unit import TrainingSpec

LR: Final = 1e-4


def plain_training(
    *, batch: int, tokens: int, precision: Literal["fp32", "bf16"], optimizer: OptimizerName = "adamw"
) -> TrainingSpec:
    """Return it for batches of a size, with so many text tokens."""
    return TrainingSpec(
        steps=1,
        batch=batch,
        lr=LR,
        warmup_steps=0,
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.01,
        grad_clip=1.0,
        text_dropout=0,
        shift=1.0,
        max_tokens=tokens,
        segment_steps=1,
        precision=precision,
        optimizer=optimizer,
    )
