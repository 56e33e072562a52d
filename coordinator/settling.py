"""Settling a round: which deltas are merged with which weights, what the manifest says, and what everybody is told.

A round's merge set is fixed when it closes and written to the database before anything is merged; from there on every
step can be repeated after a crash and gives the same bytes.
"""

from dataclasses import replace

from coordinator.claims import judge, merged_verdict, stale_verdict, unused_verdict
from coordinator.desk import Desk
from coordinator.leasing import open_round
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
from coordinator.units import Attempt, Unit, UnitAbandoned, UnitState
from coordinator.units import advance as advance_unit
from protocol.canonical import canonical_json, sha256_hex
from protocol.documents import Claim, Digest, FileEntry, LeaseId, Manifest, MergeEntry, StateEntry, parse_payload
from protocol.envelope import parse_envelope
from protocol.errors import Bug
from protocol.log import log_line
from verify.weights import Candidate, merge_weights


def close_if_due(desk: Desk) -> Round | None:
    """Close the round that collects, if its rule says so; return it closed, with its merge set fixed."""
    store = desk.store
    current = store.latest_round()
    if current is None or current.state is not RoundState.COLLECTING:
        return None
    mergeable = _mergeable(desk, current.round)
    counts = store.unit_counts(current.round)
    facts = RoundFacts(
        now_ms=desk.clock.now_ms(),
        received=store.received_count(current.round),
        settled=counts.get(UnitState.SETTLED, 0),
        total=sum(counts.values()),
    )
    if not mergeable or not is_due(current, desk.config.rounds, facts):
        return None
    merge = _merge_set(desk, current.round, mergeable)
    closed, _ = advance(current, Closed(now_ms=facts.now_ms, merge=merge))
    store.save_round(current, closed)
    names = sha256_hex(canonical_json([entry.claim for entry in merge]))
    entry = desk.log("closed", {"claims_sha256": names, "merged": len(merge), "round": current.round})
    store.put_meta(_log_key(current.round), f"{entry.position} {entry.head.hex()}")
    return closed


def _log_key(round_number: int) -> str:
    return f"round/{round_number}/log"


def _mergeable(desk: Desk, round_number: int) -> list[tuple[Unit, Attempt]]:
    """Return what this round may merge; judge what has become too old for it."""
    fresh = []
    for unit, attempt in desk.store.mergeable():
        if round_number - unit.round > desk.config.rounds.staleness_bound:
            judge(desk, attempt, stale_verdict(desk, attempt))
        else:
            fresh.append((unit, attempt))
    return fresh


def _merge_set(desk: Desk, round_number: int, mergeable: list[tuple[Unit, Attempt]]) -> tuple[MergeEntry, ...]:
    rows = sorted(mergeable, key=lambda row: str(row[1].claim_sha256))
    candidates = [
        Candidate(claim=_claim_digest(attempt), round=unit.round, samples=_samples(attempt)) for unit, attempt in rows
    ]
    weights = merge_weights(candidates, merging_round=round_number, rules=desk.config.rounds)
    return tuple(
        MergeEntry(
            claim=_claim_digest(attempt),
            unit=unit.unit,
            round=unit.round,
            blob_sha256=attempt.artifacts[0].blob_sha256,
            content_sha256=attempt.artifacts[0].content_sha256,
            size=attempt.artifacts[0].size,
            weight=weight,
            samples=_samples(attempt),
            member=desk.member(attempt.owner),
        )
        for (unit, attempt), weight in zip(rows, weights, strict=True)
    )


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
    desk: Desk, merged: Round, *, previous_sha256: Digest, files: tuple[FileEntry, ...], state: tuple[StateEntry, ...]
) -> Manifest:
    """Return the manifest of the checkpoint that a round publishes."""
    position, head = _log_end(desk, merged.round)
    return Manifest(
        run=desk.run,
        config_sha256=desk.config_sha256,
        checkpoint=merged.round,
        previous_manifest_sha256=previous_sha256,
        outer=desk.config.outer,
        merged=merged.merge,
        files=files,
        state=state,
        log_position=position,
        log_head=head,
    )


def log_lines(desk: Desk, round_number: int) -> bytes:
    """Return the public log's entries that a round's manifest closes, one JSON object a line."""
    last, _ = _log_end(desk, round_number)
    first = 1 + (_log_end(desk, round_number - 1)[0] if round_number > 1 else 0)
    return b"".join(log_line(entry) for entry in desk.store.log_entries(first, last))


def log_tail(desk: Desk, round_number: int) -> bytes:
    """Return the log's entries after the manifest of a round, one JSON object a line."""
    first, (last, _) = _log_end(desk, round_number)[0] + 1, desk.store.log_head()
    return b"".join(log_line(entry) for entry in desk.store.log_entries(first, last))


def _log_end(desk: Desk, round_number: int) -> tuple[int, Digest]:
    text = desk.store.meta(_log_key(round_number))
    if text is None:
        raise Bug(private=f"round {round_number} has no log position")
    position, head = text.split()
    return int(position), Digest(head)


def _round(desk: Desk, number: int) -> Round:
    found = desk.store.round(number)
    assert found is not None
    return found


def record_published(desk: Desk, round_number: int, *, manifest_sha256: Digest, weights_sha256: Digest) -> None:
    """The manifest is in its place: give every verdict, reveal the epoch, and open the next round."""
    merging = _round(desk, round_number)
    published, _ = advance(merging, Published(manifest_sha256=manifest_sha256))
    desk.store.save_round(merging, published)
    desk.log("published", {"checkpoint": round_number, "manifest_sha256": manifest_sha256})
    for entry in merging.merge:
        _record_merged(desk, entry, round_number)
    oldest = round_number - desk.config.rounds.staleness_bound
    # After the last round there is no later one that could merge what is still on its way.
    newest = round_number if round_number >= desk.config.rounds.planned else oldest
    for number in range(oldest, newest + 1):
        _end_round(desk, number)
    desk.log("epoch-revealed", {"epoch": round_number, "secret": desk.epoch_secret(round_number).hex()})
    if round_number < desk.config.rounds.planned:
        open_round(desk, round_number + 1, weights_sha256)


def _end_round(desk: Desk, number: int) -> None:
    """Abandon what a round left open and no later merge may take any more, and judge what nobody needed."""
    for unit in desk.store.units(number):
        if unit.state is not UnitState.SETTLED:
            abandoned, _ = advance_unit(unit, UnitAbandoned())
            desk.store.save_unit(unit, abandoned)
    for attempt in desk.store.unjudged(number + 1):
        unit_of = desk.store.unit(attempt.unit)
        assert unit_of is not None
        judge(desk, attempt, unused_verdict(desk, attempt, unit_of))


def _record_merged(desk: Desk, entry: MergeEntry, checkpoint: int) -> None:
    attempt = desk.store.attempt_of_claim(Digest(entry.claim))
    assert attempt is not None
    unit = desk.store.unit(attempt.unit)
    assert unit is not None
    assert unit.chosen == LeaseId(attempt.lease)
    desk.store.save_unit(unit, replace(unit, merged_in=checkpoint))
    judge(desk, attempt, merged_verdict(desk, attempt, entry.weight, checkpoint))
