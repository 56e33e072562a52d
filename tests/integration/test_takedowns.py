"""Pictures are taken down while their run is served and trained: no later unit draws them, and all come to the same."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from commonweight.demo_story import read_entries
from commonweight.digits import caption
from diloco.determinism import set_precision
from diloco.draws import Draws
from diloco.shards import ShardSet
from protocol import layout
from protocol.assignment import unit_id, unit_samples, unit_seed
from protocol.documents import MergeEntry, RunConfig, UnitId
from protocol.trust import RunTrust
from tests.integration.live_run import LiveRun, LiveWorker, command, environment, until
from worker.library import Needs
from worker.public_files import DirectoryFiles, believe, fetch_materials, read_manifest
from worker.referee import artifact_of, judge_file, replay
from worker.taken_down import read_takedowns

SETTINGS = (
    "verification.mode=replay",
    "verification.probation=1",
    "verification.floor=1.0",
    "training.steps=6",
    "rounds.units=2",
    "rounds.min_units=1",
    "rounds.min_window_seconds=0.1",
    "rounds.planned=500",
)


def told(*arguments: object) -> str:
    done = subprocess.run(command(*map(str, arguments)), env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def drawn(config: RunConfig, unit: UnitId, samples: ShardSet) -> set[str]:
    """Return the captions that a unit hears by the public rule."""
    draws, batch = Draws(bytes.fromhex(unit_seed(unit))), config.training.batch
    steps = unit_samples(config, unit) // batch
    indices = {draws.index(step, place, samples.n) for step in range(steps) for place in range(batch)}
    places = [samples.place(index) for index in indices]
    return {str(shard.caption(at)) for shard, at in places}


def index_of(trust: RunTrust, entry: MergeEntry) -> int:
    units = [unit_id(trust.config_sha256, entry.round, index) for index in range(trust.config.rounds.units)]
    return units.index(UnitId(entry.unit))


@pytest.mark.slow
def test_pictures_taken_down_while_the_run_is_served_are_drawn_by_no_later_unit_and_replays_agree(folder: Path) -> None:
    with LiveRun(folder, SETTINGS) as run, LiveWorker(run.start(), "worker") as worker:
        public, unwanted = run.directory.public, caption(3)
        run.await_checkpoint(1)
        shown = told(
            "coordinator", "takedown", run.directory.root, "--caption", unwanted, "--reason", "asked for", "--yes"
        )
        until(lambda: (public / layout.TAKEDOWNS).exists(), 60, "a checkpoint that names the list")
        files = DirectoryFiles(public)
        trust = believe(files, run.join.run)
        first = trust.takedowns((public / layout.TAKEDOWNS).read_bytes()).entries[0].from_round
        assert f"of round {first} " in shown or f"of round {first}," in shown
        run.await_checkpoint(first + 1)
        until(lambda: worker.events("takedowns"), 30, "the worker's word of it")
        assert json.loads(told("coordinator", "status", run.directory.root, "--json"))["to_take_down"] == 0

    before, at, after = (read_manifest(files, trust, number) for number in (first - 2, first - 1, first))
    assert before.takedowns_sha256 is None
    assert at.takedowns_sha256 == after.takedowns_sha256 is not None
    takedowns = read_takedowns(str(at.takedowns_sha256), trust, files.document)
    assert {entry.from_round for entry in takedowns.entries} == {first}
    assert worker.events("takedowns")[0] == {
        "event": "takedowns", "round": first, "pictures": len(takedowns.entries), "new": len(takedowns.entries),
    }  # fmt: skip
    assert {body["finding"] for kind, body in read_entries(public) if kind == "opinion"} == {"confirmed"}

    set_precision("cpu", 1)
    config = trust.config
    merged = [entry for number in (first, first + 1) for entry in read_manifest(files, trust, number).merged]
    later = [entry for entry in merged if entry.round >= first]
    assert later
    differing = 0
    for entry in later:
        unit = UnitId(entry.unit)
        index = index_of(trust, entry)
        materials = fetch_materials(files, trust, Needs.of_unit(config, entry.round, index))
        whole = replace(materials, without=((),) * len(materials.shards))
        assert sum(map(len, materials.without)) > 0
        assert unwanted not in drawn(config, unit, materials.shard_set(config, "cpu"))
        path = public / layout.delta_path(entry.blob_sha256)
        artifact = artifact_of(path, config, unit)
        findings = []
        for one in (materials, whole):
            own = replay(config, entry.round, unit, one, device="cpu", on_step=lambda *_: None)
            findings.append(judge_file(config, unit, artifact, path, own).finding)
        assert findings == ["confirmed", "refuted"], "whoever trained on what was taken down would have been caught"
        differing += unwanted in drawn(config, unit, whole.shard_set(config, "cpu"))
    assert differing, "none of these units would have drawn such a picture anyway"

    place = f"{later[0].round}/{index_of(trust, later[0])}"
    assert "which were taken down before its round" in told("verify", "replay", place, "--public", public)
    told("checkpoint", "rebuild", run.directory.root)
