"""The small parts that every block is made of, under diffusers' attribute names, which name the published weights."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmdit.config import MMDiTConfig
from mmdit.gelu import gelu
from mmdit.products import linear

_TIMESTEP_DIM = 256
_NORM_EPS = 1e-6
# Ratio between the slowest and the fastest wave, in the timestep embedding and in the position table.
_MAX_PERIOD = 10_000.0


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer's map without the module call, whose bookkeeping shows in a small model's step time."""
    return linear(x, layer.weight, layer.bias)


def modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Adaptive scale and shift of normalised tokens: x (1 + scale) + shift, in one pass."""
    return torch.addcmul(shift_B1D, x_BLD, 1 + scale_B1D)


def layer_norm(x_BLD: Tensor) -> Tensor:
    """Layer norm over the width, without learned parameters."""
    return functional.layer_norm(x_BLD, x_BLD.shape[-1:], eps=_NORM_EPS)


class Modulation(nn.Module):
    """Adaptive layer norm's linear map: from the conditioning vector to `chunks` vectors of the stream's width."""

    def __init__(self, hidden: int, chunks: int, *, device: str | None) -> None:
        super().__init__()
        self.chunks = chunks
        self.linear = nn.Linear(hidden, chunks * hidden, device=device)

    def forward(self, act_BD: Tensor) -> tuple[Tensor, ...]:
        """From SiLU(conditioning) [B, D] to `chunks` tensors [B, 1, D]."""
        return apply_linear(self.linear, act_BD).unsqueeze(1).chunk(self.chunks, dim=2)


class GeluProjection(nn.Module):
    """The widening half of a feed-forward net, with its tanh-approximated GELU."""

    def __init__(self, hidden: int, *, device: str | None) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden, 4 * hidden, device=device)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, 4 D]."""
        return gelu(apply_linear(self.proj, x_BLD))


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, hidden: int, *, device: str | None) -> None:
        super().__init__()
        # Index 1 is diffusers' dropout; it holds no weights but its place is part of the names (net.0, net.2).
        self.net = nn.ModuleList(
            [GeluProjection(hidden, device=device), nn.Identity(), nn.Linear(4 * hidden, hidden, device=device)]
        )

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The shape stays."""
        widen, _, narrow = self.net
        assert isinstance(widen, GeluProjection)
        assert isinstance(narrow, nn.Linear)
        return apply_linear(narrow, widen.forward(x_BLD))


class PatchEmbed(nn.Module):
    """Cuts a latent into patches, maps each to a token and adds its place in the picture."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig, *, device: str | None) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.max_size = config.pos_embed_max_size
        self.proj = nn.Conv2d(
            config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size, device=device
        )
        if device == "meta":
            table = torch.empty(1, self.max_size**2, config.hidden_size, device=device)
        else:
            table = torch.from_numpy(position_table(config)).to(device)
        self.register_buffer("pos_embed", table)

    def forward(self, latent_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, H/p W/p, D].

        Raises:
            ValueError: a side is no multiple of the patch, or larger than the position table.
        """
        p = self.patch_size
        height, width = latent_BCHW.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"a latent of {height} x {width} cannot be cut into patches of {p} x {p}")
        rows, columns = height // p, width // p
        if max(rows, columns) > self.max_size:
            raise ValueError(
                f"a latent of {height} x {width} is {rows} x {columns} patches, "
                f"more than pos_embed_max_size {self.max_size}"
            )
        # A convolution whose stride is its kernel is a linear map of each patch, and much quicker as one.
        patches = latent_BCHW.reshape(*latent_BCHW.shape[:2], rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        assert self.proj.bias is not None
        tokens_BLD = linear(patches.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)
        return tokens_BLD + self._places(rows, columns).to(tokens_BLD.dtype)

    def _places(self, rows: int, columns: int) -> Tensor:
        """The middle of the table, so that pictures of any shape share their centre. [1, rows x columns, D]."""
        if rows == columns == self.max_size:
            return self.pos_embed
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        grid = self.pos_embed.view(1, self.max_size, self.max_size, -1)
        return grid[:, top : top + rows, left : left + columns].flatten(1, 2)


def position_table(config: MMDiTConfig) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The fixed two-dimensional sine and cosine table, fp32 [1, max_size^2, D], rows of the picture first.

    A quarter of the width each: sine then cosine of the column, sine then cosine of the row. Sines may differ in the
    last bit between machines, so a run publishes the table with its first checkpoint and nobody computes it again.
    """
    size, quarter = config.pos_embed_max_size, config.hidden_size // 4
    omega = 1.0 / _MAX_PERIOD ** (np.arange(quarter, dtype=np.float64) / quarter)
    place = np.arange(size, dtype=np.float32) / np.float32(size / config.base_size)
    angle = np.outer(place.astype(np.float64), omega)
    wave = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)  # [size, D / 2]
    table = np.empty((size, size, 4 * quarter), dtype=np.float32)
    table[:, :, : 2 * quarter] = wave[None, :, :]
    table[:, :, 2 * quarter :] = wave[:, None, :]
    return table.reshape(1, size * size, 4 * quarter)


class EmbeddingMlp(nn.Module):
    """Linear, SiLU, linear: from a vector to the conditioning width."""

    def __init__(self, width: int, hidden: int, *, device: str | None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, hidden, device=device)
        self.linear_2 = nn.Linear(hidden, hidden, device=device)

    def forward(self, x_BP: Tensor) -> Tensor:
        """[B, width] to [B, D]."""
        return apply_linear(self.linear_2, functional.silu(apply_linear(self.linear_1, x_BP)))


class TimeTextEmbed(nn.Module):
    """The conditioning vector: embedded timestep plus embedded pooled text."""

    def __init__(self, pooled: int, hidden: int, *, device: str | None) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMlp(_TIMESTEP_DIM, hidden, device=device)
        self.text_embedder = EmbeddingMlp(pooled, hidden, device=device)

    def forward(self, timestep_B: Tensor, pooled_BP: Tensor) -> Tensor:
        """Timesteps (1000 t) [B] and pooled text [B, P] to [B, D]."""
        waves = timestep_waves(timestep_B).to(pooled_BP.dtype)
        return self.timestep_embedder.forward(waves) + self.text_embedder.forward(pooled_BP)


def timestep_waves(timestep_B: Tensor) -> Tensor:
    """Cosines, then sines, of the timestep at 128 frequencies; fp32 [B, 256]."""
    half = _TIMESTEP_DIM // 2
    steps = torch.arange(half, dtype=torch.float32, device=timestep_B.device)
    angle = timestep_B.float().unsqueeze(1) * torch.exp(steps * (-math.log(_MAX_PERIOD) / half))
    return torch.cat((angle.cos(), angle.sin()), dim=1)
