"""Taking pictures down: what may be, what becomes of a request, and from which round on it counts."""

from dataclasses import replace
from pathlib import Path

import pytest

from commonweight.digits import write_digits
from coordinator.directory import RunDirectory
from coordinator.founding import found
from coordinator.publisher import Publisher
from coordinator.rounds import Round, RoundState
from coordinator.settings import Settings
from coordinator.sqlite_store import SqliteStore
from coordinator.takedowns import Asked, Book, Start, TakedownDesk, ask, book_of, grown, read_asked, start_of
from protocol import layout
from protocol.documents import Manifest, Takedown, Takedowns, digest_of
from protocol.errors import TakedownRefused
from protocol.takedowns import check_grown, check_takedowns
from tests.protocol.examples import CONFIG, RUN

FIRST, SECOND = (shard.sha256 for shard in CONFIG.data.shards[:2])
SAMPLES = CONFIG.data.shards[0].samples


def asked(sample: int, shard: str = FIRST) -> Asked:
    return Asked(shard=shard, sample=sample, reason="its maker asked for it")


def test_requests_are_added_to_the_list_and_what_was_there_stays(caplog: pytest.LogCaptureFixture) -> None:
    first = grown(None, [asked(3), asked(1, SECOND)], run=RUN, config=CONFIG, first_round=4)
    assert first is not None
    assert [(it.shard, it.sample, it.from_round) for it in first.entries] == [(FIRST, 3, 4), (SECOND, 1, 4)]
    wrong = [asked(SAMPLES), asked(0, "ee" * 32), replace(asked(2), reason="x" * 257)]
    second = grown(first, [asked(3), *wrong, asked(5)], run=RUN, config=CONFIG, first_round=9)
    assert second is not None
    assert second.entries == (*first.entries, replace(first.entries[0], sample=5, from_round=9))
    check_takedowns(second, CONFIG, 8)
    check_grown(first, second, 7)
    assert len(caplog.records) == len(wrong)
    assert grown(None, wrong, run=RUN, config=CONFIG, first_round=2) is None


def test_what_can_not_be_taken_down_is_refused_with_the_reason() -> None:
    book = Book(CONFIG, [(FIRST, 3)])
    for one, words in (
        (asked(0, "ee" * 32), "no shard eeee"),
        (asked(SAMPLES), f"it holds {SAMPLES:,}, numbered from 0 to {SAMPLES - 1}"),
        (asked(-1), "There is no sample -1"),
        (asked(3), "taken down already"),
        (replace(asked(4), reason="x" * 257), "it may have 256"),
        (replace(asked(4), reason="one\ntwo"), "a line break or another character"),
        (replace(asked(4), reason="\udc80"), "a line break or another character"),
    ):
        with pytest.raises(TakedownRefused, match=words):
            book.add(one)
    for sample in [*range(3), *range(4, SAMPLES - 1)]:
        book.add(asked(sample))
    with pytest.raises(TakedownRefused, match="the last one that is left in it"):
        book.add(asked(SAMPLES - 1))


def founded(folder: Path, *, planned: int) -> RunDirectory:
    """A run that was never served."""
    shards, heldout = write_digits(folder / "data", shards=3)
    run = RunDirectory(folder / "run")
    found(
        run,
        Settings.parse("", [f"rounds.planned={planned}"]),
        shards=shards,
        heldout=heldout,
        root_key_out=folder / "root.pem",
        seed=bytes(32),
        now_ms=1_800_000_000_000,
    )
    return run


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return founded(tmp_path, planned=3)


def test_a_request_becomes_part_of_the_next_checkpoints_list_once_and_is_never_lost(directory: RunDirectory) -> None:
    identity = directory.identity()
    publisher = Publisher(directory.public, identity.coordinator)
    desk = TakedownDesk(directory.takedowns, publisher, run=identity.run, config=identity.config)
    genesis = publisher.published(0)
    assert genesis is not None
    assert desk.list_for(1, genesis.manifest) is None

    shard, heldout = identity.config.data.shards[0].sha256, identity.config.data.heldout.sha256
    wanted = [asked(2, shard), asked(7, heldout)]
    assert ask(directory, wanted) == Start(earliest=2, latest=2)
    assert len(list(directory.takedowns.iterdir())) == 1, "no checkpoint takes a part of what belongs together"
    (directory.takedowns / "nonsense.json").write_text("{}")
    assert set(read_asked(directory.takedowns)) == set(wanted)
    assert book_of(directory, directory.trust()).has(shard, 2)

    digest = desk.list_for(1, genesis.manifest)
    assert digest is not None
    assert desk.list_for(1, genesis.manifest) == digest, "made again after a crash"
    published = publisher.takedowns(digest)
    assert published is not None
    assert {(it.shard, it.sample, it.from_round) for it in published.entries} == {(shard, 2, 2), (heldout, 7, 2)}
    assert digest_of(published) == digest

    later = replace(genesis.manifest, checkpoint=1, takedowns_sha256=digest)
    assert desk.list_for(2, later) == digest, "nothing new was asked for"
    ask(directory, [asked(3, shard)])
    newer = publisher.takedowns(desk.list_for(2, later))
    assert newer is not None
    check_grown(published, newer, 1)
    assert newer.entries[-1].from_round == 3


def test_what_was_promised_to_one_is_not_taken_from_him_by_another_who_asks_at_the_same_time(
    directory: RunDirectory,
) -> None:
    shard = directory.config().data.shards[0]
    for sample in range(shard.samples - 1):
        ask(directory, [asked(sample, shard.sha256)])
    with pytest.raises(TakedownRefused, match="the last one that is left"):
        ask(directory, [asked(shard.samples - 1, shard.sha256)])
    with pytest.raises(TakedownRefused, match="taken down already"):
        ask(directory, [asked(0, shard.sha256)])
    assert len(read_asked(directory.takedowns)) == shard.samples - 1


@pytest.mark.parametrize("sample", ["true", "1" + "0" * 50, '"1"', "1.5"])
def test_a_request_that_names_no_number_is_passed_over(tmp_path: Path, sample: str) -> None:
    (tmp_path / "odd.json").write_text(f'[{{"shard": "{FIRST}", "sample": {sample}, "reason": ""}}]')
    assert read_asked(tmp_path) == ()


def test_nothing_is_measured_on_a_held_out_picture_once_it_is_taken_down(directory: RunDirectory) -> None:
    identity = directory.identity()
    publisher = Publisher(directory.public, identity.coordinator)
    desk = TakedownDesk(directory.takedowns, publisher, run=identity.run, config=identity.config)
    assert desk.heldout_left_out(0) == ()
    entry = Takedown(shard=identity.config.data.heldout.sha256, sample=7, from_round=2, reason="")
    digest = publisher.add_takedowns(Takedowns(run=identity.run, entries=(entry,)))
    _publish(publisher, digest)
    assert desk.heldout_left_out(1) == (7,)
    assert (directory.public / layout.TAKEDOWNS).read_bytes() == (
        directory.public / layout.takedowns_path(digest)
    ).read_bytes()


def _publish(publisher: Publisher, takedowns_sha256: str) -> Manifest:
    genesis = publisher.published(0)
    assert genesis is not None
    place = publisher.workplace(1)
    manifest = replace(
        genesis.manifest,
        checkpoint=1,
        previous_manifest_sha256=genesis.sha256,
        takedowns_sha256=takedowns_sha256,
    )
    return publisher.publish(place, manifest).manifest


def test_from_which_round_on_it_counts_follows_from_what_is_leased(tmp_path: Path) -> None:
    for planned in (1, 2):
        (tmp_path / str(planned)).mkdir()
        run = founded(tmp_path / str(planned), planned=planned)
        assert start_of(run) == Start(earliest=2, latest=2)
        wanted = [asked(2, run.config().data.shards[0].sha256)]
        store = SqliteStore.open(run.database)
        with store.transaction():
            store.add_round(Round(round=1, opened_ms=1))
        if planned == 1:
            with pytest.raises(TakedownRefused, match="last round, 1, are being given out"):
                ask(run, wanted)
            assert read_asked(run.takedowns) == ()
            continue
        assert ask(run, wanted) == Start(earliest=2, latest=2)
        collecting = store.round(1)
        assert collecting is not None
        with store.transaction():
            store.save_round(collecting, replace(collecting, state=RoundState.CLOSED, closed_ms=2))
        store.close()
        assert start_of(run) == Start(earliest=2, latest=3), "checkpoint 1 may be signed by now"
