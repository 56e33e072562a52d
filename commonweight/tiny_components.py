"""Tiny frozen networks for small runs and tests, in the classes and the folder of `StableDiffusion3Pipeline`.

Two CLIPs and a T5 with tokenizers of bytes, nothing learnt in them: letters get random vectors, the CLIPs add their
places and a mean of what came before, T5 its neighbours; the pooled vectors are a bag of letters. For a model that
learns from scratch that is enough to tell captions apart, and to spell. The autoencoder for pixel presets hands pixels
through. All numbers follow from a seed.
"""

import hashlib
import math
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from diloco.streams import Stream
from mmdit.components import FOLDERS, VAE_FOLDER, library
from mmdit.config import MMDiTConfig
from mmdit.encoders import EncoderName

_CLIP_TOKENS: Final = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LATENT_WIDTHS: Final = (8, 8, 8, 8)
"""Of the blocks of the autoencoder for latents: four, so that a latent pixel is eight pixels wide."""
_HUGE: Final = 1000.0
_LOCAL: Final = 8.0
_HEADS: Final = 4


def write_tiny_components(directory: Path, shape: MMDiTConfig, *, seed: int) -> None:
    """Write text encoders, tokenizers and an autoencoder that fit a model.

    Args:
        directory: made if it is missing.
        shape: the model's; its token and pooled widths must be even, the token width a multiple of 16.
        seed: of all numbers.

    Raises:
        ValueError: the model's widths can't be divided among the encoders.
        ComponentsMissing: a library is not installed.
    """
    width, pooled = shape.joint_attention_dim, shape.pooled_projection_dim
    if width % (4 * _HEADS) or pooled % 2:
        raise ValueError(
            f"a token width of {width} or a pooled width of {pooled} can't be divided among three encoders"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("clip_l", "clip_g"):
            _write_clip(directory, name, width // 2, pooled // 2, seed)
        _write_t5(directory, width, seed)
        vae = (
            _hands_through(shape.in_channels) if shape.in_channels in (1, 3) else untrained_vae(shape.in_channels, seed)
        )
        vae.save_pretrained(directory / VAE_FOLDER)
    _open_as_the_umask_says(directory)


def write_identity_vae(directory: Path, channels: int) -> None:
    """Write an `AutoencoderKL` that hands pixels through, so that a model that paints in pixels is a whole pipeline.

    Args:
        directory: the autoencoder's own.
        channels: of the pictures, 1 or 3.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _hands_through(channels).save_pretrained(directory)
    _open_as_the_umask_says(directory)


def _open_as_the_umask_says(directory: Path) -> None:
    """Let whoever may read a network's description read its weights: safetensors makes files for their owner alone."""
    for path in directory.rglob("*.safetensors"):
        path.chmod(stat.S_IMODE((path.parent / "config.json").stat().st_mode))


def _write_clip(directory: Path, name: EncoderName, hidden: int, projection: int, seed: int) -> None:
    transformers = library("transformers")
    letters = [chr(code) for code in _byte_letters()]
    words = [*letters, *(letter + "</w>" for letter in letters), _START, _END]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=_HEADS,
        max_position_embeddings=_CLIP_TOKENS,
        bos_token_id=words.index(_START),
        eos_token_id=words.index(_END),
        pad_token_id=words.index(_END),
    )
    model = transformers.CLIPTextModelWithProjection(config)
    _fill(model, f"{name}", seed, _clip_scale)
    network, tokenizer = FOLDERS[name]
    model.save_pretrained(directory / network)
    transformers.CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=_CLIP_TOKENS
    ).save_pretrained(directory / tokenizer)


def _byte_letters() -> list[int]:
    """Return the code point that byte-level tokenizers write each byte as: its own if visible, else from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [byte if byte in visible else next(hidden) for byte in range(256)]


def _clip_scale(name: str, shape: torch.Size) -> float:
    if "q_proj" in name or "k_proj" in name:
        return 0.0  # attention without preference: a mean of what came before
    if "embedding" in name:
        return 1.0
    return 1.0 / math.sqrt(shape[-1])


def _write_t5(directory: Path, width: int, seed: int) -> None:
    transformers = library("transformers")
    config = transformers.T5Config(
        vocab_size=384,
        d_model=width,
        d_kv=width // _HEADS,
        d_ff=2 * width,
        num_layers=1,
        num_heads=_HEADS,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
    )
    model = transformers.T5EncoderModel(config)
    _fill(model, "t5", seed, _t5_scale)
    bias = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    with torch.no_grad():
        bias.zero_()
        # Each head looks at one neighbour: one before, two before, one after, two after.
        for head, bucket in enumerate((1, 2, 17, 18)):
            bias[bucket, head] = _LOCAL
    network, tokenizer = FOLDERS["t5"]
    model.save_pretrained(directory / network)
    transformers.ByT5Tokenizer(model_max_length=_CLIP_TOKENS).save_pretrained(directory / tokenizer)


def _t5_scale(name: str, shape: torch.Size) -> float:
    if ".q." in name or ".k." in name:
        return 0.0
    return 1.0 if "shared" in name or "embed" in name else 1.0 / math.sqrt(shape[-1])


def _fill(model: nn.Module, name: str, seed: int, scale_of: Callable[[str, torch.Size], float]) -> None:
    """Give every matrix normal numbers; vectors keep what the class gives them, ones and zeros."""
    stream = Stream(hashlib.sha256(b"commonweight/tiny/v1\0%d" % seed).digest(), f"init/{name}")
    with torch.no_grad():
        for number, (tensor_name, tensor) in enumerate(sorted(model.named_parameters())):
            if tensor.dim() < 2:
                continue
            values = stream.normal(number, 0, tensor.numel()) * np.float32(scale_of(tensor_name, tensor.shape))
            tensor.copy_(torch.from_numpy(values).view_as(tensor))


def _hands_through(channels: int) -> Any:
    """An autoencoder whose latents are the pixels.

    Its blocks add nothing. The one norm on the way is made harmless by two constant channels, far larger than any
    pixel, that decide the scale alone; the SiLU after it by carrying every pixel with both signs, since
    silu(x) - silu(-x) = x.
    """
    wide = 2 * channels + 2
    model = library("diffusers").AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(wide,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    # Channels of both signs cancel in the mean; the two huge ones make the standard deviation.
    deviation = _HUGE * math.sqrt(2 / wide)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for part in (model.encoder, model.decoder):
            for number in range(channels):
                part.conv_in.weight[number, number, 1, 1] = 1.0
                part.conv_in.weight[channels + number, number, 1, 1] = -1.0
                part.conv_out.weight[number, number, 1, 1] = 1.0
                part.conv_out.weight[number, channels + number, 1, 1] = -1.0
            part.conv_in.bias[2 * channels] = _HUGE
            part.conv_in.bias[2 * channels + 1] = -_HUGE
            part.conv_norm_out.weight[: 2 * channels] = deviation
        model.encoder.conv_out.bias[channels:] = -30.0  # of the logarithm of the variance
    return model


def untrained_vae(channels: int, seed: int) -> Any:
    """An autoencoder of the right shape that has learnt nothing: for trying programs, not for pictures."""
    model = library("diffusers").AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(_LATENT_WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(_LATENT_WIDTHS),
        block_out_channels=_LATENT_WIDTHS,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    _fill(model, "vae", seed, lambda _, shape: 1.0 / math.sqrt(math.prod(shape[1:])))
    return model
