"""Entries survive crashes and full disks at every write, and only the receipt of the bytes lets a delta go."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.documents import Artifact, Claim, Digest, LeaseId, digest_of, sign
from protocol.errors import DiskFull, IllegalTransition, LocalProblem
from protocol.limits import APPEAL_MS
from tests.protocol.examples import CLAIM, DEVICE
from tests.protocol.examples import VERDICT as VERDICT_EXAMPLE
from worker.lifecycle import (
    BytesReceipted,
    ClaimReceipted,
    RefusedForGood,
    SpoolState,
    UploadWanted,
    VerdictAccepts,
    VerdictRejects,
)
from worker.spool import BYTES_RECEIPT, CLAIM_RECEIPT, SPARE_DELTAS_KEPT, VERDICT, Spool, SpoolEntry

DELTA = b"delta" * 1000


def claim_for(lease: str) -> Claim:
    artifact = Artifact(role="delta", content_sha256="ca" * 32, blob_sha256="b1" * 32, size=len(DELTA))
    return replace(CLAIM, lease=lease, artifacts=(artifact,))


def write_delta(path: Path) -> None:
    path.write_bytes(DELTA)


def add(spool: Spool, lease: str = "1e" * 16) -> SpoolEntry:
    claim = claim_for(lease)
    return spool.add(
        LeaseId(lease),
        b"lease envelope",
        write_delta,
        lambda path: (digest_of(claim), sign(claim, DEVICE)),
    )


def test_a_unit_that_was_added_is_there_after_a_restart(tmp_path: Path) -> None:
    entry = add(Spool(tmp_path))

    (found,) = Spool(tmp_path).pending()

    assert found == entry
    assert found.state is SpoolState.TRAINED
    assert found.artifact_path("delta").read_bytes() == DELTA
    assert found.document("lease.json") == b"lease envelope"


def test_a_delta_that_was_being_written_at_a_crash_is_dropped(tmp_path: Path) -> None:
    Spool(tmp_path)
    draft = tmp_path / "incoming" / ("1e" * 16)
    draft.mkdir()
    (draft / "delta.safetensors.zst").write_bytes(b"half")

    assert Spool(tmp_path).pending() == ()
    assert not draft.exists()


@pytest.mark.parametrize("step", ["delta", "claim"])
def test_a_full_disk_while_a_unit_is_added_leaves_nothing_half_and_the_unit_can_be_added_later(
    tmp_path: Path, step: str
) -> None:
    spool = Spool(tmp_path)

    def write_to_full_disk(path: Path) -> None:
        with Path("/dev/full").open("wb") as file:  # the kernel itself says that there is no space left
            file.write(DELTA)

    def claim_on_full_disk(path: Path) -> tuple[Digest, bytes]:
        write_to_full_disk(path)
        raise AssertionError

    with pytest.raises(DiskFull):
        spool.add(
            LeaseId("1e" * 16),
            b"lease envelope",
            write_to_full_disk if step == "delta" else write_delta,
            claim_on_full_disk,
        )

    assert list((tmp_path / "incoming").iterdir()) == list((tmp_path / "pending").iterdir()) == []
    assert add(spool).state is SpoolState.TRAINED


def test_a_full_disk_while_a_receipt_is_stored_leaves_the_entry_as_it_was(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    entry = add(spool)
    (entry.directory / (CLAIM_RECEIPT + ".new")).symlink_to("/dev/full")

    with pytest.raises(DiskFull):
        spool.record(entry, ClaimReceipted(), (CLAIM_RECEIPT, b"receipt"))

    assert Spool(tmp_path).pending() == (entry,)
    assert spool.record(entry, ClaimReceipted(), (CLAIM_RECEIPT, b"receipt")).state is SpoolState.CLAIMED


def test_the_delta_stays_until_a_verdict_accepts_it_and_the_documents_for_ever(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    entry = add(spool)
    delta = entry.artifact_path("delta")

    entry = spool.record(entry, ClaimReceipted(), (CLAIM_RECEIPT, b"receipt"))
    entry = spool.record(entry, UploadWanted())
    assert delta.exists()
    entry = spool.record(entry, BytesReceipted(), (BYTES_RECEIPT, b"bytes"))
    assert delta.exists()
    entry = spool.record(entry, VerdictAccepts(), (VERDICT, b"verdict"))

    assert entry.directory == tmp_path / "settled" / entry.unit.claim
    assert not entry.artifact_path("delta").exists()
    assert [entry.document(name) for name in (CLAIM_RECEIPT, BYTES_RECEIPT, VERDICT)] == [
        b"receipt",
        b"bytes",
        b"verdict",
    ]
    assert Spool(tmp_path).pending() == ()


def received(spool: Spool, number: int = 0) -> SpoolEntry:
    entry = add(spool, f"{number:032x}")
    os.utime(entry.artifact_path("delta"), ns=(number, number))
    entry = spool.record(entry, ClaimReceipted(), (CLAIM_RECEIPT, b"receipt"))
    return spool.record(spool.record(entry, UploadWanted()), BytesReceipted(), (BYTES_RECEIPT, b"bytes"))


def test_a_rejected_delta_stays_until_the_time_for_an_appeal_is_over(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    entry = spool.record(received(spool), VerdictRejects(), (VERDICT, b"verdict"))
    delta, verdict = entry.artifact_path("delta"), entry.directory / VERDICT
    now_ms = verdict.stat().st_mtime_ns // 1_000_000

    assert entry.directory == tmp_path / "settled" / entry.unit.claim
    spool.forget_old(now_ms + APPEAL_MS)
    assert delta.exists()
    spool.forget_old(now_ms + APPEAL_MS + 1)
    assert not delta.exists()
    assert verdict.exists()


def test_a_later_verdict_takes_the_place_of_the_first_and_both_are_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    refuted, restored = (sign(replace(VERDICT_EXAMPLE, code=code), DEVICE) for code in ("RETRACTED", "RESTORED"))
    entry = spool.record(received(spool), VerdictRejects(), (VERDICT, refuted))
    assert spool.settled(9) == (entry,)

    entry = spool.record(entry, VerdictAccepts(), (VERDICT, restored))

    assert entry.state is SpoolState.SETTLED
    assert (entry.document(VERDICT), entry.document("superseded-RETRACTED.json")) == (restored, refuted)
    assert not entry.artifact_path("delta").exists()


def test_deltas_that_are_not_the_only_copy_go_when_space_is_short_the_rejected_ones_last(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    kept = add(spool, f"{9:032x}")
    rejected = spool.record(received(spool, 1), VerdictRejects(), (VERDICT, b"verdict"))
    waiting = received(spool, 2)

    assert spool.free_one()
    assert (waiting.artifact_path("delta").exists(), rejected.artifact_path("delta").exists()) == (False, True)
    assert spool.free_one()
    assert not rejected.artifact_path("delta").exists()
    assert not spool.free_one(), "the only copy of a unit was removed"
    assert kept.artifact_path("delta").exists()


def test_a_new_unit_that_finds_the_disk_full_takes_the_place_of_a_spare_delta(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spare = received(spool, 1).artifact_path("delta")

    def write_if_there_is_room(path: Path) -> None:
        if spare.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write_delta(path)

    lease = LeaseId(f"{2:032x}")
    claim = claim_for(lease)
    entry = spool.add(lease, b"lease", write_if_there_is_room, lambda path: (digest_of(claim), sign(claim, DEVICE)))

    assert entry.state is SpoolState.TRAINED
    assert not spare.exists()


@pytest.mark.parametrize("state", [SpoolState.SETTLED, SpoolState.REJECTED, SpoolState.REFUSED])
def test_a_crash_between_a_last_state_and_its_move_is_made_good_at_the_next_start(
    tmp_path: Path, state: SpoolState
) -> None:
    spool = Spool(tmp_path)
    entry = add(spool)
    path = entry.directory / "state.json"
    path.write_bytes(path.read_bytes().replace(b"trained", state.value.encode()))

    assert Spool(tmp_path).pending() == ()

    area = "refused" if state is SpoolState.REFUSED else "settled"
    assert (tmp_path / area / entry.unit.claim / "claim.json").exists()


def test_only_the_newest_refused_deltas_are_kept_but_all_their_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.spool.SPARE_BYTES", 0)
    spool = Spool(tmp_path)
    for number in range(SPARE_DELTAS_KEPT + 2):
        entry = add(spool, f"{number:032x}")
        os.utime(entry.artifact_path("delta"), ns=(number, number))
        spool.record(entry, RefusedForGood(code="CLAIM_MISMATCH", sentence="No."))

    assert len(list((tmp_path / "refused").iterdir())) == SPARE_DELTAS_KEPT + 2
    assert len(list((tmp_path / "refused").glob("*/delta.safetensors.zst"))) == SPARE_DELTAS_KEPT
    assert LeaseId(f"{0:032x}") in spool.refused_leases()


def test_a_damaged_entry_is_reported_with_its_directory_and_not_deleted(tmp_path: Path) -> None:
    entry = add(Spool(tmp_path))
    (entry.directory / "state.json").write_bytes(b"{}")

    with pytest.raises(LocalProblem, match=entry.unit.claim):
        Spool(tmp_path).pending()

    assert entry.artifact_path("delta").exists()


def test_a_step_out_of_its_place_changes_nothing_on_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    entry = add(spool)

    with pytest.raises(IllegalTransition, match="trained"):
        spool.record(entry, BytesReceipted(), (BYTES_RECEIPT, b"bytes"))

    assert spool.pending() == (entry,)
    assert entry.document(BYTES_RECEIPT) is None
