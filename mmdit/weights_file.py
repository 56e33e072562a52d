"""Writing weights as safetensors with more than one key of metadata; the same weights and metadata give the same bytes.

The library's own writer puts the keys in another order each time.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

_DTYPES: Final[Mapping[torch.dtype, str]] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_ALIGNMENT: Final = 8


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, anew.

    Args:
        path: where; an unfinished file is left for the caller to remove.
        state: fp32, bf16, fp16 or fp8 (e4m3) tensors.
        metadata: what the file says of itself.

    Raises:
        OSError: the file can't be written.
    """
    # Wide numbers first, so that each starts at a multiple of its width, as the library has it.
    names = sorted(state, key=lambda name: (-state[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for name in names:
        end = start + state[name].nbytes
        header[name] = {
            "dtype": _DTYPES[state[name].dtype],
            "shape": list(state[name].shape),
            "data_offsets": [start, end],
        }
        start = end
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
