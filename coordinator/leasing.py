"""Giving out units: who gets which, for how long, and what happens when the time is over."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.audits import Audit, AuditReason, AuditState, replica_wait_ms
from coordinator.desk import Desk
from coordinator.owners import Device, Owner, OwnerState
from coordinator.records import as_long_ms
from coordinator.rounds import Round, RoundState, gives_units, suits_short
from coordinator.sessions import Session
from coordinator.units import (
    NEVER_MS,
    Attempt,
    AttemptState,
    Expired,
    HandedBack,
    ReleaseUnit,
    Unit,
    UnitAssigned,
    UnitReleased,
    advance,
    is_at_work,
    needs_release,
)
from protocol.assignment import short_below, unit_id, unit_seed, unit_shards
from protocol.canonical import sha256_hex
from protocol.documents import ArtifactLimit, Digest, Lease, LeaseId, UnitId, digest_of, sign
from protocol.errors import LeaseEnded, LeaseUnknown, OwnerBanned, RunFinished
from protocol.keys import KeyId
from protocol.layout import ROLE_DELTA
from protocol.limits import (
    KEPT_PER_ESTABLISHED,
    KEPT_SHARE,
    LEASES_PER_OWNER_AT_LEAST,
    LEASES_PER_OWNER_SHARE,
    SECOND_MS,
    UPLOADING_PER_DEVICE,
    WASTED_LEASES_PER_ROUND,
)
from verify.policy import replica_offered, replica_turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """A unit for this device."""

    envelope: bytes
    remaining_ms: int
    base_checkpoint: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NoWork:
    """No unit now; `reason` is for a person."""

    reason: str
    retry_after_ms: int


def check_admitted(desk: Desk, session: Session) -> None:
    """Raise `OwnerBanned` if the owner is."""
    owner = desk.store.owner(session.owner)
    if owner is not None and owner.state is OwnerState.BANNED:
        raise OwnerBanned


def remember_device(desk: Desk, session: Session) -> None:
    """Store an owner and a device, with the first unit that they get and whenever what they say has changed."""
    store = desk.store
    known = store.owner(session.owner)
    terms = Digest(session.proof.terms_sha256)
    owner = (
        replace(known, terms_sha256=terms)
        if known
        else Owner(
            owner=session.owner,
            public_key=session.owner_key.hex,
            member=desk.member(session.owner),
            terms_sha256=terms,
        )
    )
    if owner != known:
        store.put_owner(owner)
    device = Device(
        device=session.device,
        public_key=session.device_key.hex,
        owner=session.owner,
        delegation_envelope=session.delegation_envelope,
        device_class=session.proof.device_class,
        trainer_version=session.proof.trainer_version,
    )
    if device != store.device(session.device):
        store.put_device(device)


def open_round(desk: Desk, number: int, base_sha256: Digest, takedowns_sha256: str | None = None) -> None:
    """Start a round: its units, its epoch, and the hash of the epoch's secret in the log.

    Args:
        takedowns_sha256: what the manifest of the checkpoint before it names.
    """
    desk.store.add_round(Round(round=number, opened_ms=desk.clock.now_ms()))
    desk.store.put_meta(f"round/{number}/base", base_sha256)
    if takedowns_sha256 is not None:
        desk.store.put_meta(f"round/{number}/takedowns", takedowns_sha256)
    desk.store.add_units(
        [
            Unit(unit=unit_id(desk.config_sha256, number, index), round=number, index=index)
            for index in range(desk.config.rounds.units)
        ]
    )
    secret_hash = sha256_hex(desk.epoch_secret(number))
    desk.log("epoch-opened", {"epoch": number, "secret_sha256": secret_hash})


def lease_unit(
    desk: Desk, session: Session, *, random_bytes: Callable[[int], bytes] = secrets.token_bytes
) -> Leased | NoWork:
    """Return the unit that this device already holds, else a new one, else why there is none.

    Raises `OwnerBanned`, and `RunFinished` after the last planned round.
    """
    store, now = desk.store, desk.clock.now_ms()
    check_admitted(desk, session)
    held = store.leased_attempt(session.device)
    if held is not None:
        if held.deadline_ms > now:
            # A worker that crashed gets its unit back instead of waiting for its own lease to end.
            return _answer(held, now)
        end_lease(desk, held, Expired())
    uploading = [attempt for attempt in store.uploading_attempts(session.device) if is_at_work(attempt, now)]
    if len(uploading) > UPLOADING_PER_DEVICE:
        return NoWork(reason="earlier units must be uploaded first", retry_after_ms=2 * SECOND_MS)
    current = store.latest_round()
    if current is None:
        return NoWork(reason="the run has not begun", retry_after_ms=5 * SECOND_MS)
    if current.state is RoundState.PUBLISHED and current.round >= desk.config.rounds.planned:
        raise RunFinished
    if store.wasted_count(session.owner, current.round) >= WASTED_LEASES_PER_ROUND:
        # Stops shopping for a unit: one that a partner holds too, or that seems easy.
        reason = f"this owner gave up {WASTED_LEASES_PER_ROUND} units of round {current.round}; the next one is open"
        return NoWork(reason=reason, retry_after_ms=5 * SECOND_MS)
    most = max(LEASES_PER_OWNER_AT_LEAST, desk.config.rounds.units // LEASES_PER_OWNER_SHARE)
    if store.leased_count(session.owner) >= most:
        return NoWork(reason=f"this owner's devices hold {most} units already", retry_after_ms=5 * SECOND_MS)
    known = store.owner(session.owner)
    # Stops newcomers, whose keys are free, from holding a round with claims that are never followed by anything.
    unsent = most if known is not None and known.state is OwnerState.ESTABLISHED else most // 2
    if store.unsent_count(session.owner) >= unsent:
        reason = f"bytes of {unsent} units of this owner are still to come"
        return NoWork(reason=reason, retry_after_ms=5 * SECOND_MS)
    replica = _replica(desk, session, random_bytes)
    if replica is not None:
        return _answer(replica, now)
    gives_out = gives_units(current, desk.config.rounds)
    unit = _next_unit(desk, session.device, current.round) if gives_out else None
    if unit is None:
        doing = "all its units are given out" if gives_out else "it is being merged"
        return NoWork(reason=f"round {current.round}: {doing}", retry_after_ms=SECOND_MS)
    if not _has_room(desk, session.owner, current.round):
        reason = f"newcomers have their share of round {current.round}, and wait for audits of it"
        return NoWork(reason=reason, retry_after_ms=5 * SECOND_MS)
    assigned, _ = advance(unit, UnitAssigned())
    store.save_unit(unit, assigned)
    return _answer(_lease(desk, session, unit, random_bytes), now)


def _has_room(desk: Desk, owner: KeyId, round_number: int) -> bool:
    """Say whether an owner may have a unit, for all that newcomers have of the round.

    Keys are free, so no cap of each newcomer keeps them from taking every unit with results that nobody believes until
    auditors come to them. So a few units are kept for each established owner.
    """
    known, units = desk.store.owner(owner), desk.config.rounds.units
    if known is not None and known.state is OwnerState.ESTABLISHED:
        return True
    kept = min(units // KEPT_SHARE, KEPT_PER_ESTABLISHED * desk.store.established_others(owner))
    return not kept or desk.store.held_by_newcomers(round_number) < units - kept


def _next_unit(desk: Desk, device: KeyId, round_number: int) -> Unit | None:
    if not desk.config.training.short_share:
        return desk.store.next_open_unit(round_number)
    last = desk.store.latest_claimed(device)
    long_ms = None if last is None else as_long_ms(desk, last.unit, last.trained_ms or 0)
    return desk.store.next_open_unit(
        round_number, short_below=short_below(desk.config), short=suits_short(desk.config.rounds, long_ms)
    )


def _replica(desk: Desk, session: Session, random_bytes: Callable[[int], bytes]) -> Attempt | None:
    """Lease a unit to be run again for an audit, if this owner is one whose word counts; None if there is none.

    The lease looks like any other. Nobody gets a unit that the same owner has had before.
    """
    store = desk.store
    owner = store.owner(session.owner)
    if owner is None or owner.state is not OwnerState.ESTABLISHED:
        return None
    # Newcomers' claims last, as for auditors.
    for audit in sorted(store.audits(AuditState.WANTS_REPLICA), key=lambda it: it.reason is AuditReason.PROBATION):
        if audit.replica is not None or desk.clock.now_ms() >= audit.deadline_ms:
            continue
        attempts = store.attempts_of_unit(audit.unit)
        if any(attempt.owner == session.owner or attempt.state is AttemptState.LEASED for attempt in attempts):
            continue
        if not _is_offered(desk, audit, session.owner):
            continue
        unit = store.unit(audit.unit)
        assert unit is not None  # a foreign key
        attempt = _lease(desk, session, unit, random_bytes)
        rules = desk.config.rounds
        until_ms = desk.clock.now_ms() + rules.lease_ms + rules.upload_ms
        store.save_audit(audit, replace(audit, replica=attempt.lease, deadline_ms=until_ms))
        return attempt
    return None


def _is_offered(desk: Desk, audit: Audit, owner: KeyId) -> bool:
    turn = replica_turn(desk.epoch_secret(audit.epoch), audit.claim, owner)
    left_ms = audit.deadline_ms - desk.clock.now_ms()
    waited = 1.0 - left_ms / replica_wait_ms(desk.config.rounds.lease_ms)
    return replica_offered(turn, owners=desk.store.established_others(audit.owner), waited=waited)


def _answer(attempt: Attempt, now_ms: int) -> Leased:
    return Leased(
        envelope=attempt.lease_envelope,
        remaining_ms=max(0, attempt.deadline_ms - now_ms),
        base_checkpoint=attempt.round - 1,
    )


def _lease(desk: Desk, session: Session, unit: Unit, random_bytes: Callable[[int], bytes]) -> Attempt:
    rules = desk.config.rounds
    base = desk.store.meta(f"round/{unit.round}/base")
    assert base is not None  # written with the round
    lease = Lease(
        run=desk.run,
        config_sha256=desk.config_sha256,
        lease=random_bytes(16).hex(),
        device=session.device,
        unit=unit.unit,
        round=unit.round,
        index=unit.index,
        base_sha256=base,
        shards=unit_shards(desk.config, unit.round, unit.index),
        takedowns_sha256=desk.store.meta(f"round/{unit.round}/takedowns"),
        seed=unit_seed(unit.unit),
        artifacts=(ArtifactLimit(role=ROLE_DELTA, max_bytes=desk.delta_bytes),),
        duration_ms=rules.lease_ms,
    )
    now = desk.clock.now_ms()
    attempt = Attempt(
        lease=LeaseId(lease.lease),
        unit=unit.unit,
        round=unit.round,
        device=session.device,
        owner=session.owner,
        deadline_ms=now + rules.lease_ms,
        lease_envelope=sign(lease, desk.key),
        lease_sha256=digest_of(lease),
        leased_ms=now,
    )
    remember_device(desk, session)
    desk.store.add_attempt(attempt)
    return attempt


def hand_back(desk: Desk, session: Session, lease: str) -> None:
    """Take a unit back; raise `LeaseUnknown`, or `LeaseEnded` if it was claimed already."""
    attempt = desk.store.attempt(LeaseId(lease))
    if attempt is None or attempt.device != session.device:
        raise LeaseUnknown
    if attempt.state in {AttemptState.HANDED_BACK, AttemptState.EXPIRED}:
        return
    if attempt.state is not AttemptState.LEASED:
        raise LeaseEnded("This unit was claimed already; it can't be handed back.")
    end_lease(desk, attempt, HandedBack())


def end_lease(desk: Desk, attempt: Attempt, event: Expired | HandedBack) -> None:
    """End a lease, and let its unit, or the audit that it served, go to others."""
    ended, instructions = advance(attempt, event)
    desk.store.save_attempt(attempt, ended)
    for audit in desk.store.audits_of_replica(attempt.lease):
        if audit.state is AuditState.WANTS_REPLICA:
            # After a lease that ran out the referee has waited long enough. After one that was handed back others are
            # awaited anew: else whoever is offered a replica could at once have it done by nobody.
            wait_ms = replica_wait_ms(desk.config.rounds.lease_ms) if isinstance(event, HandedBack) else 0
            desk.store.save_audit(audit, replace(audit, replica=None, deadline_ms=desk.clock.now_ms() + wait_ms))
    for instruction in instructions:
        if isinstance(instruction, ReleaseUnit):
            release_unit(desk, instruction.unit)


def release_unit(desk: Desk, unit_name: UnitId) -> None:
    """Open a unit again, unless somebody else still works on it.

    A unit of a published round is not leased again, but late work for it may still settle it until the staleness bound.
    """
    unit = desk.store.unit(unit_name)
    assert unit is not None  # an attempt names it
    if needs_release(unit, desk.store.attempts_of_unit(unit.unit), desk.clock.now_ms()):
        released, _ = advance(unit, UnitReleased())
        desk.store.save_unit(unit, released)


def expire_due(desk: Desk) -> int:
    """End every lease whose time is over, and release units whose claimed bytes never came; return how many."""
    due = desk.store.due_attempts(desk.clock.now_ms())
    for attempt in due:
        if attempt.state is AttemptState.LEASED:
            end_lease(desk, attempt, Expired())
        else:
            # The claim stays good: its bytes may still come, late. Only the unit is given to somebody else.
            desk.store.save_attempt(attempt, replace(attempt, deadline_ms=NEVER_MS))
            release_unit(desk, attempt.unit)
    return len(due)
