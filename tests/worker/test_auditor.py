"""The referee against a real server: it judges by its own run, and holds only signed bytes against a claim."""

import asyncio
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from diloco.codec import encode
from diloco.container import Container, largest_container, write_container
from diloco.frames import write_frames
from protocol import calls
from protocol.assignment import unit_seed
from protocol.documents import Artifact, Delegation, Opinion, UnitId, sign, verify
from protocol.errors import DelegationInvalid, KeyUnreadable, ServerBusy, Unreachable
from protocol.keys import PrivateKey
from tests.protocol.examples import CLAIM
from tests.worker.recording import QUICK, Recorder, work
from tests.worker.small_audits import Attempt, forged
from tests.worker.small_run import SmallRun
from verify.replay import codec_config, delta_schema
from worker.audit_home import DELEGATION, KEY, make_key
from worker.audit_progress import AuditTaken
from worker.auditor import AuditorSettings, run_auditor
from worker.progress import Event, Step
from worker.referee import INADMISSIBLE
from worker.stop import Stop, StopLevel


@dataclass
class Claimed:
    """A run with one uploaded unit, and the key of the device that claimed it."""

    run: SmallRun
    home: Path
    device: PrivateKey

    @property
    def honest(self) -> Attempt:
        return self.run.attempts[0]

    def forged(self, folder: Path, **changes: Any) -> Attempt:
        """The same claim with another delta in it: the honest one, turned round or otherwise changed."""
        config, unit = self.run.config, bytes.fromhex(self.honest.lease.unit)
        path = folder / "forged.safetensors"
        path.write_bytes(self.honest.stored)
        container = Container.open(path, delta_schema(config), codec_config(config), unit)
        delta = {name: -container.tensor(name) for name in container.schema.names}
        seed = bytes.fromhex(unit_seed(UnitId(self.honest.lease.unit)))
        encoded = encode(delta, container.schema, container.codec, seed)
        write_container(path, encoded, unit)
        raw, content = path.read_bytes(), encoded.content_digest().hex()
        return forged(self.honest, changes.get("raw", raw), changes.get("content", content), self.device)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Claimed:
    folder = tmp_path_factory.mktemp("trained")

    async def scenario() -> SmallRun:
        async with SmallRun(folder / "run", units=1) as run:
            await work(run, folder / "home", Recorder())
            return run

    run = asyncio.run(scenario())
    return Claimed(run=run, home=folder / "home", device=PrivateKey.load(folder / "home/keys/device.pem"))


@pytest.fixture
def claimed(trained: Claimed) -> Iterator[Claimed]:
    """The run with its switches as they were."""
    run = trained.run
    before = dict(vars(run))
    run.to_audit, run.opinions, run.log, run.errors = [], [], [], {}
    yield trained
    vars(run).update(before)


def settings_for(run: SmallRun, home: Path, **changes: Any) -> AuditorSettings:
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
    return replace(settings, **changes)


def install(run: SmallRun, home: Path) -> None:
    """Make an auditor's home, delegated by the run's root."""
    make_key(home)
    run.auditor_key = PrivateKey.load(home / KEY)
    (home / DELEGATION).write_bytes(run.auditor_delegation())


def judge(run: SmallRun, home: Path, *audits: list[Attempt], recorder: Recorder | None = None) -> Recorder:
    """Run an auditor until it has judged them all."""
    heard = recorder or Recorder()

    async def scenario() -> None:
        async with run, asyncio.timeout(60):
            install(run, home)
            run.to_audit = list(audits)
            await run_auditor(settings_for(run, home, audits=len(audits)), heard, stop=Stop())

    asyncio.run(scenario())
    return heard


def test_honest_work_is_confirmed_and_the_signed_opinion_is_kept(claimed: Claimed, tmp_path: Path) -> None:
    run, honest = claimed.run, claimed.honest
    recorder = judge(run, tmp_path / "home", [honest])

    (opinion,) = run.opinions
    assert (opinion.finding, opinion.claim) == ("confirmed", honest.claim_sha256)
    assert (opinion.raw_difference, opinion.code_difference) == (0.0, 0.0)  # the same machine
    assert opinion.trail_agrees
    assert honest.claim is not None
    assert opinion.content_sha256 == honest.claim.artifacts[0].content_sha256
    assert opinion.auditor == run.auditor_key.public.key_id
    kept = tmp_path / f"home/opinions/{run.run}/{honest.claim_sha256}.json"
    assert verify(Opinion, kept.read_bytes(), run.auditor_key.public) == opinion
    for name in ("connected", "ready", "audit", "downloaded", "step", "opinion", "audits_done"):
        assert recorder.named(name), name
    assert recorder.named("audits_done")[0]["confirmed"] == 1
    assert not list((tmp_path / "home/judging").iterdir()), "a delta of another was kept"


def test_one_replay_judges_both_claims_of_a_unit_and_tells_the_liar_from_the_honest(
    claimed: Claimed, tmp_path: Path
) -> None:
    run = claimed.run
    liar = claimed.forged(tmp_path)
    run.piece_bytes = 5_000  # read piece by piece
    recorder = judge(run, tmp_path / "home", [liar, claimed.honest])

    assert [opinion.finding for opinion in run.opinions] == ["refuted", "confirmed"]
    refuted = run.opinions[0]
    assert refuted.raw_difference > 0.5
    assert refuted.code_difference > 1.0
    assert not refuted.trail_agrees
    steps = run.config.training.steps
    assert [event["step"] for event in recorder.named("step")].count(steps) == 1, "the unit was run more than once"


@pytest.mark.parametrize("spoiled", ["stream", "scale", "content", "size"])
def test_signed_bytes_that_are_no_delta_are_refuted(claimed: Claimed, tmp_path: Path, spoiled: str) -> None:
    honest = bytes(claimed.honest.stored)
    if spoiled == "stream":
        bad = claimed.forged(tmp_path, raw=honest[:8] + bytes(len(honest) - 8))
    elif spoiled == "scale":
        content = bytearray(zstandard.ZstdDecompressor().stream_reader(honest, read_across_frames=True).read())
        header = 8 + int.from_bytes(content[:8], "little")
        content[header : header + 2] = np.array([0x7FC0], dtype="<u2").tobytes()
        write_frames(tmp_path / "spoiled", len(content), [content])
        bad = claimed.forged(tmp_path, raw=(tmp_path / "spoiled").read_bytes())
    elif spoiled == "content":
        bad = claimed.forged(tmp_path, raw=honest, content="ab" * 32)
    else:
        config = claimed.run.config
        most = largest_container(delta_schema(config), codec_config(config))
        bad = claimed.forged(tmp_path, raw=bytes(most + 1))
    judge(claimed.run, tmp_path / "home", [bad])

    (opinion,) = claimed.run.opinions
    assert opinion.finding == "refuted"
    assert opinion.raw_difference == opinion.code_difference == INADMISSIBLE
    assert claimed.run.log.count("ReadArtifact") == (0 if spoiled == "size" else 1)


def test_bytes_that_the_coordinator_damaged_are_never_held_against_the_volunteer(
    claimed: Claimed, tmp_path: Path
) -> None:
    damaged = replace(claimed.honest, stored=bytearray(claimed.honest.stored))
    damaged.stored[-1] ^= 0x11
    whole = Recorder(lambda event: _repair(event, damaged, claimed.honest))
    judge(claimed.run, tmp_path / "home", [damaged], recorder=whole)

    assert "ANSWER_INVALID" in whole.waits()
    assert [opinion.finding for opinion in claimed.run.opinions] == ["confirmed"]


def _repair(event: Event, damaged: Attempt, honest: Attempt) -> None:
    if getattr(event, "code", "") == "ANSWER_INVALID":
        damaged.stored = bytearray(honest.stored)


@pytest.mark.parametrize("call", ["TakeAudit", "ReadArtifact", "SubmitOpinions", "OpenSession"])
def test_trouble_in_any_call_is_met_by_asking_again(claimed: Claimed, tmp_path: Path, call: str) -> None:
    claimed.run.errors[call] = [ServerBusy(), Unreachable()]
    recorder = judge(claimed.run, tmp_path / "home", [claimed.honest])

    assert [opinion.finding for opinion in claimed.run.opinions] == ["confirmed"]
    assert "SERVER_BUSY" in recorder.waits()
    assert [event["step"] for event in recorder.named("step")].count(claimed.run.config.training.steps) == 1


def test_an_audit_that_was_given_to_somebody_else_is_dropped_and_the_next_one_taken(
    claimed: Claimed, tmp_path: Path
) -> None:
    run, taken = claimed.run, list[int]()

    def taken_away(event: Event) -> None:
        if isinstance(event, AuditTaken):
            taken.append(event.index)
            if len(taken) == 1:
                run.to_audit.insert(0, [claimed.forged(tmp_path)])

    recorder = Recorder(taken_away)

    async def scenario() -> None:
        async with run, asyncio.timeout(60):
            install(run, tmp_path / "home")
            run.to_audit = [[claimed.honest]]
            await run_auditor(settings_for(run, tmp_path / "home", audits=2), recorder, stop=Stop())

    asyncio.run(scenario())

    assert [event["code"] for event in recorder.named("audit_dropped")] == ["AUDIT_UNKNOWN"]
    assert [opinion.finding for opinion in run.opinions] == ["refuted", "confirmed"]


@pytest.mark.parametrize("forgery", ["another device", "another unit", "twice", "no keys", "no such round"])
def test_a_claim_that_is_not_what_its_device_signed_for_this_unit_is_not_judged(
    claimed: Claimed, tmp_path: Path, forgery: str
) -> None:
    run = claimed.run

    def spoil(reply: calls.TakeAuditReply) -> calls.TakeAuditReply:
        run.spoil_reply = lambda reply: reply
        match forgery:
            case "another device":
                return replace(reply, device_keys=(PrivateKey.generate().public.raw,))
            case "another unit":
                assert claimed.honest.claim is not None
                other = sign(replace(claimed.honest.claim, unit="ab" * 32), claimed.device)
                return replace(reply, claim_envelopes=(other,))
            case "twice":
                return replace(reply, claim_envelopes=reply.claim_envelopes * 2, device_keys=reply.device_keys * 2)
            case "no keys":
                return replace(reply, device_keys=())
            case _:
                return replace(reply, round=2)

    run.spoil_reply = spoil
    recorder = judge(run, tmp_path / "home", [claimed.honest])

    assert "ANSWER_INVALID" in recorder.waits()
    assert len(recorder.named("audit")) == 1
    assert [opinion.finding for opinion in run.opinions] == ["confirmed"]


def idle_claim(run: SmallRun, folder: Path) -> Attempt:
    """A signed claim to have trained nothing."""
    device = PrivateKey.generate()
    run.device_keys[device.public.key_id] = device.public
    lease = run.make_lease(device.public.key_id, 0)
    schema, path = delta_schema(run.config), folder / "idle.safetensors"
    zeros = {spec.name: np.zeros(spec.shape, dtype=np.float32) for spec in schema.tensors}
    encoded = encode(zeros, schema, codec_config(run.config), bytes.fromhex(unit_seed(UnitId(lease.unit))))
    write_container(path, encoded, bytes.fromhex(lease.unit))
    artifact = Artifact(
        role="delta", content_sha256=encoded.content_digest().hex(), blob_sha256="00" * 32, size=path.stat().st_size
    )
    claim = replace(CLAIM, run=run.run, lease=lease.lease, unit=lease.unit, device=lease.device, artifacts=(artifact,))
    attempt = Attempt(lease=lease, envelope=b"", claim=claim)
    return forged(attempt, path.read_bytes(), artifact.content_sha256, device)


@pytest.mark.parametrize("hurry", [StopLevel.SOON, StopLevel.NOW], ids=["soon", "now"])
def test_a_request_to_stop_in_the_middle_of_a_replay_ends_well_and_leaves_nothing_of_the_claim(
    tmp_path: Path, hurry: StopLevel
) -> None:
    async def scenario() -> Recorder:
        stop = Stop()
        recorder = Recorder(lambda event: stop.raise_to(hurry) if isinstance(event, Step) else None)
        async with SmallRun(tmp_path / "run", units=1, steps=5000) as run, asyncio.timeout(60):
            install(run, tmp_path / "home")
            run.to_audit = [[idle_claim(run, tmp_path)]]
            await run_auditor(settings_for(run, tmp_path / "home"), recorder, stop=stop)
            return recorder

    recorder = asyncio.run(scenario())

    assert recorder.names()[-1] == "audits_done"
    assert len(recorder.named("step")) < 50
    assert not recorder.named("opinion")
    assert not list((tmp_path / "home/judging").iterdir())


def test_a_key_that_the_root_did_not_delegate_is_stopped_before_anything_is_sent(
    claimed: Claimed, tmp_path: Path
) -> None:
    home = tmp_path / "home"

    async def scenario() -> None:
        async with claimed.run as run:
            install(run, home)
            (home / KEY).unlink()
            make_key(home)
            with pytest.raises(DelegationInvalid, match="this auditor has key"):
                await run_auditor(settings_for(run, home), Recorder(), stop=Stop())
            wrong = Delegation(
                run=run.run, role="coordinator", public_key=run.auditor_key.public.hex, not_after_ms=2**50
            )
            (home / DELEGATION).write_bytes(sign(wrong, run.root_key))
            with pytest.raises(DelegationInvalid, match="not as auditor"):
                await run_auditor(settings_for(run, home), Recorder(), stop=Stop())

    asyncio.run(scenario())
    assert claimed.run.log == []


def test_the_key_is_made_once_kept_private_and_missing_papers_say_what_to_do(claimed: Claimed, tmp_path: Path) -> None:
    home = tmp_path / "home"
    key = make_key(home)

    assert make_key(home) == key
    assert stat.S_IMODE((home / KEY).stat().st_mode) == 0o600
    with pytest.raises(DelegationInvalid, match="commonweight coordinator delegate"):
        asyncio.run(run_auditor(settings_for(claimed.run, home), Recorder(), stop=Stop()))
    with pytest.raises(KeyUnreadable, match="commonweight auditor init"):
        asyncio.run(run_auditor(settings_for(claimed.run, tmp_path / "nowhere"), Recorder(), stop=Stop()))
