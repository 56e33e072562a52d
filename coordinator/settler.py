"""The settler process: jobs in, results out. It reads what strangers sent, merges and measures; it has no database,
no keys and no port.

One JSON object a line each way, over a socket that the supervisor made. Jobs: `describe`, `ping`, `admit` (is this file
a delta of this run?), `compare` (does a replica agree?), `weigh` (outliers and weights of a merge), `merge`,
`evaluate`. The heavy ones run one at a time each, beside the admissions.
"""

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np

from coordinator.weighing import weigh
from diloco.average import average_round, average_share
from diloco.container import Container, largest_container
from diloco.merge import MergeFiles, MergeInput, OuterState, UnmergeInput, merge_round
from diloco.sketch import sketch
from protocol import layout
from protocol.documents import Artifact, FileEntry, RunConfig
from protocol.errors import Bug, BytesRefused, CheckpointCorrupt, CommonweightError, SketchMismatch
from verify.admission import admit_delta
from verify.compare import sketch_difference
from verify.plain_files import file_sha256
from verify.replay import codec_config, conditioning_config, delta_schema, merge_rules, model_config, shard_set

logger = logging.getLogger(__name__)

VALIDATION_TRIPLES: Final = 511
VALIDATION_BATCH: Final = 64

Job = dict[str, Any]


def describe(config: RunConfig) -> Job:
    """Return what the control process must know about the run's deltas: the most bytes that one may have."""
    return {"delta_bytes": largest_container(delta_schema(config), codec_config(config))}


def admit(config: RunConfig, job: Job) -> Job:
    """Raise the `BytesRefused` that fits unless the file is the delta that its claim committed to."""
    admit_delta(
        Path(job["path"]),
        config=config,
        unit=job["unit"],
        artifact=Artifact(**job["artifact"]),
        file_digest=job["file_digest"],
    )
    if "sketch" in job:
        _check_sketch(config, job)
    return {}


def _check_sketch(config: RunConfig, job: Job) -> None:
    """A replica's bytes must be those that it answered with before; raise `SketchMismatch`."""
    container = Container.open(
        Path(job["path"]), delta_schema(config), codec_config(config), bytes.fromhex(job["unit"])
    )
    found = sketch(container.decoded_chunks(), bytes.fromhex(job["sketch"]["seed"]))
    if found.astype("<f4").tobytes().hex() != job["sketch"]["value"]:
        raise SketchMismatch


def compare(config: RunConfig, job: Job) -> Job:
    """Return D between a stored delta and a replica's sketch, both under the replica's seed."""
    container = Container.open(
        Path(job["path"]), delta_schema(config), codec_config(config), bytes.fromhex(job["unit"])
    )
    ours = sketch(container.decoded_chunks(), bytes.fromhex(job["seed"]))
    theirs = np.frombuffer(bytes.fromhex(job["sketch"]), dtype="<f4").astype(np.float32)
    return {"difference": sketch_difference(theirs, ours)}


def merge(config: RunConfig, job: Job) -> Job:
    """Merge a round's deltas into `out`; return the entries of the files written there.

    Everything is read and hashed again first: a bit that a disk has flipped since the receipt would otherwise go into a
    signed checkpoint that nobody could derive again.

    Raises:
        CheckpointCorrupt, BytesRefused: a file is not what was signed for it; the message names it.
    """
    base, out = Path(job["base"]), Path(job["out"])
    for path, sha256 in job["base_files"].items():
        if file_sha256(base / path) != sha256:
            raise CheckpointCorrupt(f"{base / path} is not what the manifest signed; restore it from a backup.")
    inputs = [
        MergeInput(
            claim_digest=bytes.fromhex(entry["claim"]),
            container=_checked(Path(entry["path"]), config, entry),
            weight=entry["weight"],
        )
        for entry in job["entries"]
    ]
    taken_out = [
        UnmergeInput(
            container=_checked(Path(entry["path"]), config, entry),
            weight=entry["weight"],
            rounds_ago=entry["rounds_ago"],
        )
        for entry in job["unmerge"]
    ]
    targets = {path: out / path for path in (*layout.STATE, layout.PATCH)}
    for target in targets.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    momentum, residual = base / layout.MOMENTUM, base / layout.RESIDUAL
    result = merge_round(
        OuterState(
            weights=base / layout.WEIGHTS,
            weights_sha256=bytes.fromhex(job["base_files"][layout.WEIGHTS]),
            momentum=momentum if momentum.exists() else None,
            residual=residual if residual.exists() else None,
        ),
        inputs,
        merge_rules(config),
        MergeFiles(
            weights=targets[layout.WEIGHTS],
            momentum=targets[layout.MOMENTUM],
            residual=targets[layout.RESIDUAL],
            patch=targets[layout.PATCH],
        ),
        unmerge=taken_out,
    )
    patch = targets[layout.PATCH]
    files = [
        FileEntry(path=path, sha256=digest.sha256.hex(), size=digest.size)
        for path, digest in (
            (layout.WEIGHTS, result.weights),
            (layout.MOMENTUM, result.momentum),
            (layout.RESIDUAL, result.residual),
        )
    ]
    files.append(FileEntry(path=layout.PATCH, sha256=file_sha256(patch), size=patch.stat().st_size))
    if config.outer.ema_decay:
        files.append(_average(config, base, out, job["checkpoint"]))
    return {"files": [asdict(entry) for entry in files]}


def _average(config: RunConfig, base: Path, out: Path, checkpoint: int) -> FileEntry:
    target = out / layout.EMA
    target.parent.mkdir(parents=True, exist_ok=True)
    before = base / (layout.EMA if checkpoint > 1 else layout.WEIGHTS)
    share = average_share(config.outer.ema_decay, checkpoint)
    digest = average_round(before, out / layout.WEIGHTS, target, share)
    return FileEntry(path=layout.EMA, sha256=digest.sha256.hex(), size=digest.size)


def _checked(path: Path, config: RunConfig, entry: Job) -> Container:
    artifact = Artifact(
        role=layout.ROLE_DELTA,
        content_sha256=entry["content_sha256"],
        blob_sha256=entry["blob_sha256"],
        size=entry["size"],
    )
    try:
        admit_delta(path, config=config, unit=entry["unit"], artifact=artifact)
    except (BytesRefused, OSError) as error:
        raise CheckpointCorrupt(
            f"The delta of claim {entry['claim'][:12]} at {path} is not what was received ({error}); restore the file "
            "from a backup, the round then goes on."
        ) from None
    return Container.open(path, delta_schema(config), codec_config(config), bytes.fromhex(entry["unit"]))


def evaluate(config: RunConfig, job: Job) -> Job:
    """Return the validation loss of a checkpoint's weights, and of their running average if it is given."""
    import torch

    from diloco.checkpoint import TensorFile
    from diloco.evaluate import validation_loss
    from diloco.shards import Shard

    torch.set_num_threads(1)
    shards = shard_set(config, [Shard.open(Path(job["heldout"]))], [job["heldout_without"]])
    return {
        name: validation_loss(
            model_config(config),
            TensorFile.open(Path(path)).load(),
            shards,
            bytes.fromhex(config.seed),
            count=VALIDATION_TRIPLES,
            batch=VALIDATION_BATCH,
            max_tokens=conditioning_config(config).max_tokens,
            device="cpu",
        )
        for name, path in job["weights"].items()
    }


class Settler:
    """Reads jobs from a socket and writes their results, in whatever order they end."""

    def __init__(self, config: RunConfig, connection: socket.socket) -> None:
        self._config = config
        self._connection = connection
        self._writing = threading.Lock()
        self._pools = {
            "describe": ThreadPoolExecutor(1),
            "ping": ThreadPoolExecutor(1),
            "admit": ThreadPoolExecutor(2),
            "compare": ThreadPoolExecutor(1),
            "weigh": ThreadPoolExecutor(1),
            "merge": ThreadPoolExecutor(1),
            "evaluate": ThreadPoolExecutor(1),
        }
        self._work: dict[str, Callable[[Job], Job]] = {
            "describe": lambda _: describe(config),
            "ping": lambda _: {},
            "admit": lambda job: admit(config, job),
            "compare": lambda job: compare(config, job),
            "weigh": lambda job: weigh(config, job),
            "merge": lambda job: merge(config, job),
            "evaluate": lambda job: evaluate(config, job),
        }

    def serve(self) -> None:
        """Work until the other side closes."""
        with self._connection.makefile("rb") as lines:
            for line in lines:
                job = json.loads(line)
                self._pools[job["kind"]].submit(self._run, job)

    def _run(self, job: Job) -> None:
        answer: Job = {"id": job["id"]}
        try:
            answer["result"] = self._work[job["kind"]](job)
        except CommonweightError as error:
            answer["error"] = {"code": error.code, "message": error.message}
        except OSError as error:
            logger.exception("job %s failed", job["kind"], extra={"action": "job_failed"})
            answer["error"] = {"code": Bug.code, "message": str(error), "errno": error.errno}
        except Exception as error:
            logger.exception("job %s failed", job["kind"], extra={"action": "job_failed"})
            answer["error"] = {"code": Bug.code, "message": repr(error)}
        with self._writing:
            self._connection.sendall(json.dumps(answer).encode() + b"\n")


def main(arguments: list[str]) -> int:
    """Entry of the settler process: `python -P -m coordinator.settler DIR SOCKET_FD LIFELINE_FD`."""
    from coordinator.directory import RunDirectory
    from coordinator.lifeline import exit_with_parent
    from diloco.determinism import selftest

    directory, descriptor, lifeline = RunDirectory(Path(arguments[0])), int(arguments[1]), int(arguments[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s settler: %(message)s")
    exit_with_parent(lifeline)
    os.nice(5)  # receipts and leases come before merges
    selftest()
    Settler(directory.config(), socket.socket(fileno=descriptor)).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
