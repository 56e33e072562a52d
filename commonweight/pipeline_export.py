"""What makes an exported directory a whole `StableDiffusion3Pipeline`, which draws from a string prompt."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from commonweight.tiny_components import write_identity_vae
from mmdit.components import CLASSES, FOLDERS, VAE_FOLDER, library, require_networks
from mmdit.encoders import EncodersConfig
from mmdit.export import Loaded
from mmdit.network_files import ComponentsMissing, network_files
from mmdit.space import VaeSpace

_INDEX: Final = "model_index.json"
_TOKENIZERS: Final = {"clip_l": "CLIPTokenizer", "clip_g": "CLIPTokenizer", "t5": "T5TokenizerFast"}


def write_pipeline_parts(directory: Path, loaded: Loaded, components: Path) -> tuple[str, ...]:
    """Write all of a pipeline but the transformer and the scheduler; return the parts that it lacks.

    Args:
        directory: where transformer and scheduler are or will be.
        loaded: the checkpoint; it must hear captions through text encoders.
        components: a folder with its networks. Models that paint in pixels need no autoencoder: they get one that hands
            pixels through.

    Raises:
        ComponentsMissing: a network is not there, or is another one than the checkpoint's.
        ValueError: the checkpoint reads the bytes of captions, for which no encoder of the pipeline stands.
    """
    conditioning, space = loaded.conditioning, loaded.space
    if not isinstance(conditioning, EncodersConfig):
        raise ValueError(
            "the checkpoint reads captions byte by byte, which no text encoder of diffusers does; export it without "
            "--components"
        )
    vae = space if isinstance(space, VaeSpace) else None
    require_networks(components, conditioning, vae)
    heard = [encoder.name for encoder in conditioning.encoders]
    for name in heard:
        for folder in FOLDERS[name]:
            _copy(components / folder, directory / folder)
    if vae is None:
        write_identity_vae(directory / VAE_FOLDER, space.channels)
    else:
        _copy(components / VAE_FOLDER, directory / VAE_FOLDER)
    index, lacking = _index(directory, heard)
    (directory / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return lacking


def _index(directory: Path, heard: list[Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline",
        "_diffusers_version": library("diffusers").__version__,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    lacking: list[str] = []
    for name, (network, tokenizer) in FOLDERS.items():
        if name in heard:
            index[network] = ["transformers", CLASSES[name]]
            index[tokenizer] = ["transformers", _tokenizer_class(directory / tokenizer) or _TOKENIZERS[name]]
        else:
            index[network] = index[tokenizer] = [None, None]
            lacking += [network, tokenizer]
    return index, tuple(lacking)


def _tokenizer_class(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "tokenizer_config.json").read_bytes()).get("tokenizer_class")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) and hasattr(library("transformers"), found) else None


def _copy(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for path in network_files(source):
        place = target / path.name
        try:
            shutil.copyfile(path, place)
        except FileNotFoundError:
            raise ComponentsMissing(f"{path} was removed meanwhile") from None
