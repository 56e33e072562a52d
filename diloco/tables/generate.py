"""How the lookup tables were made: `python -m diloco.tables.generate DIR` writes both and prints their digests.

Quantiles come from the standard library in double precision and are rounded to fp32. Another machine's logarithm may
round a few of them the other way, so the committed files, not this script, are the definition; a test holds the two to
within one unit in the last place.
"""

import hashlib
import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

from diloco.tables import TABLE_SIZE, Floats


def normal_quantiles() -> Floats:
    """Return fp32[65536] standard normal quantiles at (k + 1/2) / 2^16, antisymmetric to the bit."""
    normal = NormalDist()
    half = [normal.inv_cdf((k + 0.5) / TABLE_SIZE) for k in range(TABLE_SIZE // 2)]
    # The upper half mirrors the lower one, so that the mean of the table is exactly zero.
    return np.array([*half, *(-value for value in reversed(half))], dtype=np.float32)


def logit_normal_quantiles() -> Floats:
    """Return fp32[65536] quantiles of sigmoid(z), z standard normal, at (k + 1/2) / 2^16."""
    normal = NormalDist()
    quantiles = (normal.inv_cdf((k + 0.5) / TABLE_SIZE) for k in range(TABLE_SIZE))
    return np.array([1.0 / (1.0 + math.exp(-z)) for z in quantiles], dtype=np.float32)


def main(directory: Path) -> None:
    """Write both tables into `directory` and print the digest of each."""
    for name, table in (("normal.f32", normal_quantiles()), ("logit_normal.f32", logit_normal_quantiles())):
        raw = table.astype("<f4").tobytes()
        (directory / name).write_bytes(raw)
        sys.stdout.write(f"{hashlib.sha256(raw).hexdigest()}  {name}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
