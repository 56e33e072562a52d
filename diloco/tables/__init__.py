"""The 2^16-entry lookup tables that turn a uniform 16-bit word into a normal or a logit-normal number.

Both tables ship with the code because the functions behind them (logarithms, exponentials) differ between machines;
looking an entry up does not. Entry k is the quantile at (k + 1/2) / 2^16, little-endian fp32. `generate.py` made them.
"""

import hashlib
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from protocol.errors import SelfTestFailed

TABLE_SIZE: Final = 1 << 16
NORMAL_SHA256: Final = "1cfbba1e07e34386a57626f82aeb43e6ed54ba70a3ea6b7d964dc66a841074a8"
LOGIT_NORMAL_SHA256: Final = "7fb789603973570bac63f2ee4d21d2eee4de69a89db0105ef529b2d49182d8a8"

Floats = npt.NDArray[np.float32]


@cache
def normal_table() -> Floats:
    """Return the standard normal quantiles, fp32[65536], ascending, antisymmetric, read-only.

    Raises:
        SelfTestFailed: the installed table is not the one that this version was released with.
    """
    return _load("normal.f32", NORMAL_SHA256)


@cache
def logit_normal_table() -> Floats:
    """Return the quantiles of sigmoid(normal), fp32[65536], ascending, in (0, 1), read-only.

    The timestep density of rectified flow training with location 0 and scale 1 (arXiv 2403.03206, section 3.1).

    Raises:
        SelfTestFailed: the installed table is not the one that this version was released with.
    """
    return _load("logit_normal.f32", LOGIT_NORMAL_SHA256)


def _load(name: str, sha256: str) -> Floats:
    raw = Path(__file__).with_name(name).read_bytes()
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise SelfTestFailed(f"The lookup table {name} is damaged; install Commonweight again.")
    # A table of another byte order would be a copy; on the machines we support this is a read-only view.
    return np.frombuffer(raw, dtype="<f4").astype(np.float32, copy=False)
