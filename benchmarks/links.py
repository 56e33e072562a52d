"""What a home line must carry for models from 0.8 to 8 billion parameters, and how long units must be for it to do so.

Bytes a parameter are those that `benchmarks.codec` measured of files; parameters are counted from the model's own
tensors. The speed of a card is an assumption, stated below: nothing is timed here.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.report import RESULTS, Report
from diloco.schema import schema_of
from mmdit.presets import of_depth

UP_BIT_S: Final = 20e6
DOWN_BIT_S: Final = 100e6
TRANSFER_SHARE: Final = 0.05
BATCH: Final = 32
SUSTAINED_FLOPS: Final = 60e12
"""Of an RTX 4090, a card of 24 GB: about two fifths of its dense bf16 peak with sums in fp32."""
TOKENS: Final = 256 + 154
"""Of a picture of 256 x 256 pixels and its caption; forwards and backwards cost 6 FLOP a parameter and token."""
READ_SHARE: Final = 0.5
"""Image and text have parameters of their own: a token meets half of them."""
FP32_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes a parameter of a delta and of a patch."""

    up: float
    down: float


def measured_rates() -> Rates:
    """Return what `benchmarks.codec` measured; the limits that it is held to where it has not run."""
    path = RESULTS / "codec.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    found = {row["what"]: float(row["bytes_per_parameter"]) for row in rows}
    patches = [size for what, size in found.items() if what.startswith("patch")]
    return Rates(up=found.get("ternary, the default", 0.15), down=patches[0] if patches else 0.17)


def row(depth: int, rates: Rates) -> dict[str, Any]:
    """Return the numbers of one model."""
    parameters = schema_of(of_depth(depth)).num_elements
    up, down, snapshot = (rate * parameters for rate in (rates.up, rates.down, FP32_BYTES))
    transfer_s = 8 * up / UP_BIT_S + 8 * down / DOWN_BIT_S
    step_s = BATCH * 6 * parameters * TOKENS * READ_SHARE / SUSTAINED_FLOPS
    return {
        "model": f"d{depth}",
        "parameters": parameters,
        "MB_up": up / 1e6,
        "MB_down": down / 1e6,
        "GB_for_a_joiner": snapshot / 1e9,
        "minutes_up_at_20_Mbit_s": 8 * up / UP_BIT_S / 60,
        "minutes_down_at_100_Mbit_s": 8 * down / DOWN_BIT_S / 60,
        "joiner_minutes_at_100_Mbit_s": 8 * snapshot / DOWN_BIT_S / 60,
        "minutes_up_in_bf16": 8 * 2 * parameters / UP_BIT_S / 60,
        "seconds_a_step": step_s,
        "H_for_transfers_under_5_percent": math.ceil(transfer_s / TRANSFER_SHARE / step_s),
    }


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest model alone; write nothing")
    quick = parser.parse_args().quick
    report = Report(name="links")
    rates = measured_rates()
    for depth in (18,) if quick else (18, 24, 30, 38):
        report.add_row(**row(depth, rates))
    return 0 if report.finish(quick=quick) else 1


if __name__ == "__main__":
    sys.exit(main())
