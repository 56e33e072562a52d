"""Plain training of one model: the product's loss, draws and average, AdamW that keeps its moments, a falling rate.

Two threads take half of each batch and add their gradients; on two cores this is quicker than two threads inside of
every operation, and the sums are the same each time. Training goes in chunks of fresh pictures, after each of which it
can be broken off and taken up again.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from benchmarks.skills.pictures import SIDE, draw_many
from benchmarks.skills.prompts import LATER_SHARES, SHARES
from diloco.average import average_share
from diloco.draws import Batch, Draws
from diloco.genesis import initial_state
from diloco.shards import Shard, ShardInfo, ShardSet, write_shard
from diloco.tables import Floats
from diloco.unit import DROPOUT_ONE
from mmdit.conditioning import ConditioningConfig, encode_caption
from mmdit.config import MMDiTConfig
from mmdit.flow import flow_loss_B, shift_timestep
from mmdit.space import PixelSpace
from mmdit.transformer import build

SPACE: Final = PixelSpace(channels=3, height=SIDE, width=SIDE, shift=-1.0, scale=2.0)
CHUNK_STEPS: Final = 32
"""Steps between two places where training can stop; their pictures are drawn at once, and make one shard."""
LATER_CHUNK: Final = 928
"""From this chunk on, counted from 0, skills have their later shares."""
_INFO: Final = ShardInfo(licence="CC0-1.0", source="drawn by benchmarks.skills")
_DROPOUT: Final = DROPOUT_ONE // 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A training run: model, captions' encoding, and how long and how fast.

    Args:
        steps: a multiple of `CHUNK_STEPS`.
        lr: after `warmup` steps; over the last `fall` of the steps it falls in a straight line to zero. Until then a
            run is the same whatever its length, so it can be made longer or shorter.
        shift: moves the timesteps that are trained on towards noise (arXiv 2403.03206, section 5.3.2): what a plain
            picture of few colours shows is settled early on the way from noise.
        threads: equal parts of a batch that are worked on at once.
        ema_decay: of the running average of the weights, step by step.
    """

    model: MMDiTConfig
    conditioning: ConditioningConfig
    steps: int
    batch: int
    lr: float
    shift: float = 2.5
    warmup: int = 300
    fall: float = 0.4
    threads: int = 2
    beta2: float = 0.99
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.fall * self.steps))


def model_config(
    conditioning: ConditioningConfig, *, patch: int, layers: int, heads: int, head_dim: int = 32
) -> MMDiTConfig:
    """Return a model for these pictures and captions."""
    return MMDiTConfig(
        sample_size=SIDE,
        patch_size=patch,
        in_channels=SPACE.channels,
        out_channels=SPACE.channels,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=conditioning.token_dim,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=conditioning.pooled_dim,
        pos_embed_max_size=SIDE // patch,
        qk_norm="rms_norm",
        dual_attention_layers=(),
    )


def shard_of(seed: int, chunk: int, count: int, conditioning: ConditioningConfig) -> ShardSet:
    """Return a chunk's fresh training pictures as the product trains on them."""
    prompts, pictures = draw_many((seed, chunk), count, SHARES if chunk < LATER_CHUNK else LATER_SHARES)
    encoded = [encode_caption(prompt.caption, conditioning) for prompt in prompts]
    latents = SPACE.encode(pictures).astype(np.float16)
    raw = write_shard(latents, [tokens for tokens, _ in encoded], np.stack([pooled for _, pooled in encoded]), _INFO)
    return ShardSet([Shard.open(raw)])


class Training:
    """The state of a run: weights, AdamW's moments, the average, steps done and seconds of processor time spent."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        self.cpu_seconds = 0.0
        self._model = build(recipe.model, initial_state(recipe.model, _bytes(recipe.seed, 0)), device="cpu").train()
        self._parameters = dict(sorted(self._model.named_parameters()))
        self._averages = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()),
            lr=recipe.lr,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )

    @property
    def samples(self) -> int:
        """Samples trained on."""
        return self.step * self.recipe.batch

    def averaged(self) -> dict[str, Floats]:
        """Return the averaged weights with the position table, as `build` takes them."""
        weights = {name: tensor.detach().numpy().copy() for name, tensor in self._model.state_dict().items()}
        return weights | {name: tensor.numpy().copy() for name, tensor in self._averages.items()}

    def chunk(self, pool: ThreadPoolExecutor) -> float:
        """Train on the next `CHUNK_STEPS` steps' pictures; return the mean loss."""
        recipe, started = self.recipe, time.process_time()
        number = self.step // CHUNK_STEPS
        shards = shard_of(recipe.seed, number, CHUNK_STEPS * recipe.batch, recipe.conditioning)
        draws = Draws(_bytes(recipe.seed, number + 1))
        losses = []
        for step in range(CHUNK_STEPS):
            drawn = draws.batch(
                step, recipe.batch, shards, max_tokens=recipe.conditioning.max_tokens, text_dropout=_DROPOUT
            )
            losses.append(self._train_step(drawn, pool))
        self.cpu_seconds += time.process_time() - started
        return math.fsum(losses) / len(losses)

    def _train_step(self, drawn: Batch, pool: ThreadPoolExecutor) -> float:
        recipe = self.recipe
        halves = list(pool.map(self._gradients, drawn.parts(recipe.threads)))
        for parameter, *gradients in zip(
            self._parameters.values(), *(gradients for _, gradients in halves), strict=True
        ):
            parameter.grad = torch.stack(gradients).mean(0) if len(gradients) > 1 else gradients[0]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), recipe.grad_clip, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step)
        self._optimizer.step()
        self.step += 1
        share = float(average_share(recipe.ema_decay, self.step))
        torch._foreach_lerp_(list(self._averages.values()), [p.detach() for p in self._parameters.values()], share)
        return math.fsum(loss for loss, _ in halves) / recipe.threads

    def _gradients(self, part: Batch) -> tuple[float, tuple[Tensor, ...]]:
        t_B = shift_timestep(part.t, self.recipe.shift)
        loss = flow_loss_B(self._model, part.latent, part.text, part.pooled, part.noise, t_B).mean()
        return float(loss.detach()), torch.autograd.grad(loss, list(self._parameters.values()))

    def save(self, path: Path) -> None:
        """Write all of it."""
        state = {
            "recipe": self._same(),
            "steps": self.recipe.steps,
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
            "model": self._model.state_dict(),
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        torch.save(state, new)
        new.replace(path)

    def _same(self) -> str:
        """Return what a run must have in common with the one that it goes on from: all but its length."""
        return repr(replace(self.recipe, steps=0))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ValueError: it was written by a run with another recipe, or of a length whose rate had begun to fall.
        """
        state: dict[str, Any] = torch.load(path, weights_only=True)
        falling = state["step"] > (1 - self.recipe.fall) * min(state["steps"], self.recipe.steps)
        if state["recipe"] != self._same() or (falling and state["steps"] != self.recipe.steps):
            raise ValueError(f"{path} is of another run; remove it to begin anew")
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        self._model.load_state_dict(state["model"])
        self._averages = state["averages"]
        self._optimizer.load_state_dict(state["optimizer"])


def run(
    recipe: Recipe, path: Path | None, *, after_chunk: Callable[[Training, float], None], chunks_a_save: int = 8
) -> Training:
    """Train to the end, or on from where `path` was left; `after_chunk` gets each chunk's mean loss."""
    training = Training(recipe)
    if path is not None and path.exists():
        training.load(path)
    with ThreadPoolExecutor(recipe.threads) as pool:
        while training.step < recipe.steps:
            loss = training.chunk(pool)
            number = training.step // CHUNK_STEPS
            after_chunk(training, loss)
            if path is not None and (number % chunks_a_save == 0 or training.step >= recipe.steps):
                training.save(path)
    return training


def _bytes(seed: int, number: int) -> bytes:
    return b"skills" + seed.to_bytes(10, "little") + number.to_bytes(16, "little")
