"""Workers and auditors leave out what was taken down, by the list that the base's manifest names, and say so."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.documents import Lease, Takedowns, UnitId, digest_of, sign
from protocol.errors import AnswerInvalid
from protocol.keys import PrivateKey
from protocol.layout import WEIGHTS, checkpoint_directory, shard_path, takedowns_path
from tests.worker.recording import QUICK, Recorder, work
from tests.worker.small_config import publish_checkpoint, publish_takedowns
from tests.worker.small_run import SmallRun
from worker.audit_home import DELEGATION, KEY, make_key
from worker.auditor import AuditorSettings, run_auditor
from worker.library import Needs
from worker.materials import Materials
from worker.progress import TakenDown
from worker.public_files import DirectoryFiles, fetch_materials
from worker.referee import replay
from worker.stop import Stop
from worker.taken_down import TakedownLists

LEFT_OUT = (0, 1, 2, 4)
"""Of six samples in every shard; so the two that are left are drawn again and again."""


def content_of(run: SmallRun, lease: Lease, *without: int) -> str:
    """Return the digest of the delta that a unit has without these samples of its shards."""
    materials = Materials(
        base=run.public / checkpoint_directory(0) / WEIGHTS,
        shards=tuple(run.public / shard_path(sha256) for sha256 in lease.shards),
        without=(without,) * len(lease.shards),
    )
    own = replay(run.config, 1, UnitId(lease.unit), materials, device="cpu", on_step=lambda *_: None)
    return own.encoded.content_digest().hex()


def test_a_worker_trains_without_what_was_taken_down_and_an_auditor_confirms_it(tmp_path: Path) -> None:
    recorder, judged = Recorder(), Recorder()
    home = tmp_path / "auditor"

    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run", units=1) as run, asyncio.timeout(60):
            run.take_down(*LEFT_OUT)
            await work(run, tmp_path / "home", recorder)
            make_key(home)
            run.auditor_key = PrivateKey.load(home / KEY)
            (home / DELEGATION).write_bytes(run.auditor_delegation())
            run.to_audit = [run.received()]
            settings = AuditorSettings(
                join=run.join,
                home=home,
                key=home / KEY,
                delegation=home / DELEGATION,
                device="cpu",
                threads=1,
                audits=1,
                cache_bytes=1 << 30,
                backoff=QUICK,
            )
            await run_auditor(settings, judged, stop=Stop())
            return run

    run = asyncio.run(scenario())

    (attempt,) = run.received()
    assert attempt.claim is not None
    claimed = attempt.claim.artifacts[0].content_sha256
    assert claimed == content_of(run, attempt.lease, *LEFT_OUT)
    assert claimed != content_of(run, attempt.lease)
    assert [opinion.finding for opinion in run.opinions] == ["confirmed"]
    assert run.opinions[0].content_sha256 == claimed
    for heard in (recorder, judged):
        assert heard.named("takedowns") == [{"event": "takedowns", "round": 1, "pictures": 8, "new": 8}]

    # Whoever has the run's public files and no lease comes to the same.
    needs = Needs.of_unit(run.config, 1, attempt.lease.index)
    assert fetch_materials(DirectoryFiles(run.public), run.trust(), needs).without == (LEFT_OUT,)


@pytest.mark.parametrize("spoilt", ["another key", "another list", "gone", "another lease"])
def test_a_unit_whose_list_does_not_hold_is_handed_back_untrained(tmp_path: Path, spoilt: str) -> None:
    recorder = Recorder()

    async def scenario() -> SmallRun:
        run = SmallRun(tmp_path / "run", units=1)
        takedowns = run.take_down(*LEFT_OUT)
        path = run.public / takedowns_path(digest_of(takedowns))
        if spoilt == "another key":
            path.write_bytes(sign(takedowns, PrivateKey.generate()))
        elif spoilt == "another list":
            path.write_bytes(sign(replace(takedowns, entries=takedowns.entries[1:]), run.key))
        elif spoilt == "gone":
            path.unlink()
        else:
            run.manifest = replace(run.manifest, takedowns_sha256=None)  # what its leases name
        stop = Stop()
        async with run:
            working = asyncio.create_task(work(run, tmp_path / "home", recorder, stop=stop, files_seconds=0.1))
            await run.until(lambda: bool(recorder.named("handed_back")))
            stop.ask()
            await working
        return run

    run = asyncio.run(scenario())
    assert not run.received()
    assert not recorder.named("step")
    assert recorder.waits() & {"ANSWER_INVALID", "UNREACHABLE", "NOT_SERVED"}


def test_a_list_that_rewrites_an_older_one_is_not_believed(tmp_path: Path) -> None:
    run = SmallRun(tmp_path / "run")
    told: list[TakenDown] = []
    lists = TakedownLists(told.append)
    trust = run.trust()

    def named(checkpoint: int, change: Callable[[Takedowns], Takedowns] = lambda it: it) -> Takedowns | None:
        takedowns = change(old)
        digest = publish_takedowns(run.public, takedowns, run.key)
        manifest = publish_checkpoint(run.public, run.run, run.config, run.key, checkpoint, digest)
        return lists.named_by(manifest, trust, lambda path, _: (run.public / path).read_bytes())

    old = run.take_down(0, 1)
    more = replace(old.entries[0], sample=5, from_round=4)
    newer = replace(old, entries=(*old.entries, more))
    assert named(0) == old
    assert named(3, lambda _: newer) == newer
    assert named(1) == old, "a late unit's round goes by its own list"
    assert told == [TakenDown(round=1, pictures=4, new=4), TakenDown(round=4, pictures=5, new=1)]
    with pytest.raises(AnswerInvalid, match="was rewritten since"):
        named(4, lambda _: replace(old, entries=old.entries[1:]))
    with pytest.raises(AnswerInvalid, match="leased before that"):
        named(4, lambda _: replace(newer, entries=(*newer.entries, replace(more, sample=4))))
    manifest = publish_checkpoint(run.public, run.run, run.config, run.key, 5)
    with pytest.raises(AnswerInvalid, match="was rewritten since"):
        lists.named_by(manifest, trust, lambda path, _: (run.public / path).read_bytes())
