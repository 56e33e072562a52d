"""The recorded numbers that must never change within one `diloco.NUMERICS`.

`python -m tests.diloco.golden` prints the canonical digests as this machine computes them (the tests run it on other
CPU capabilities); with `--record` it writes `golden.json` and `golden_unit.delta`.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from diloco.average import average_round, average_share
from diloco.checkpoint import write_checkpoint
from diloco.codec import CodecConfig, encode
from diloco.container import write_container
from diloco.draws import Draws
from diloco.genesis import initial_state
from diloco.merge import (
    MergeFiles,
    MergeInput,
    MergeRules,
    OuterConfig,
    OuterState,
    UnmergeInput,
    merge_round,
    normalise_weights,
)
from diloco.patch import PatchConfig, open_patch
from diloco.schema import schema_of
from diloco.sketch import sketch
from diloco.streams import Stream
from diloco.tables import Floats, logit_normal_table
from diloco.unit import run_unit
from diloco.weigh import delta_norm2, gram, weigh_delta
from tests.diloco.examples import FINE, SCHEMA, SEED, TINY, UNIT, UNIT_ID, container, encoded, normals, shard_set
from verify.robust import robust_shares

HERE = Path(__file__).parent
DIGESTS = HERE / "golden.json"
UNIT_DELTA = HERE / "golden_unit.delta"
CODECS = [CodecConfig(kind="dither", levels=levels, block=256, reach=704, width=128) for levels in (1, 2, 7, 31, 127)]
OUTER = OuterConfig(lr=0.7, momentum=0.9)
PATCH = PatchConfig(block=1024, threshold=256)


def recorded() -> dict[str, str]:
    """Return the committed digests."""
    digests: dict[str, str] = json.loads(DIGESTS.read_text())
    return digests


def digests() -> dict[str, str]:
    """Compute every canonical digest."""
    found = {name: _hex(values) for name, values in _draws().items()}
    for codec in CODECS:
        found[f"codec.{codec.levels}"] = encoded(1, codec=codec).content_digest().hex()
    with tempfile.TemporaryDirectory() as directory:
        found |= _merge(Path(directory))
        found |= _weighing(Path(directory))
    return found


def _draws() -> dict[str, npt.NDArray[np.generic]]:
    places = [(step, place) for step in (0, 1, 1000) for place in (0, 7)]
    draws = Draws(SEED)
    return {
        "order": np.array([draws.index(step, place, 1797) for step, place in places]),
        "noise": np.stack([Stream(SEED, "noise").normal(step, place, 67) for step, place in places]),
        "timestep": logit_normal_table()[np.stack([Stream(SEED, "timestep").u16(s, place, 1) for s, place in places])],
        "dropout": np.stack([Stream(SEED, "dropout").u16(step, place, 1) for step, place in places]),
        "dither": np.stack([Stream(SEED, "dither").u16(step, place, 67) for step, place in places]),
    }


def _merge(directory: Path) -> dict[str, str]:
    base = {spec.name: normals(f"{spec.name}/base", spec.shape) for spec in SCHEMA.tensors}
    base["pos_embed.pos_embed"] = normals("buffer", (1, 4, 6))
    momentum = {spec.name: normals(f"{spec.name}/momentum", spec.shape, 1e-3) for spec in SCHEMA.tensors}
    write_checkpoint(directory / "base", base)
    write_checkpoint(directory / "momentum", momentum)
    claims = [hashlib.sha256(bytes([number])).digest() for number in range(3)]
    weights = normalise_weights([100, 250, 17], claims)
    inputs = [
        MergeInput(claim_digest=claim, container=container(directory, number), weight=weight)
        for number, (claim, weight) in enumerate(zip(claims, weights, strict=True))
    ]
    base_state = OuterState(
        weights=directory / "base",
        weights_sha256=bytes(32),
        momentum=directory / "momentum",
        residual=directory / "momentum",
    )
    merged = merge_round(base_state, inputs, _rules(), _files(directory, "next"))
    patch = open_patch(directory / "next.patch", SCHEMA, PATCH, bytes(32))
    share = average_share(0.9, 12)
    averaged = average_round(directory / "base", directory / "next.weights", directory / "next.ema", share)
    return {
        "merge.ema": averaged.sha256.hex(),
        "merge.weights": merged.weights.sha256.hex(),
        "merge.momentum": merged.momentum.sha256.hex(),
        "merge.residual": merged.residual.sha256.hex(),
        "merge.patch": patch.content_digest().hex(),
        "sketch": _hex(sketch(inputs[0].container.decoded_chunks(), SEED)),
    }


def _weighing(directory: Path) -> dict[str, str]:
    """What the weights of a merge follow from, and a delta taken out again; `directory` holds the merge's files."""
    fine = weigh_delta(container(directory, 0, codec=FINE), SEED)
    deltas = [container(directory, number) for number in range(7)]
    weighings = [weigh_delta(delta, SEED) for delta in deltas]
    sketches = [weighing.sketch for weighing in weighings]
    shares = [100 + 7 * number for number in range(7)]
    found = {
        f"weights.{rule}": _hex(np.array(robust_shares(rule, gram(sketches), shares, hostile_share=2**22)))
        for rule in ("geometric-median", "multi-krum", "nnm-clip")
    }
    taken_out = UnmergeInput(container=deltas[0], weight=4_567_890, rounds_ago=3)
    base = OuterState(
        weights=directory / "base",
        weights_sha256=bytes(32),
        momentum=directory / "momentum",
        residual=None,
    )
    result = merge_round(base, [], _rules(), _files(directory, "out"), unmerge=[taken_out])
    return found | {
        "weigh.sketch": _hex(np.stack(sketches)),
        "weigh.sketch.7": _hex(fine.sketch),
        "weigh.norm2.7": _hex(np.array([fine.norm2])),
        "weigh.norm2": _hex(np.array([weighing.norm2 for weighing in weighings])),
        "norm2": _hex(np.array([delta_norm2(delta) for delta in deltas])),
        "weigh.gram": _hex(gram(sketches)),
        "unmerge.weights": result.weights.sha256.hex(),
        "unmerge.momentum": result.momentum.sha256.hex(),
        "unmerge.residual": result.residual.sha256.hex(),
    }


def _rules() -> MergeRules:
    return MergeRules(outer=OUTER, patch=PATCH, schema=SCHEMA)


def _files(directory: Path, name: str) -> MergeFiles:
    return MergeFiles(
        weights=directory / f"{name}.weights",
        momentum=directory / f"{name}.momentum",
        residual=directory / f"{name}.residual",
        patch=directory / f"{name}.patch",
    )


def _hex(values: npt.NDArray[np.generic]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def unit_delta() -> dict[str, Floats]:
    """Run the golden unit on the CPU."""
    return run_unit(UNIT, TINY, initial_state(TINY, SEED), shard_set(), device="cpu", on_step=None).delta


def main() -> None:
    """Print or record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--unit", action="store_true", help="print the digest of the raw delta of the golden unit")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.unit:
        raw = b"".join(values.tobytes() for values in unit_delta().values())
        sys.stdout.write(hashlib.sha256(raw).hexdigest())
        return
    sys.stdout.write(json.dumps(digests()))
    if arguments.record:
        DIGESTS.write_text(json.dumps(digests(), indent=2, sort_keys=True) + "\n")
        write_container(UNIT_DELTA, encode(unit_delta(), schema_of(TINY), FINE, UNIT.seed), UNIT_ID)


if __name__ == "__main__":
    main()
