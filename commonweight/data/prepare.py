"""Preparing a data set: index, plan, shards, and the curator's signed manifest. Every step goes on where it stopped."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np

from commonweight.data.encoders import Encoder
from commonweight.data.index import Row, Rules, read_index, write_index
from commonweight.data.layout import CURATOR, HELDOUT, MANIFEST, REPORT, SKIPPED, WHEREABOUTS, WORK
from commonweight.data.pictures import Bucket, PictureSkipped, decode
from commonweight.data.plan import Plan, Planned, plan, skipped_by_reason
from commonweight.data.report import report_of
from commonweight.data.sources import Item, count_items, items_of, list_sources, read_place
from commonweight.data.whereabouts import list_of
from coordinator.directory import write_file
from coordinator.prepared_data import PRESET
from diloco.shards import Halves, ShardInfo, pack_shard
from diloco.trail import merkle_root
from protocol.canonical import canonical_json, sha256_hex
from protocol.documents import Counted, DatasetManifest, PreparedShard, sign
from protocol.errors import DirectoryInUse, DirectoryNotEmpty, PackageMissing, UsageError
from protocol.keys import PrivateKey
from protocol.limits import MAX_PUBLIC_DOCUMENT_BYTES, MAX_SHARD_BYTES
from verify.plain_files import file_sha256

_SHARD_NAME: Final = re.compile(r"[0-9a-f]{64}\.safetensors")
_INDEX: Final = "index.jsonl"
_AT_ONCE: Final = 64
"""Pictures that are encoded together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is to be made of a source.

    Args:
        name: of the data set.
        preset: name of the model that it is for.
        rules: which pictures are taken, and how they are cut.
        encoder: makes numbers of them; goes to the processes by pickle, between processes of our own.
        seed: 32 bytes; of the shuffling.
        shard_bytes: about how large a shard is to be.
        heldout: pictures kept for validation; None is what `plan` makes of that.
        least_in_bucket: buckets with fewer pictures are given up.
        pictures: for tables of links: the folder with the files.
        families: the buckets of each size, for data sets of several sizes; see `plan`.
    """

    name: str
    preset: str
    rules: Rules
    encoder: Encoder
    seed: bytes
    shard_bytes: int
    heldout: int | None
    least_in_bucket: int
    pictures: Path | None = None
    families: tuple[tuple[Bucket, ...], ...] = ()

    def asked(self, files: Sequence[Path]) -> dict[str, Any]:
        """Return what identifies a preparation: these words over these files."""
        return {
            "rules": {**asdict(self.rules), "licences": self.rules.licences and list(self.rules.licences)},
            "encoder": self.encoder.described(),
            "files": [[str(path.resolve()), path.stat().st_size if path.is_file() else 0] for path in files],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a preparation is: pictures looked at of how many, or shards made of how many."""

    pictures: int = 0
    of_pictures: int = 0
    shards: int = 0
    of_shards: int = 0


def prepare(
    source: Path,
    out: Path,
    recipe: Recipe,
    curator: Callable[[], PrivateKey],
    *,
    processes: int,
    on_progress: Callable[[Progress], None],
) -> DatasetManifest:
    """Make a data set; the same source and recipe give the same bytes, whatever the processes and the interruptions.

    Args:
        source: a folder, a tar or a table.
        out: where the data set goes; missing or empty, or with an unfinished preparation in it.
        recipe: what is to be made.
        curator: gives the key that signs, once there is something to sign.
        processes: how many encode at once.
        on_progress: told how far it is.

    Raises:
        UsageError: there is nothing to read, too few pictures are left, or another preparation lies in `out`.
        DirectoryNotEmpty: `out` holds a finished data set, or something else.
        DirectoryInUse: another process prepares it.
        PackageMissing: Pillow or pyarrow is needed.
    """
    if (out / MANIFEST).exists():
        raise DirectoryNotEmpty(
            f"{out} holds a finished data set; nothing was changed. Remove it, or choose another --out; --restart is "
            "for interrupted ones."
        )
    if out.is_dir() and not (out / WORK).is_dir() and any(out.iterdir()):
        raise DirectoryNotEmpty(f"{out} holds something else; nothing was changed. Choose another directory.")
    files = list_sources(source)
    (out / WORK).mkdir(parents=True, exist_ok=True)
    with _alone(out / WORK):
        with _worthless_gone(out):
            planned, made = _work(files, out, recipe, processes, on_progress)
        manifest, key = _manifest(planned, made, recipe), curator()
        envelope = sign(manifest, key)
        if len(envelope) > MAX_PUBLIC_DOCUMENT_BYTES:
            raise UsageError(
                f"The manifest would have {len(envelope):,} bytes; make larger shards, with fewer licences."
            )
        _finish(out, planned, made, envelope, key)
    shutil.rmtree(out / WORK)
    return manifest


def begin_again(out: Path) -> None:
    """Throw away what an unfinished preparation has left; a finished data set is not touched.

    Raises:
        DirectoryInUse: another process is at it.
    """
    if (out / MANIFEST).exists() or not (out / WORK).is_dir():
        return
    with _alone(out / WORK):
        shards = (path for path in out.iterdir() if _SHARD_NAME.fullmatch(path.name))
        for path in (*shards, *(out / name for name in (HELDOUT, CURATOR, REPORT, SKIPPED, WHEREABOUTS))):
            path.unlink(missing_ok=True)
    shutil.rmtree(out / WORK)


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Hold the directory for this process; raise `DirectoryInUse` if another one has it."""
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUse(f"Another process prepares {work.parent} now; wait for it.") from None
        yield


@contextmanager
def _worthless_gone(out: Path) -> Iterator[None]:
    """Clear up after a refusal if no picture was taken yet: the next try will ask otherwise, and begin anew anyway."""
    try:
        yield
    except (UsageError, PackageMissing):
        work = out / WORK
        index = work / _INDEX
        begun = {path.name for path in work.iterdir()} - {"lock", _INDEX}
        if not begun and not (index.exists() and any(not row.skipped for row in read_index(index))):
            shutil.rmtree(work)
            with suppress(OSError):  # something else has come into it
                out.rmdir()
        raise


def _work(
    files: Sequence[Path], out: Path, recipe: Recipe, processes: int, on_progress: Callable[[Progress], None]
) -> tuple[Plan, list[PreparedShard]]:
    """Index, plan and make every shard, under the working folder."""
    index = out / WORK / _INDEX
    of_pictures = sum(count_items(path) for path in files)
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
    ) as pool:
        write_index(
            index,
            _items(files, recipe.pictures),
            recipe.rules,
            recipe.asked(files),
            pool,
            processes=processes,
            on_rows=lambda count: on_progress(Progress(pictures=count, of_pictures=of_pictures)),
        )
        planned = plan(
            read_index(index),
            seed=recipe.seed,
            sample_bytes=recipe.encoder.sample_bytes,
            shard_bytes=recipe.shard_bytes,
            heldout=recipe.heldout,
            least_in_bucket=recipe.least_in_bucket,
            families=recipe.families,
        )
        return planned, _make_shards(planned, out, recipe, pool, on_progress)


def _finish(out: Path, planned: Plan, made: Sequence[PreparedShard], envelope: bytes, curator: PrivateKey) -> None:
    """Move the shards to their places, and the manifest last; can be repeated."""
    for number, shard in enumerate(made):
        target = out / (HELDOUT if number == len(planned.shards) else f"{shard.sha256}.safetensors")
        found = _shard_path(out, shard.sha256)
        if found.exists():
            found.rename(target)
    skipped = b"".join(
        canonical_json({"key": row.key, "reason": row.skipped, "detail": row.detail}) + b"\n" for row in planned.skipped
    )
    write_file(out / SKIPPED, skipped)
    write_file(out / WHEREABOUTS, list_of([*planned.shards, planned.heldout], made), mode=0o600)
    report = report_of([row for shard in planned.shards for row in shard.rows], planned.skipped)
    write_file(out / REPORT, (json.dumps(report, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())
    write_file(out / CURATOR, curator.public.hex.encode("ascii") + b"\n")
    write_file(out / MANIFEST, envelope)


def _shard_path(out: Path, sha256: str) -> Path:
    """Return where a shard lies until all are there."""
    return out / WORK / f"{sha256}.safetensors"


def _begin(parent: int) -> None:
    """What each process does first: use one thread, and end when the one that started it is gone."""
    import torch

    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(3)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _items(files: Sequence[Path], pictures: Path | None) -> Iterator[Item]:
    for path in files:
        yield from items_of(path, pictures)


def _make_shards(
    planned: Plan,
    out: Path,
    recipe: Recipe,
    pool: ProcessPoolExecutor,
    on_progress: Callable[[Progress], None],
) -> list[PreparedShard]:
    """Make every shard that is not there yet; return all, the held-out one last."""
    wanted = [*planned.shards, planned.heldout]
    found: dict[int, PreparedShard] = {}
    waiting = {}
    for number, shard in enumerate(wanted):
        note = out / WORK / f"{number:06d}-{_plan_digest(shard, recipe)}.json"
        before = _prepared_before(note, out)
        if before is not None:
            found[number] = before
        else:
            waiting[pool.submit(_make_shard, shard, recipe, out, note)] = number
    on_progress(Progress(shards=len(found), of_shards=len(wanted)))
    for future in as_completed(waiting):
        found[waiting[future]] = future.result()
        on_progress(Progress(shards=len(found), of_shards=len(wanted)))
    return [found[number] for number in range(len(wanted))]


def _prepared_before(note: Path, out: Path) -> PreparedShard | None:
    """Return what a note says, if the shard that it speaks of is there, whole."""
    try:
        values = json.loads(note.read_bytes())
        licences = tuple(Counted(**licence) for licence in values.pop("licences"))
        shard = PreparedShard(**values, licences=licences)
        places = (_shard_path(out, shard.sha256), out / f"{shard.sha256}.safetensors", out / HELDOUT)
        found = next((place for place in places if place.is_file() and file_sha256(place) == shard.sha256), None)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return None if found is None else shard


def _plan_digest(shard: Planned, recipe: Recipe) -> str:
    rows = b"".join(row.to_json() for row in shard.rows)
    return hashlib.sha256(rows + canonical_json(recipe.encoder.described()) + str(shard.bucket).encode()).hexdigest()[
        :16
    ]


def _make_shard(shard: Planned, recipe: Recipe, out: Path, note: Path) -> PreparedShard:
    """Decode, encode and write one shard; then the note that says that it is there."""
    latents: list[Halves] = []
    for start in range(0, len(shard.rows), _AT_ONCE):
        rows = shard.rows[start : start + _AT_ONCE]
        latents.append(recipe.encoder.latents(np.stack([_pixels(row, shard, recipe) for row in rows])))
    licences = Counter(row.licence for row in shard.rows)
    captions = [row.caption for row in shard.rows]
    info = ShardInfo(licence=", ".join(sorted(licences))[:200], source=recipe.rules.source)
    parts = {} if recipe.encoder.captions_only and not shard.heldout else recipe.encoder.texts(captions)
    content = pack_shard(np.concatenate(latents), info, captions=captions, parts=parts)
    if len(content) > MAX_SHARD_BYTES:
        raise UsageError(f"A shard would have {len(content):,} bytes, more than workers fetch; ask for smaller shards.")
    sha256 = sha256_hex(content)
    write_file(_shard_path(out, sha256), content)
    prepared = PreparedShard(
        sha256=sha256,
        size=len(content),
        samples=len(shard.rows),
        height=shard.bucket.height,
        width=shard.bucket.width,
        licences=tuple(Counted(name=name, pictures=count) for name, count in sorted(licences.items())),
    )
    write_file(note, canonical_json(asdict(prepared)))
    return prepared


def _pixels(row: Row, shard: Planned, recipe: Recipe) -> Any:
    rules = recipe.rules
    try:
        content = read_place(row.place)
        if hashlib.sha256(content).hexdigest() != row.sha256:
            raise ValueError("it is not the file that was looked at")
        return decode(content, (shard.bucket,), channels=rules.channels, least_side=rules.least_side).pixels
    except (OSError, ValueError, PictureSkipped) as error:
        raise UsageError(
            f"{row.key} has changed since it was looked at ({error}); begin again with --restart."
        ) from None


def _manifest(planned: Plan, made: Sequence[PreparedShard], recipe: Recipe) -> DatasetManifest:
    *shards, heldout = made
    licences = sorted({licence.name for shard in made for licence in shard.licences})
    return DatasetManifest(
        name=recipe.name,
        source=recipe.rules.source,
        licence=", ".join(licences)[:200],
        encoder={PRESET: recipe.preset, **recipe.encoder.described()},
        root=merkle_root([bytes.fromhex(shard.sha256) for shard in shards]).hex(),
        shards=tuple(shards),
        heldout=heldout,
        skipped=tuple(Counted(name=name, pictures=count) for name, count in skipped_by_reason(planned.skipped).items()),
    )
