"""The hostile volunteer is a real worker whose results are forged, and a referee tells them from honest ones."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from commonweight.hostile import Forged, HostileTrainer
from protocol import layout
from protocol.documents import UnitId
from tests.worker.recording import Recorder, work
from tests.worker.small_audits import Attempt
from tests.worker.small_run import SmallRun
from worker.materials import Materials
from worker.referee import Found, Replay, judge_file, replay

ROOT = Path(__file__).parents[2]


def judged(run: SmallRun, attempt: Attempt, folder: Path) -> Found:
    """What a referee finds of an uploaded delta."""
    lease = attempt.lease
    base = run.public / layout.checkpoint_directory(0) / layout.WEIGHTS
    shards = tuple(run.public / layout.shard_path(sha256) for sha256 in lease.shards)
    materials = Materials(base=base, shards=shards, without=((),) * len(shards))
    own: Replay = replay(run.config, lease.round, UnitId(lease.unit), materials, device="cpu", on_step=lambda *_: None)
    path = folder / lease.unit
    path.write_bytes(attempt.stored)
    assert attempt.claim is not None
    return judge_file(run.config, UnitId(lease.unit), attempt.claim.artifacts[0], path, own)


@pytest.mark.parametrize("attack", ["sign-flip", "skip-half"])
def test_it_works_honestly_at_first_and_is_refuted_from_its_first_forgery_on(tmp_path: Path, attack: str) -> None:
    forged: list[Forged] = []
    recorder = Recorder()

    async def scenario() -> SmallRun:
        async with SmallRun(tmp_path / "run", units=2, steps=4) as run:
            trainer = HostileTrainer(attack, honest_units=1, tell=forged.append)
            await work(run, tmp_path / "home", recorder, train=trainer)
            return run

    run = asyncio.run(scenario())
    honest, cheat = run.received()

    assert [event.unit for event in forged] == [cheat.lease.unit]
    assert judged(run, honest, tmp_path).finding == "confirmed"
    assert judged(run, cheat, tmp_path).finding == "refuted"
    # A volunteer that is too fast is audited for that alone, so this one is not.
    first, second = (event["seconds"] for event in recorder.named("trained"))
    assert second > 0.9 * first


def test_the_worker_itself_knows_no_attacks() -> None:
    for path in (ROOT / "worker").glob("*.py"):
        assert "attacks" not in path.read_text(), path


def test_an_unknown_attack_is_a_wrong_use(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "commonweight.hostile", "--attack", "kindness", "--join", "x", "--home", tmp_path],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip

    assert done.returncode == 2
    assert "kindness" in done.stderr
