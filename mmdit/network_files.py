"""The files of a frozen network: which of them count, their digest, and loading from these and no others.

A folder of a model hub holds more than one needs, and a stranger's folder may hold anything. What says what a network
computes is in plain files with a few endings, in the folder itself; a digest covers all of them. A library that loads a
network is shown a folder of links to these alone, so that nothing can matter that the digest does not cover.
"""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

_MEANINGFUL: Final = (".json", ".safetensors", ".txt", ".model")
_INDEX: Final = ".safetensors.index.json"
_MOST_CONFIG_BYTES: Final = 1 << 20
_MOST_INDEX_BYTES: Final = 1 << 24
_CODE: Final = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation")
"""What a config can name that is code of others, or computes something else than the class does."""
_HALVES: Final = {"F16": torch.float16, "BF16": torch.bfloat16}


class ComponentsMissing(ValueError):
    """A folder does not hold a network that is needed, or not the one that is needed."""


def network_files(folder: Path) -> list[Path]:
    """Return the files of a network's folder that say what it computes. Copies of the weights in fp16 do not.

    Raises:
        ComponentsMissing: an index names weights that are none of these files.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix in _MEANINGFUL and path.is_file())
    files = [path for path in found if ".fp16" not in path.name]
    names = {path.name for path in files}
    for index in (path for path in files if path.name.endswith(_INDEX)):
        for weights in sorted(_indexed(index)):
            if weights not in names or not weights.endswith(".safetensors"):
                raise ComponentsMissing(f"{index} names {weights[:80]!r}, which is no .safetensors file beside it")
    return files


def _indexed(index: Path) -> set[str]:
    named = _read_object(index, _MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ComponentsMissing(f"{index} has no weight_map of names")
    return set(named.values())


def folder_digest(*folders: Path) -> str:
    """Return the SHA-256 over the names and digests of the files in folders that say what a network computes.

    Raises:
        ComponentsMissing: see `network_files`.
        OSError: one can't be read.
    """
    entries: dict[str, str] = {}
    for folder in folders:
        for path in network_files(folder):
            with path.open("rb") as file:
                entries[f"{folder.name}/{path.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode("ascii")).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Return a network's config.json.

    Raises:
        ComponentsMissing: there is none, or it is no plain description of a network.
    """
    return _read_object(folder / "config.json", _MOST_CONFIG_BYTES)


def _read_object(path: Path, most: int) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
        values = json.loads(raw) if len(raw) <= most else None
    except (OSError, ValueError, RecursionError) as error:
        raise ComponentsMissing(f"{path} can't be read: {error}") from None
    if not isinstance(values, dict):
        raise ComponentsMissing(f"{path} is not a JSON object of at most {most:,} bytes")
    if named := [name for name in _CODE if values.get(name) is not None]:
        raise ComponentsMissing(
            f"{path} has {named[0]}, which names code or a way to compute that is not the plain one"
        )
    return values


def published_dtype(folder: Path) -> torch.dtype:
    """Return the half precision in which all of a network's weights are on the disk, or else fp32.

    Raises:
        ComponentsMissing: they can't be read.
    """
    from safetensors import safe_open

    found: set[str] = set()
    for path in network_files(folder):
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  it is no dict
            except Exception as error:  # the library's own kind, which it does not export
                raise ComponentsMissing(f"{path} can't be read: {error}") from None
    kinds = {kind for kind in found if kind not in ("I64", "I32", "BOOL")}
    return _HALVES.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32


def load_whole(kind: Any, folder: Path, *, dtype: torch.dtype, **options: Any) -> Any:
    """Load a network by its class in transformers or diffusers, frozen; every weight must be in its files.

    Raises:
        ComponentsMissing: one is not, or has another shape; or the library can't load them.
    """
    read_config(folder)
    with _links(folder) as links, _said(folder):
        network, report = kind.from_pretrained(
            str(links),
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **{_dtype_option(kind): dtype},
            **options,
        )
    for name, words in (("missing_keys", "is missing"), ("mismatched_keys", "has another shape"), ("error_msgs", "")):
        if found := sorted(map(str, report.get(name) or ())):
            # The library would go on, with random numbers in their place.
            raise ComponentsMissing(f"{folder} does not hold all of the network: {found[0][:120]} {words}".rstrip())
    return network.eval().requires_grad_(requires_grad=False)


def _dtype_option(kind: Any) -> str:
    return "torch_dtype" if kind.__module__.startswith("diffusers") else "dtype"


def load_tokenizer(kind: Any, folder: Path) -> Any:
    """Load a tokenizer by transformers, without running any code of its folder.

    Raises:
        ComponentsMissing: the library can't load it.
    """
    if (folder / _TOKENIZER_CONFIG).exists():
        _read_object(folder / _TOKENIZER_CONFIG, _MOST_INDEX_BYTES)
    with _links(folder) as links, _said(folder):
        return kind.from_pretrained(str(links), local_files_only=True, trust_remote_code=False)


_TOKENIZER_CONFIG: Final = "tokenizer_config.json"


@contextmanager
def _links(folder: Path) -> Iterator[Path]:
    """A folder with nothing but a network's own files in it."""
    files = network_files(folder)
    with tempfile.TemporaryDirectory(prefix="commonweight-network-") as name:
        place = Path(name) / folder.name
        place.mkdir()
        for path in files:
            (place / path.name).symlink_to(path.absolute())
        yield place


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Turn whatever a library makes of a folder into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ComponentsMissing(f"{folder} can't be loaded: {said[0][:300]}") from None
