"""What `commonweight data` says of a data set: its pictures, what a volunteer would fetch, what looks suspicious."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from protocol.errors import DatasetInvalid, ShardCorrupt
from protocol.printing import counted

if TYPE_CHECKING:  # torch takes seconds to load; --help needs none of it
    from commonweight.data.dataset import Dataset
    from protocol.documents import DatasetManifest

_MOST_REPORT_BYTES: Final = 16 << 20
_CHARACTERS: Final = ("least", "tenth", "median", "nine_tenths", "most")


def summary(directory: Path, manifest: "DatasetManifest", seconds: float | None) -> Iterator[str]:
    """Yield what is in a data set, a line for each thing.

    Args:
        directory: where it is.
        manifest: of it.
        seconds: that its preparation took, if it was just prepared.
    """
    from commonweight.data.dataset import licences, sizes

    samples = sum(shard.samples for shard in manifest.shards)
    pictures, said = _pictures(samples, _report(directory))
    total = sum(shard.size for shard in manifest.shards)
    named = "" if manifest.name == directory.resolve().name else f"{manifest.name}, "
    skipped = ", ".join(f"{reason.name} {reason.pictures}" for reason in manifest.skipped) or "none"
    looked_at = pictures + manifest.heldout.samples + sum(reason.pictures for reason in manifest.skipped)
    shards = f"{counted(len(manifest.shards), 'shard')} ({_size(total)})"
    yield f"{directory}: {named}{said} in {shards}, {manifest.heldout.samples:,} held out"
    yield f"sizes: {_listed(sizes(manifest).most_common())}"
    yield f"licences: {_listed(licences(manifest).most_common())}"
    yield f"skipped: {skipped}"
    yield (
        f"a unit that draws from k shards fetches about k x {_size(total / len(manifest.shards))}, "
        f"{_size(total / samples)} a {'picture' if pictures == samples else 'sample'}"
    )
    if seconds is not None:
        yield f"in {seconds:.1f} s, {looked_at / max(seconds, 1e-9):.0f} pictures a second"


def _report(directory: Path) -> dict[str, object]:
    """Return the report; empty if there is none that can be read: nobody has signed for it."""
    from commonweight.data.layout import REPORT
    from verify.plain_files import read_plain

    try:
        found = json.loads(read_plain(directory / REPORT, _MOST_REPORT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _pictures(samples: int, report: dict[str, object]) -> tuple[int, str]:
    """Return how many pictures there are, and words for it: one that is there in several sizes is several samples."""
    pictures, sizes = report.get("pictures"), report.get("sizes_of_a_picture")
    if isinstance(pictures, int) and isinstance(sizes, int) and sizes > 1 and 0 < pictures < samples:
        up_to = "" if pictures * sizes == samples else "up to "
        return pictures, f"{counted(pictures, 'picture')}, in {up_to}{sizes} sizes ({samples:,} samples),"
    return samples, counted(samples, "picture")


def _listed(counts: Sequence[tuple[str, int]]) -> str:
    shown = ", ".join(f"{name} {count:,}" for name, count in counts[:8])
    return shown + (f" and {len(counts) - 8} more" if len(counts) > 8 else "")


def fetched(dataset: "Dataset") -> Iterator[str]:
    """Yield what a unit fetches with a data set, and with other choices; of encoders, or of latents that may want some.

    Raises:
        DatasetInvalid: the manifest describes no encoder, or its first shard does not hold.
    """
    from commonweight.data.dataset import check_shard
    from commonweight.data.fetched import choices
    from diloco.shards import Shard
    from mmdit.encoders import EncodersConfig, conditioning_from_json
    from mmdit.space import PixelSpace, space_from_json

    first = dataset.manifest.shards[0]
    check_shard(dataset, first)
    opened, encoder = Shard.open(dataset.path(first)), dataset.manifest.encoder
    try:
        conditioning, space = conditioning_from_json(encoder["conditioning"]), space_from_json(encoder["space"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DatasetInvalid(f"The manifest describes no encoder: {error}.") from None
    own = conditioning if isinstance(conditioning, EncodersConfig) else None
    if own is None and isinstance(space, PixelSpace):
        return
    captions = [len(opened.caption(i) or "") for i in range(opened.n)]
    yield f"fetched for a shard of {opened.n:,} pictures: {_size(first.size)}; with other choices of text:"
    for choice in choices(space, own, sum(captions) / opened.n):
        total = choice.picture_bytes * opened.n
        mark = " (this set)" if choice.own else ""
        size = f"{_size(total):>9}, {_size(choice.picture_bytes):>9} a picture"
        yield f"  {choice.name:<45} {size}  {choice.options}{mark}"


def suspicions(directory: Path) -> Sequence[str]:
    """Return what a curator should look at, as the report has it, which nobody has signed for; nothing without one."""
    from commonweight.data.layout import REPORT

    if not (directory / REPORT).is_file():
        return ()
    try:
        return list(_suspicions(_report(directory)))
    except (TypeError, KeyError, IndexError, AssertionError, AttributeError, ValueError):
        return [f"{REPORT} can't be read"]


def _suspicions(report: dict[str, object]) -> Iterator[str]:
    characters = report["caption_characters"]
    assert isinstance(characters, dict)
    yield "caption characters: " + ", ".join(f"{name.replace('_', ' ')} {characters[name]}" for name in _CHARACTERS)
    for name, words in (
        ("repeated_captions", "repeated caption: {caption!r}, {pictures}"),
        ("near_duplicates", "look alike: {pictures} under {captions}, such as {keys[0]}"),
        ("words_of_look_alikes", "only with pictures that look alike: the word {word!r}, {pictures}"),
    ):
        found = report[name]
        assert isinstance(found, list)
        for entry in found[:3]:
            counts = {name: counted(entry[name], name[:-1]) for name in ("pictures", "captions") if name in entry}
            yield words.format(**{**entry, **counts})


def _size(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def caption_of(dataset: "Dataset", sha256: str, sample: int) -> str:
    """Return a sample's caption in quotes, or why there is none."""
    from diloco.shards import Shard

    shards = (*dataset.manifest.shards, dataset.manifest.heldout)
    path = next((dataset.path(shard) for shard in shards if shard.sha256 == sha256), None)
    if path is None:
        return "not a shard of the signed manifest"
    try:
        opened = Shard.open(path)
        caption = opened.caption(sample) if 0 <= sample < opened.n else None
    except (OSError, ShardCorrupt):
        return "its shard can't be read"
    return "no caption in the shard" if caption is None else repr(caption)
