"""The frozen networks beside the transformer: CLIP-L, CLIP-G, T5 and the autoencoder, run as Stable Diffusion 3 does.

They lie in a folder as `StableDiffusion3Pipeline.save_pretrained` writes it: `text_encoder`, `text_encoder_2` and
`text_encoder_3` with their `tokenizer` folders, and `vae`; any of them may be missing. `transformers` and `diffusers`
load them, from what `mmdit.network_files` lets them see, and run no code of the folder. What they compute may differ in
the last digits between machines; it is rounded to half precision.
"""

import importlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch

from mmdit.conditioning import Encoded
from mmdit.encoders import CLIPS, ENCODER_NAMES, EncoderName, EncodersConfig, Padding, TextEncoder
from mmdit.half_weights import halve
from mmdit.network_files import (
    ComponentsMissing,
    folder_digest,
    load_tokenizer,
    load_whole,
    published_dtype,
    read_config,
)
from mmdit.space import ByteImages, FloatImages, VaeSpace

FOLDERS: Final[Mapping[EncoderName, tuple[str, str]]] = {
    "clip_l": ("text_encoder", "tokenizer"),
    "clip_g": ("text_encoder_2", "tokenizer_2"),
    "t5": ("text_encoder_3", "tokenizer_3"),
}
"""Of each text encoder the folders of its network and its tokenizer."""
VAE_FOLDER: Final = "vae"
CLASSES: Final[Mapping[EncoderName, str]] = {
    "clip_l": "CLIPTextModelWithProjection",
    "clip_g": "CLIPTextModelWithProjection",
    "t5": "T5EncoderModel",
}
"""Of each text encoder its class in transformers."""
_CLIP_TOKENS: Final = 77
T5_TOKENS: Final = 77
"""Rows of T5 in Stable Diffusion 3's training. `StableDiffusion3Pipeline` takes 256, unless it is told otherwise."""
_AT_ONCE: Final = 32


def require_networks(components: Path, conditioning: EncodersConfig, vae: VaeSpace | None) -> None:
    """Raise `ComponentsMissing` unless a folder holds these very networks."""
    for encoder in conditioning.encoders:
        _require_digest(
            f"the text encoder {encoder.name}",
            encoder.sha256,
            *(components / folder for folder in FOLDERS[encoder.name]),
        )
    if vae is not None:
        _require_digest("the autoencoder", vae.sha256, components / VAE_FOLDER)


def encoders_in(components: Path) -> tuple[EncoderName, ...]:
    """Return which text encoders a folder holds."""
    return tuple(name for name in ENCODER_NAMES if all((components / folder).is_dir() for folder in FOLDERS[name]))


class _Tokenizer(Protocol):
    def __call__(self, text: list[str], **options: Any) -> Any: ...


class _Network(Protocol):
    @property
    def config(self) -> Any: ...
    def __call__(self, ids: torch.Tensor, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoders:
    """The text encoders of a folder, loaded."""

    config: EncodersConfig
    loaded: Mapping[EncoderName, tuple[_Tokenizer, _Network]]
    device: str

    def encode(
        self, captions: Sequence[str], kept: Sequence[Sequence[bool]] | None = None
    ) -> list[list[Encoded | None]]:
        """Return for each caption what each encoder of `config.encoders` makes of it; None if it is not loaded.

        Args:
            kept: for each caption and encoder whether that is wanted; None in place of what is not. None wants all.

        Raises:
            ValueError: a caption is no Unicode.
        """
        if odd := next((caption for caption in captions if not _is_unicode(caption)), None):
            raise ValueError(f"caption {odd[:40]!r} has a character that Unicode does not have")
        found: list[list[Encoded | None]] = [[None] * len(self.config.encoders) for _ in captions]
        for place, encoder in enumerate(self.config.encoders):
            wanted = [number for number in range(len(captions)) if kept is None or kept[number][place]]
            for first in range(0, len(wanted), _AT_ONCE):
                numbers = wanted[first : first + _AT_ONCE]
                texts = self.column(encoder, [captions[number] for number in numbers])
                for number, text in zip(numbers, texts, strict=True):
                    found[number][place] = text
        return found

    def column(self, encoder: TextEncoder, captions: list[str]) -> Sequence[Encoded | None]:
        """Return what one encoder makes of captions; None if it is not loaded."""
        if encoder.name not in self.loaded:
            return [None] * len(captions)
        tokenizer, network = self.loaded[encoder.name]
        return self._encode(encoder, tokenizer, network, captions)

    @torch.inference_mode()
    def _encode(
        self, encoder: TextEncoder, tokenizer: _Tokenizer, network: _Network, captions: list[str]
    ) -> list[Encoded]:
        tokenized = tokenizer(
            captions, padding="max_length", max_length=encoder.tokens, truncation=True, return_tensors="pt"
        )
        ids, mask = tokenized.input_ids.to(self.device), tokenized.attention_mask
        whole = self.config.padding == "encoder"
        if encoder.name in CLIPS:
            out = network(ids, output_hidden_states=True)
            # As Stable Diffusion 3 has it: the tokens of the last layer but one, the projected end of the text.
            tokens, pooled = out.hidden_states[-2], out[0]
        else:
            # The pipeline lets T5 attend to its padding; where that is not kept, it must not be heard either.
            tokens = network(ids)[0] if whole else network(ids, attention_mask=mask.to(self.device))[0]
            pooled = tokens.new_zeros((len(captions), 0))
        lengths = [encoder.tokens] * len(captions) if whole else mask.sum(dim=1).tolist()
        return [
            Encoded(tokens=_halves(text[: int(length)]), pooled=_halves(one))
            for text, one, length in zip(tokens, pooled, lengths, strict=True)
        ]


def describe_encoders(
    components: Path,
    names: Sequence[EncoderName],
    *,
    token_dim: int,
    pooled_dim: int,
    padding: Padding,
    t5_tokens: int = T5_TOKENS,
    stored: bool = True,
    source: str = "",
) -> EncodersConfig:
    """Return what a run config says of the text encoders in a folder.

    Args:
        components: the folder.
        names: which of them, in the order of Stable Diffusion 3.
        token_dim, pooled_dim: the model's.
        padding, stored, source: see `EncodersConfig`.
        t5_tokens: rows that T5 is given.

    Raises:
        ComponentsMissing: the folder does not hold one of them.
        ValueError: they do not fit the model.
    """
    return EncodersConfig(
        encoders=tuple(_describe(components, name, t5_tokens) for name in names),
        token_dim=token_dim,
        pooled_dim=pooled_dim,
        padding=padding,
        stored=stored,
        source=source,
    )


def _describe(components: Path, name: EncoderName, t5_tokens: int) -> TextEncoder:
    network, tokenizer = (components / folder for folder in FOLDERS[name])
    if not network.is_dir() or not tokenizer.is_dir():
        raise ComponentsMissing(f"{components} does not hold {name}: {network.name} and {tokenizer.name} are needed")
    config = read_config(network)
    clip = name in CLIPS
    try:
        return TextEncoder(
            name=name,
            tokens=min(_CLIP_TOKENS, config["max_position_embeddings"]) if clip else t5_tokens,
            width=config["hidden_size"] if clip else config["d_model"],
            pooled=config["projection_dim"] if clip else 0,
            sha256=folder_digest(network, tokenizer),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ComponentsMissing(f"{network / 'config.json'} is not that of a {CLASSES[name]} ({error})") from None


def load_encoders(
    components: Path, config: EncodersConfig, device: str, *, without: Collection[str] = ()
) -> TextEncoders:
    """Load the text encoders that a config names, to compute in fp32, but for those that are to be left out.

    Weights that are published in half precision stay so in memory (`mmdit.half_weights`).

    Raises:
        ComponentsMissing: the folder does not hold them, or others; or a library is not installed.
    """
    found: dict[EncoderName, tuple[_Tokenizer, _Network]] = {}
    transformers = library("transformers")
    for encoder in config.encoders:
        if encoder.name in without:
            continue
        network, tokenizer = (components / folder for folder in FOLDERS[encoder.name])
        _require_digest(f"the text encoder {encoder.name}", encoder.sha256, network, tokenizer)
        loaded = load_whole(getattr(transformers, CLASSES[encoder.name]), network, dtype=published_dtype(network))
        halve(loaded)
        reads = load_tokenizer(transformers.AutoTokenizer, tokenizer)
        found[encoder.name] = (reads, loaded.to(device=device))
    encoders = TextEncoders(config=config, loaded=found, device=device)
    _try(encoders, components)
    return encoders


def _try(encoders: TextEncoders, components: Path) -> None:
    """Raise `ComponentsMissing` unless every encoder gives for a caption what the config says that it gives."""
    for encoder in encoders.config.encoders:
        if encoder.name not in encoders.loaded:
            continue
        try:
            (text,) = encoders.column(encoder, ["a caption"])
        except Exception as error:  # whatever a library makes of files that do not fit each other
            raise ComponentsMissing(
                f"the text encoder {encoder.name} in {components} reads no caption: {error}"
            ) from None
        assert text is not None
        found = (text.tokens.shape[1], len(text.pooled))
        if found != (encoder.width, encoder.pooled) or len(text.tokens) > encoder.tokens:
            raise ComponentsMissing(
                f"the text encoder {encoder.name} in {components} gives tokens of {found[0]} and a pooled vector of "
                f"{found[1]}, but {encoder.width} and {encoder.pooled} are needed"
            )


def describe_vae(components: Path, *, pixel_height: int, pixel_width: int) -> VaeSpace:
    """Return what a run config says of the autoencoder in a folder, for pictures of a size.

    Raises:
        ComponentsMissing: there is none.
        ValueError: the size does not fit it.
    """
    folder = components / VAE_FOLDER
    if not folder.is_dir():
        raise ComponentsMissing(f"{components} does not hold an autoencoder: there is no {VAE_FOLDER} in it")
    config = read_config(folder)
    try:
        factor = 1 << (len(config["block_out_channels"]) - 1)
        return VaeSpace(
            channels=config["latent_channels"],
            height=pixel_height // factor,
            width=pixel_width // factor,
            factor=factor,
            pixel_channels=config["in_channels"],
            shift=float(config.get("shift_factor") or 0.0),
            scale=float(config["scaling_factor"]),
            sha256=folder_digest(folder),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ComponentsMissing(f"{folder / 'config.json'} is not that of an AutoencoderKL ({error})") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoencoder:
    """An autoencoder, loaded."""

    space: VaeSpace
    network: Any
    device: str

    @torch.inference_mode()
    def encode(self, pictures_BHWC: ByteImages) -> FloatImages:
        """Pictures to latents [N, C, H / factor, W / factor], fp32: the mean, without noise."""
        pixels = torch.from_numpy(np.ascontiguousarray(pictures_BHWC.transpose(0, 3, 1, 2))).to(self.device)
        mean = self.network.encode(pixels.float() / 127.5 - 1.0).latent_dist.mean
        latents: FloatImages = ((mean - self.space.shift) * self.space.scale).cpu().numpy()
        return latents

    @torch.inference_mode()
    def decode(self, latents_BCHW: FloatImages) -> ByteImages:
        """Latents to pictures [N, H, W, C], clipped to 0..255."""
        latents = torch.from_numpy(np.ascontiguousarray(latents_BCHW, dtype=np.float32)).to(self.device)
        pixels = self.network.decode(latents / self.space.scale + self.space.shift).sample
        bytes_BCHW = ((pixels + 1.0) * 127.5).clamp(0, 255).round().to(torch.uint8)
        return np.ascontiguousarray(bytes_BCHW.cpu().numpy().transpose(0, 2, 3, 1))


def load_vae(components: Path, space: VaeSpace, device: str) -> Autoencoder:
    """Load the autoencoder that a space names, in fp32.

    Raises:
        ComponentsMissing: the folder does not hold it, or another one.
    """
    folder = components / VAE_FOLDER
    _require_digest("the autoencoder", space.sha256, folder)
    network = load_whole(library("diffusers").AutoencoderKL, folder, dtype=torch.float32, low_cpu_mem_usage=False)
    return Autoencoder(
        space=space,
        network=network.to(device=device),
        device=device,
    )


def _require_digest(name: str, sha256: str, *folders: Path) -> None:
    if missing := [folder for folder in folders if not folder.is_dir()]:
        raise ComponentsMissing(f"there is no {missing[0]}, which {name} needs")
    found = folder_digest(*folders)
    if found != sha256:
        raise ComponentsMissing(
            f"{name} in {folders[0].parent} has the digest {found[:16]}, but {sha256[:16]} is needed: it is "
            "another network"
        )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def library(name: str) -> Any:
    """Import a library that only those need who run these networks; it is heavy."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they and their imports warn about themselves
            found = importlib.import_module(name)
            logging = importlib.import_module(f"{name}.utils.logging")
            logging.set_verbosity_error()
            logging.disable_progress_bar()
            return found
    except ImportError:
        raise ComponentsMissing(
            f"the networks need {name}, which is not installed; in the project's folder, `pip install -c "
            "constraints.txt '.[encoders]'` installs it"
        ) from None


def _halves(values: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    return values.float().cpu().numpy().astype(np.float16)
