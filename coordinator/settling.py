"""Settling a round: which deltas are merged with which weights, what the manifest says, and what everybody is told.

A round's merge set is fixed when it closes and written to the database before anything is merged; from there on every
step can be repeated after a crash and gives the same bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coordinator import auditing, bans, epochs, replicas, verdicts
from coordinator.audits import AuditReason, Scrutiny
from coordinator.desk import Desk
from coordinator.leasing import open_round
from coordinator.records import owner_of
from coordinator.rounds import (
    Closed,
    MergeInterrupted,
    MergeStarted,
    Published,
    Round,
    RoundFacts,
    RoundState,
    advance,
    is_due,
)
from coordinator.units import Attempt, AttemptState, Unit, UnitAbandoned, UnitAccepted, UnitState, is_at_work
from coordinator.units import advance as advance_unit
from protocol.canonical import canonical_json, sha256_hex
from protocol.documents import (
    Claim,
    Digest,
    FileEntry,
    LeaseId,
    Manifest,
    MergeEntry,
    StateEntry,
    UnmergeEntry,
    parse_payload,
)
from protocol.envelope import parse_envelope
from protocol.errors import Bug
from protocol.limits import UNMERGE_PER_ROUND
from protocol.log import log_line
from verify.policy import influence, is_taken_out, weigh_seed
from verify.weights import Candidate, merge_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class MergePlan:
    """What a round that is due could merge: entries without weights yet, in the order of their claims.

    `seed` is that of the weighing sketches, None where nothing is weighed by sketch.
    """

    round: int
    entries: tuple[MergeEntry, ...]
    seed: Digest | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """How the settler weighed a plan: outliers by claim with the reason, and the weights of all the others."""

    outliers: Mapping[str, str]
    weights: Mapping[str, int]


def plan_if_due(desk: Desk) -> MergePlan | None:
    """Return what to merge if the round that collects must close now, by its rule."""
    current = desk.store.latest_round()
    if current is None or not _is_due(desk, current, desk.store.ready_count(current.round)):
        return None
    entries = _entries(desk)
    weighs = desk.config.verification.mode == "replay"
    seed = weigh_seed(desk.epoch_secret(current.round), current.round).hex() if weighs else None
    return MergePlan(
        round=current.round,
        entries=entries,
        seed=None if seed is None else Digest(seed),
    )


def _is_due(desk: Desk, current: Round, ready: int) -> bool:
    if current.state is not RoundState.COLLECTING:
        return False
    counts = desk.store.unit_counts(current.round)
    facts = RoundFacts(
        now_ms=desk.clock.now_ms(),
        ready=ready,
        ended=counts.get(UnitState.SETTLED, 0),
        total=sum(counts.values()),
    )
    return is_due(current, desk.config.rounds, facts)


def _entries(desk: Desk) -> tuple[MergeEntry, ...]:
    entries = [_entry(desk, unit, attempt) for unit, attempt in desk.store.mergeable()]
    return tuple(sorted(entries, key=lambda entry: entry.claim))


def _entry(desk: Desk, unit: Unit, attempt: Attempt) -> MergeEntry:
    audited = attempt.scrutiny is Scrutiny.CONFIRMED
    record = owner_of(desk, attempt.owner).valid_in_row
    return MergeEntry(
        claim=_claim_digest(attempt),
        unit=unit.unit,
        round=unit.round,
        blob_sha256=attempt.artifacts[0].blob_sha256,
        content_sha256=attempt.artifacts[0].content_sha256,
        size=attempt.artifacts[0].size,
        weight=0,
        samples=_samples(attempt),
        member=desk.member(attempt.owner),
        audited=audited,
        influence=influence(desk.config.verification, valid_in_row=record, audited=audited),
        late=attempt.late,
    )


def weigh_plainly(desk: Desk, plan: MergePlan) -> Weighed:
    """Weigh a plan of a run that replays nothing: by samples and lateness alone."""
    weights = merge_weights(
        [Candidate.of(entry) for entry in plan.entries],
        rules=desk.config.rounds,
        verification=desk.config.verification,
        sketches=None,
        norms2=None,
    )
    return Weighed(
        outliers={}, weights={entry.claim: weight for entry, weight in zip(plan.entries, weights, strict=True)}
    )


def close(desk: Desk, plan: MergePlan, weighed: Weighed) -> Round | None:
    """Fix the round's merge set and return it closed.

    None if it must be planned again: a delta turned out to be an outlier and is audited first, or something of the plan
    may not be merged any more. Work that came since the plan was made does not count: it was not weighed, and a round
    that closed on its account could be left with nothing to merge.
    """
    store = desk.store
    current = store.latest_round()
    assert current is not None
    mergeable = {attempt.claim_sha256: (unit, attempt) for unit, attempt in store.mergeable()}
    if current.round != plan.round or not all(entry.claim in mergeable for entry in plan.entries):
        return None
    confirmed = {claim for claim, (_, attempt) in mergeable.items() if attempt.scrutiny is Scrutiny.CONFIRMED}
    if any(entry.audited != (entry.claim in confirmed) for entry in plan.entries):
        return None  # a referee has said meanwhile what the weighing could only guess
    for claim, reason in weighed.outliers.items():
        why = AuditReason.FEW if reason == "few" else AuditReason.OUTLIER
        auditing.put_in_doubt(desk, mergeable[Digest(claim)][1], why)
    merge = tuple(
        replace(entry, weight=weighed.weights[entry.claim])
        for entry in plan.entries
        if entry.claim not in weighed.outliers
    )
    if not _is_due(desk, current, ready=sum(entry.round == current.round for entry in merge)):
        return None
    for entry in merge:
        unit, attempt = mergeable[Digest(entry.claim)]
        accepted, _ = advance_unit(unit, UnitAccepted(lease=attempt.lease))
        store.save_unit(unit, accepted)
    unmerge = _unmerge_set(desk, current.round)
    event = Closed(now_ms=desk.clock.now_ms(), merge=merge, unmerge=unmerge, weigh_seed=plan.seed)
    closed, _ = advance(current, event)
    store.save_round(current, closed)
    names = sha256_hex(canonical_json([entry.claim for entry in merge]))
    body = {
        "claims_sha256": names,
        "merged": len(merge),
        "round": current.round,
        "unmerged": len(closed.unmerge),
    }
    entry_of_log = desk.log("closed", body)
    store.put_meta(_log_key(current.round), f"{entry_of_log.position} {entry_of_log.head.hex()}")
    return closed


def _unmerge_set(desk: Desk, round_number: int) -> tuple[UnmergeEntry, ...]:
    """Return what an audit back has refuted, no checkpoint has taken out yet, and whose delta is still kept.

    In portions, the oldest first: what was trained on top of a delta misses it when it goes, and must have the rounds
    to make up for it.
    """
    entries: list[UnmergeEntry] = []
    oldest = bans.newest_pruned(desk, round_number - 1)
    for unit in desk.store.units_to_unmerge():
        assert unit.chosen is not None
        assert unit.merged_in is not None
        if unit.merged_in <= oldest or not _is_taken_out(desk, unit.chosen):
            continue
        merged = desk.store.round(unit.merged_in)
        assert merged is not None
        (entry,) = (entry for entry in merged.merge if entry.unit == unit.unit)
        if entry.weight == 0:
            continue  # it never moved anything
        if entries and sum(taken.weight for taken in entries) + entry.weight > UNMERGE_PER_ROUND:
            break
        entries.append(
            UnmergeEntry(
                claim=entry.claim,
                unit=entry.unit,
                checkpoint=unit.merged_in,
                blob_sha256=entry.blob_sha256,
                content_sha256=entry.content_sha256,
                size=entry.size,
                weight=entry.weight,
                member=entry.member,
            )
        )
    return tuple(sorted(entries, key=lambda entry: entry.claim))


def _is_taken_out(desk: Desk, lease: LeaseId) -> bool:
    attempt = desk.store.attempt(lease)
    assert attempt is not None  # it was merged
    # An appeal changes nothing before it is decided: what was to stay in stays, what was to go goes.
    opinion = bans.refutation(desk, attempt, appealed=True)
    return opinion is None or is_taken_out(desk.config.verification, opinion.raw_difference)


def _log_key(round_number: int) -> str:
    return f"round/{round_number}/log"


def _claim_digest(attempt: Attempt) -> Digest:
    assert attempt.claim_sha256 is not None  # received implies claimed
    return Digest(attempt.claim_sha256)


def _samples(attempt: Attempt) -> int:
    assert attempt.claim_envelope is not None
    return parse_payload(Claim, parse_envelope(attempt.claim_envelope).payload).samples


def begin_merge(desk: Desk, round_number: int) -> Round:
    """Mark a closed round as merging."""
    closed = _round(desk, round_number)
    merging, _ = advance(closed, MergeStarted())
    desk.store.save_round(closed, merging)
    return merging


def unfinished_round(desk: Desk) -> Round | None:
    """Return the round whose settling a crash interrupted, set back to closed so that it can be settled again."""
    current = desk.store.latest_round()
    if current is None or current.state not in {RoundState.CLOSED, RoundState.MERGING}:
        return None
    if current.state is RoundState.CLOSED:
        return current
    closed, _ = advance(current, MergeInterrupted())
    desk.store.save_round(current, closed)
    return closed


def manifest_of(
    desk: Desk,
    merged: Round,
    *,
    previous_sha256: Digest,
    snapshot: int,
    files: tuple[FileEntry, ...],
    state: tuple[StateEntry, ...],
    takedowns_sha256: Digest | None,
) -> Manifest:
    """Return the manifest of the checkpoint that a round publishes.

    Args:
        snapshot: the newest snapshot before it.
        takedowns_sha256: the list of pictures that units of the next round leave out, if there is one.
    """
    due = merged.round - snapshot >= desk.snapshot_every or merged.round >= desk.config.rounds.planned
    position, head = log_end(desk, merged.round)
    return Manifest(
        run=desk.run,
        config_sha256=desk.config_sha256,
        checkpoint=merged.round,
        snapshot=merged.round if due else snapshot,
        previous_manifest_sha256=previous_sha256,
        outer=desk.config.outer,
        weigh_seed=merged.weigh_seed,
        merged=merged.merge,
        unmerged=merged.unmerge,
        files=files,
        state=state,
        takedowns_sha256=takedowns_sha256,
        log_position=position,
        log_head=head,
    )


def log_lines(desk: Desk, round_number: int) -> bytes:
    """Return the public log's entries that a round's manifest closes, one JSON object a line."""
    last, _ = log_end(desk, round_number)
    first = 1 + (log_end(desk, round_number - 1)[0] if round_number > 1 else 0)
    return b"".join(log_line(entry) for entry in desk.store.log_entries(first, last))


def log_tail(desk: Desk, round_number: int) -> bytes:
    """Return the log's entries after the manifest of a round (0: all of them), one JSON object a line."""
    first = 1 + (log_end(desk, round_number)[0] if round_number else 0)
    last, _ = desk.store.log_head()
    return b"".join(log_line(entry) for entry in desk.store.log_entries(first, last))


def log_end(desk: Desk, round_number: int) -> tuple[int, Digest]:
    """Return position and head of the log as a round's manifest signs them: those of the round's close."""
    text = desk.store.meta(_log_key(round_number))
    if text is None:
        raise Bug(private=f"round {round_number} has no log position")
    position, head = text.split()
    return int(position), Digest(head)


def _round(desk: Desk, number: int) -> Round:
    found = desk.store.round(number)
    assert found is not None
    return found


def record_published(
    desk: Desk,
    round_number: int,
    *,
    manifest_sha256: Digest,
    weights_sha256: Digest,
    takedowns_sha256: str | None = None,
) -> None:
    """The manifest is in its place: give every verdict, reveal what may be, and open the next round."""
    merging = _round(desk, round_number)
    published, _ = advance(merging, Published(manifest_sha256=manifest_sha256))
    desk.store.save_round(merging, published)
    desk.log("published", {"checkpoint": round_number, "manifest_sha256": manifest_sha256})
    for entry in merging.merge:
        _record_merged(desk, entry, round_number)
    for out in merging.unmerge:
        _record_unmerged(desk, out, round_number)
    last = round_number >= desk.config.rounds.planned
    # After the last round there is no later one that could merge what is still on its way.
    _end_rounds(desk, round_number if last else round_number - desk.config.rounds.staleness_bound, last=last)
    bans.drop_pruned(desk, round_number)
    epochs.reveal_epochs(desk, round_number)
    if not last:
        open_round(desk, round_number + 1, weights_sha256, takedowns_sha256)


def _end_rounds(desk: Desk, newest: int, *, last: bool) -> None:
    """Abandon what rounds up to `newest` left open and no later merge may take any more; judge what nobody needs.

    What came in time and waits for its audit is not late: it is merged after that, unless the run is over.
    """
    for unsent in () if last else desk.store.unsent_in_doubt(newest):
        if auditing.serves(desk, unsent.lease):
            continue
        if is_at_work(unsent, desk.clock.now_ms()):
            # Whose time for sending is not over has done nothing wrong, and gains nothing: it is merged nowhere.
            verdicts.judge(desk, unsent, verdicts.too_late(desk, unsent))
        else:
            replicas.forfeit(desk, unsent)
    for unit in desk.store.unsettled_units(newest):
        attempts = desk.store.attempts_of_unit(unit.unit)
        if last or not any(attempt.state is AttemptState.RECEIVED for attempt in attempts):
            abandoned, _ = advance_unit(unit, UnitAbandoned())
            desk.store.save_unit(unit, abandoned)
    # At the run's end what is still on its way is late, and nobody's fault.
    on_their_way = desk.store.unsent_in_doubt(newest) if last else ()
    for found in (*desk.store.unjudged(newest + 1), *on_their_way):
        attempt, unit_of = desk.store.attempt(found.lease), desk.store.unit(found.unit)
        assert attempt is not None
        assert unit_of is not None
        if attempt.state is AttemptState.JUDGED:
            continue  # a moment ago, with the audit that it served
        audits = (*desk.store.audits_of_subject(attempt.lease), *desk.store.audits_of_replica(attempt.lease))
        waiting = [audit for audit in audits if auditing.is_open(audit)]
        if waiting and not last:
            continue
        if unit_of.state is UnitState.SETTLED:
            verdicts.judge(desk, attempt, verdicts.unused(desk, attempt, unit_of))
            for audit in waiting:
                bans.drop(desk, audit)


def _record_merged(desk: Desk, entry: MergeEntry, checkpoint: int) -> None:
    attempt = desk.store.attempt_of_claim(Digest(entry.claim))
    assert attempt is not None
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    assert unit.chosen == LeaseId(attempt.lease)
    desk.store.save_unit(unit, replace(unit, merged_in=checkpoint))
    verdicts.judge(desk, attempt, verdicts.merged(desk, attempt, entry.weight, checkpoint))
    if unit.retracted:
        bans.tell_retracted(desk, attempt.lease)


def _record_unmerged(desk: Desk, entry: UnmergeEntry, checkpoint: int) -> None:
    attempt = desk.store.attempt_of_claim(Digest(entry.claim))
    assert attempt is not None
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    desk.store.save_unit(unit, replace(unit, unmerged_in=checkpoint))
    desk.log("unmerged", {"checkpoint": entry.checkpoint, "claim": entry.claim, "in": checkpoint})
