"""Taking pictures down: what the operator asks for, and the signed list that comes of it with the next checkpoint.

The operator's command leaves its requests in DIR/takedowns, a file for each call, whether the run is served or not. The
control process, which alone signs, takes the requests into the list that the next checkpoint's manifest names: units of
the round after that are not leased yet, so no unit that is at work changes its meaning.
"""

import fcntl
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from coordinator.directory import RunDirectory, disk_trouble_explained, write_file
from coordinator.publisher import Publisher
from coordinator.rounds import RoundState
from coordinator.sqlite_store import SqliteStore
from protocol import layout
from protocol.canonical import canonical_json, parse_json, sha256_hex
from protocol.documents import Digest, Manifest, RunConfig, RunId, Takedown, Takedowns
from protocol.errors import PayloadInvalid, TakedownRefused
from protocol.limits import MAX_TAKEDOWNS, MAX_TAKEDOWNS_BYTES, MAX_TEXT_CHARACTERS
from protocol.takedowns import samples_of, samples_taken_down
from protocol.trust import RunTrust
from verify.checkpoint import read_limited
from verify.plain_files import read_plain

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A picture that the operator wants taken down: shard, number of the sample in it, and a reason for the public."""

    shard: str
    sample: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """From which round on a request counts, at the latest and at the earliest.

    They differ if it came while a checkpoint was being made, which may have been too far already.
    """

    latest: int
    earliest: int


class Book:
    """Which pictures of a run are taken down, and which more may be."""

    def __init__(self, config: RunConfig, taken: Iterable[tuple[str, int]]) -> None:
        self._samples = samples_of(config)
        self._taken = set(taken)
        self._by_shard = Counter(shard for shard, _ in self._taken)

    def has(self, shard: str, sample: int) -> bool:
        """Whether a picture is taken down, or asked to be."""
        return (shard, sample) in self._taken

    def add(self, asked: Asked) -> None:
        """Take a picture down; raise `TakedownRefused` if `check` does, or for its reason."""
        self.check(asked.shard, asked.sample)
        if len(asked.reason) > MAX_TEXT_CHARACTERS:
            raise TakedownRefused(
                f"The reason has {len(asked.reason)} characters; it may have {MAX_TEXT_CHARACTERS}. Shorten it."
            )
        if not asked.reason.isprintable():
            raise TakedownRefused(
                "The reason holds a line break or another character that can't be shown; leave it out."
            )
        self._taken.add((asked.shard, asked.sample))
        self._by_shard[asked.shard] += 1

    def check(self, shard: str, sample: int) -> None:
        """Say whether a picture can be taken down.

        Raises:
            TakedownRefused: it is none of the run's, taken down already, or the last one of its shard; or the list is
                full.
        """
        samples, name = self._samples.get(shard), f"sample {sample} of shard {shard[:12]}"
        if samples is None:
            raise TakedownRefused(f"The run has no shard {shard[:64]}; run.json lists those that it has.")
        if not 0 <= sample < samples:
            raise TakedownRefused(f"There is no {name}: it holds {samples:,}, numbered from 0 to {samples - 1}.")
        if self.has(shard, sample):
            raise TakedownRefused(f"The picture, {name}, is taken down already.")
        if self._by_shard[shard] + 1 >= samples:
            # A unit must have something to draw, and its shards follow from a rule that nobody bends.
            raise TakedownRefused(
                f"The picture, {name}, is the last one that is left in it, and a unit must have something to draw: "
                "make a new run without that shard."
            )
        if len(self._taken) >= MAX_TAKEDOWNS:
            raise TakedownRefused(
                f"The run has taken down {MAX_TAKEDOWNS:,} pictures, as many as its list may hold: make a new run "
                "without them."
            )


def grown(
    before: Takedowns | None, asked: Sequence[Asked], *, run: RunId, config: RunConfig, first_round: int
) -> Takedowns | None:
    """Return a list with what was asked for beside what it has; what can't be taken down is passed over and told.

    Args:
        before: the list so far, all of which stays as it is.
        first_round: the round from which the new entries count.
    """
    entries = list(() if before is None else before.entries)
    book = Book(config, [(entry.shard, entry.sample) for entry in entries])
    for one in asked:
        if book.has(one.shard, one.sample):
            continue
        try:
            book.add(one)
        except TakedownRefused as refused:
            logger.error("a picture was not taken down: %s", refused, extra={"action": "takedown_refused"})
            continue
        entries.append(Takedown(shard=one.shard, sample=one.sample, from_round=first_round, reason=one.reason))
    return Takedowns(run=run, entries=tuple(entries)) if entries else None


class TakedownDesk:
    """What the control process does with requests.

    Args:
        folder: where the operator's command leaves them.
    """

    def __init__(self, folder: Path, publisher: Publisher, *, run: RunId, config: RunConfig) -> None:
        self._folder = folder
        self._publisher = publisher
        self._run = run
        self._config = config

    def list_for(self, checkpoint: int, previous: Manifest) -> Digest | None:
        """Return the digest of the list that a new checkpoint's manifest names, published; None while there is none.

        Args:
            previous: the manifest of the checkpoint before it.
        """
        before = self._publisher.takedowns(previous.takedowns_sha256)
        after = grown(before, read_asked(self._folder), run=self._run, config=self._config, first_round=checkpoint + 1)
        if after is None:
            return None
        if before is not None and len(after.entries) == len(before.entries):
            return Digest(str(previous.takedowns_sha256))
        new = len(after.entries) - (0 if before is None else len(before.entries))
        logger.info("%d pictures are taken down from round %d on", new, checkpoint + 1, extra={"action": "taken_down"})
        return self._publisher.add_takedowns(after)

    def heldout_left_out(self, checkpoint: int) -> tuple[int, ...]:
        """Return the held-out samples that nothing is measured on any more, from a checkpoint on."""
        listed = self._publisher.published(checkpoint)
        takedowns = None if listed is None else self._publisher.takedowns(listed.manifest.takedowns_sha256)
        return samples_taken_down(takedowns, checkpoint + 1, self._config.data.heldout.sha256)


# --- the operator's side -------------------------------------------------------------------------------------


def published_takedowns(directory: RunDirectory, trust: RunTrust) -> Takedowns | None:
    """Return the newest list that the run has published; None if there is none."""
    path = directory.public / layout.TAKEDOWNS
    return trust.takedowns(read_limited(path, MAX_TAKEDOWNS_BYTES)) if path.exists() else None


def book_of(directory: RunDirectory, trust: RunTrust) -> Book:
    """Return what is taken down or asked to be."""
    published = published_takedowns(directory, trust)
    entries = () if published is None else published.entries
    taken = [(entry.shard, entry.sample) for entry in entries]
    return Book(trust.config, taken + [(asked.shard, asked.sample) for asked in read_asked(directory.takedowns)])


def ask(directory: RunDirectory, wanted: Sequence[Asked]) -> Start:
    """Leave requests for the control process, now or when it is started; return from which round on they count.

    Raises:
        TakedownRefused: no later unit could leave the pictures out, since the run's last round is being trained or is
            over; or one of them can't be taken down any more.
        DiskFull, LocalProblem: a request could not be written.
    """
    with _one_at_a_time(directory.takedowns):
        # Others may have asked since the caller looked: what is promised here must not be passed over later.
        book = book_of(directory, directory.trust())
        for asked in wanted:
            book.add(asked)
        return _leave(directory, wanted)


def _leave(directory: RunDirectory, wanted: Sequence[Asked]) -> Start:
    planned = directory.config().rounds.planned
    before = start_of(directory)
    if before.earliest > planned:
        raise TakedownRefused(
            f"The units of the run's last round, {planned}, are being given out: none is left that could leave the "
            "picture out. Make the next run without it."
        )
    content = canonical_json([asdict(asked) for asked in wanted])
    with disk_trouble_explained("Nothing was taken down"):
        # One file, so that no checkpoint takes a part of what belongs together.
        write_file(directory.takedowns / f"{sha256_hex(content)}.json", content)
    # Rounds may have gone on meanwhile: what is still collecting now reads the requests when it is merged.
    return Start(earliest=before.earliest, latest=start_of(directory).latest)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with disk_trouble_explained("Nothing was taken down"):
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def start_of(directory: RunDirectory) -> Start:
    """Return from which round on a request that is made now counts."""
    current = None
    if directory.database.exists():
        store = SqliteStore.open(directory.database)
        try:
            current = store.latest_round()
        finally:
            store.close()
    if current is None:
        # The manifest of checkpoint 0 is signed with the run and names no list.
        return Start(earliest=2, latest=2)
    following = current.round + 1
    return Start(earliest=following, latest=following + (current.state is not RoundState.COLLECTING))


def read_asked(folder: Path) -> tuple[Asked, ...]:
    """Return all requests, in the order of shards and samples; a file that is none is passed over and told."""
    found: list[Asked] = []
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith("."):
            continue
        try:
            found.extend(_parsed(read_plain(path, MAX_TAKEDOWNS_BYTES)))
        except (OSError, PayloadInvalid) as error:
            logger.error("%s asks for no picture to be taken down: %s", path, error, extra={"action": "not_taken_down"})
    return tuple(sorted(found, key=lambda asked: (asked.shard, asked.sample)))


def _parsed(raw: bytes) -> list[Asked]:
    listed = parse_json(raw)
    if not isinstance(listed, list):
        raise PayloadInvalid("It is no list.")
    return [_asked(entry) for entry in listed]


def _is_number(sample: int) -> bool:
    """Whether it can be a sample's: Python takes true for a whole number."""
    return not isinstance(sample, bool) and abs(sample) < 1 << 32


def _asked(entry: object) -> Asked:
    match entry:
        case {"shard": str(shard), "sample": int(sample), "reason": str(reason)} if _is_number(sample):
            return Asked(shard=shard, sample=sample, reason=reason)
        case _:
            raise PayloadInvalid("An entry names no shard, sample and reason.")
