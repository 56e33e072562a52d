"""How far honest replays may lie apart in runs that were not calibrated. Imports nothing heavy: every setting asks."""

from collections.abc import Mapping
from typing import Final

START_TOLERANCE: Final[Mapping[str, float]] = {"fp32": 1e-3, "bf16": 0.06}
"""Raw tolerances from which the protocol started; no calibration proposes a larger one."""
DEFAULT_TOLERANCES: Final[Mapping[str, tuple[float, float]]] = {"fp32": (1e-4, 1e-3), "bf16": (0.008, 0.04)}
"""For each precision the raw and the code tolerance of runs that were not calibrated. `benchmarks.verify` measures
what they let through: both far above the largest honest difference and below the smallest cheat's."""
