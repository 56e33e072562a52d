"""A simulated run: volunteers who lease, train, claim, sketch and upload, in virtual time."""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.simulation.office import START_MS, Office, Referees, Times
from benchmarks.simulation.people import TRAINER, Identity, Player, Taken, identity
from benchmarks.simulation.physics import HONEST, Physics, Task
from benchmarks.simulation.tally import Meter, Outcome, Tally, Truth
from coordinator import claims, leasing, verdicts
from coordinator.audits import AuditState
from coordinator.owners import OwnerState
from coordinator.rounds import RoundState
from coordinator.sessions import Session
from protocol.assignment import unit_samples
from protocol.calls import Instruction
from protocol.canonical import sha256_hex
from protocol.documents import (
    Artifact,
    Claim,
    ClaimReceipt,
    Digest,
    Lease,
    LeaseId,
    RunConfig,
    UnitId,
    digest_of,
    parse_payload,
    sign,
)
from protocol.envelope import parse_envelope
from protocol.errors import BytesRefused, OwnerBanned, Refusal, RunFinished
from protocol.limits import HOUR_MS, SKETCH_BYTES
from verify.replay import delta_schema


@dataclass(slots=True, kw_only=True)
class _Claimed:
    """A claim whose verdict its device awaits. `sent`: its bytes are on their way, or there."""

    player: Player
    taken: Taken
    digest: Digest
    envelope: bytes
    artifact: Artifact
    sent: bool = False


class Simulation:
    """A run. Make it, `play()` it, ask for its `outcome()`, and close its `office`.

    Args:
        config: of the run.
        physics: made for the same config.
        players: the devices; those of one owner have its name in common.
        folder: where the database goes; a memory file system makes it quick.
        seed: 32 bytes, of keys, lease ids and chance.
        delta_bytes: exact size of a delta of this run.
        auditors: how many referees the operator runs.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        physics: Physics,
        players: Sequence[Player],
        folder: Path,
        seed: bytes,
        delta_bytes: int,
        auditors: int = 1,
        times: Times | None = None,
    ) -> None:
        self.office = Office(config=config, physics=physics, folder=folder, seed=seed, delta_bytes=delta_bytes)
        self.players = list(players)
        self.truths: dict[Digest, Truth] = {}
        self.meter = Meter()
        self._config, self._physics, self._store = config, physics, self.office.store
        self._decide = self.office.decide
        self._seed = seed
        self._times = times or Times()
        self._random = random.Random(seed + b"run")
        self._identities: dict[str, Identity] = {}
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._idle: list[Player] = []
        self._held: list[tuple[Player, Taken]] = []
        self._claimed: dict[Digest, _Claimed] = {}
        self._claims_of: Counter[str] = Counter()
        self._poisons_of: Counter[str] = Counter()
        self._banned_after: dict[str, int] = {}
        self._refusals: Counter[str] = Counter()
        self._bases: dict[str, int] = {}
        self._checkpoint_bytes = 4 * delta_schema(config).num_elements
        shards = config.data.shards
        self._shard_bytes = config.rounds.shards_per_unit * sum(shard.size for shard in shards) // len(shards)
        self._referees = Referees(
            self.office,
            count=auditors,
            replay_ms=self._times.replay_ms,
            seed=seed,
            shard_bytes=self._shard_bytes,
            meter=self.meter,
            later=self._later,
        )

    # --- the loop --------------------------------------------------------------------------------------------

    def play(self, until: "Callable[[Simulation], bool] | None" = None) -> None:
        """Run to the end of the last round, or until `until` says so after an event; again to go on from there."""
        if not self._events:
            self.office.open()
            for player in self.players:
                self._enter(player)
            self._later(self._times.tick_ms, self._tick)
            self._wake()
        while not self.office.finished and not (until is not None and until(self)):
            at, _, act = heapq.heappop(self._events)
            self.office.clock.advance(at - self.office.clock.now_ms())
            act()
            self.office.turn()
            self._let_go()
            self._referees.send()
            self._wake()

    def _later(self, ms: int, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.office.clock.now_ms() + ms, next(self._order), act))

    def _tick(self) -> None:
        for claimed in list(self._claimed.values()):
            self._ask_about(claimed)
        self.office.reveal()
        self._note_bans()
        self._later(self._times.tick_ms, self._tick)

    # --- getting work ----------------------------------------------------------------------------------------

    def _enter(self, player: Player) -> None:
        """Let a player join; with a record its owner is established already."""
        me = identity(
            player.owner,
            player.name,
            seed=self._seed,
            config=self._config,
            run=self.office.desk.run,
            device_class=player.device_class,
        )
        self._identities[player.name] = me
        if player.record and self._store.owner(me.session.owner) is None:
            audited_ms = round(self._times.train_ms * player.speed)
            self.office.establish(me.session, record=player.record, audited_ms=audited_ms)
        self._idle.append(player)

    def _session(self, player: Player) -> Session:
        return self._identities[player.name].session

    def _wake(self) -> None:
        """Let everybody who waits for work ask again, if there may be some."""
        current = self._store.latest_round()
        if not self._idle or current is None:
            return
        is_open = current.state is RoundState.COLLECTING and self._store.next_open_unit(current.round) is not None
        if not is_open and all(audit.replica for audit in self._store.audits(AuditState.WANTS_REPLICA)):
            return
        waiting, self._idle = self._idle, []
        self._random.shuffle(waiting)
        for player in sorted(waiting, key=lambda player: player.first_asks):
            self._ask(player)

    def _ask(self, player: Player) -> None:
        session = self._session(player)
        try:
            answer = self._decide(partial(leasing.lease_unit, session=session, random_bytes=self._random.randbytes))
        except OwnerBanned:
            self._banned(player)
            return
        except RunFinished:
            return
        if isinstance(answer, leasing.NoWork):
            self._idle.append(player)
            return
        taken = self._taken(player, parse_payload(Lease, parse_envelope(answer.envelope).payload))
        if player.behaviour.holds:
            self._held.append((player, taken))
        elif player.behaviour.takes(taken):
            share = player.speed * player.behaviour.pace * self._random.uniform(0.9, 1.1)
            wait_ms = round(self._times.train_ms * share) + player.behaviour.patience
            self._later(wait_ms, partial(self._finish, player, taken))
        else:
            self._decide(partial(leasing.hand_back, session=session, lease=taken.lease))
            self._idle.append(player)

    def _let_go(self) -> None:
        """Let those who hold a unit of a round that is over hand it back."""
        over = [held for held in self._held if held[1].task.round <= self.office.published()]
        self._held = [held for held in self._held if held not in over]
        for player, taken in over:
            self._decide(partial(leasing.hand_back, session=self._session(player), lease=taken.lease))
            self._idle.append(player)

    def _taken(self, player: Player, lease: Lease) -> Taken:
        taken = Taken(
            task=Task(unit=UnitId(lease.unit), round=lease.round, index=lease.index),
            lease=lease.lease,
            lease_sha256=digest_of(lease),
        )
        return self._as_it_is(player, taken)

    def _as_it_is(self, player: Player, taken: Taken) -> Taken:
        """Return a leased unit with what is known of it now."""
        audits = self._store.audits_of_replica(LeaseId(taken.lease))
        owner = self._store.owner(self._session(player).owner)
        unit = self._store.unit(taken.task.unit)
        return replace(
            taken,
            replica_of=self.truths[audits[0].claim].owner if audits else None,
            delivered=self._claims_of[player.owner],
            established=owner is not None and owner.state is OwnerState.ESTABLISHED,
            merged=unit is not None and unit.merged_in is not None,
        )

    # --- delivering ------------------------------------------------------------------------------------------

    def _finish(self, player: Player, taken: Taken) -> None:
        """The training is over: claim, sketch, begin to upload, and ask for the next unit."""
        taken = self._as_it_is(player, taken)
        kind = player.behaviour.delivers(taken)
        if kind is not None:
            self._meter_unit(player, taken)
            try:
                self._claim(player, taken, kind)
            except OwnerBanned:
                self._banned(player)
                return
            except Refusal as refusal:
                self._refused(refusal)
                self._hand_back(player, taken)
        self._ask(player)

    def _hand_back(self, player: Player, taken: Taken) -> None:
        try:
            self._decide(partial(leasing.hand_back, session=self._session(player), lease=taken.lease))
        except Refusal as refusal:
            self._refused(refusal)

    def _claim(self, player: Player, taken: Taken, kind: str) -> None:
        session = self._session(player)
        artifact = self._physics.deliver(taken.task, kind, player.team)
        raw, digest = self._signed_claim(player, taken, artifact)
        answer = self._decide(partial(claims.submit_claim, session=session, raw=raw))
        self._remember(player, taken, kind, digest)
        again = player.behaviour.claims_again(taken)
        if again is not None:
            second, _ = self._signed_claim(player, taken, self._physics.deliver(taken.task, again, player.team))
            conflict = self._decide(partial(claims.submit_claim, session=session, raw=second)).conflict
            assert conflict is not None
            self._refused(conflict)
        receipt = parse_payload(ClaimReceipt, parse_envelope(answer.receipt).payload)
        sketch = self._physics.sketch(taken.task, artifact, Digest(receipt.sketch_seed))
        claimed = _Claimed(player=player, taken=taken, digest=digest, envelope=raw, artifact=artifact)
        self._claimed[digest] = claimed
        self.meter.bytes[_purpose(taken)] += SKETCH_BYTES
        wanted = self._decide(
            partial(claims.submit_sketch, session=session, claim=bytes.fromhex(digest), sketch=sketch)
        )
        self._follow(claimed, wanted)

    def _remember(self, player: Player, taken: Taken, kind: str, digest: Digest) -> None:
        self._claims_of[player.owner] += 1
        self._poisons_of[player.owner] += kind != HONEST and taken.replica_of is None
        self.truths[digest] = Truth(
            owner=player.owner,
            kind=kind,
            worked=player.behaviour.works(taken),
            replica=taken.replica_of is not None,
            in_order=self._claims_of[player.owner],
        )

    def _signed_claim(self, player: Player, taken: Taken, artifact: Artifact) -> tuple[bytes, Digest]:
        claim = Claim(
            run=self.office.desk.run,
            lease=taken.lease,
            lease_sha256=taken.lease_sha256,
            unit=taken.task.unit,
            device=self._session(player).device,
            artifacts=(artifact,),
            trail_root=sha256_hex(taken.task.unit.encode()),
            salt=self._random.randbytes(32).hex(),
            samples=unit_samples(self._config, taken.task.unit),
            loss=1.0,
            trainer_version=TRAINER,
            device_class=player.device_class,
        )
        return sign(claim, self._identities[player.name].key), digest_of(claim)

    def _follow(self, claimed: _Claimed, wanted: Instruction) -> None:
        if wanted is Instruction.DONE:
            self._claimed.pop(claimed.digest, None)
        elif wanted is Instruction.UPLOAD and not claimed.sent and claimed.player.behaviour.uploads(claimed.taken):
            claimed.sent = True
            self._later(self._times.upload_ms, partial(self._uploaded, claimed))

    def _ask_about(self, claimed: _Claimed) -> None:
        """What a worker does from time to time about a claim: is there a verdict, are the bytes wanted now?"""
        session, claim = self._session(claimed.player), bytes.fromhex(claimed.digest)
        if self._decide(partial(verdicts.known, session=session, claims=(claim,))):
            del self._claimed[claimed.digest]
        elif not claimed.sent:
            try:
                answer = self._decide(partial(claims.submit_claim, session=session, raw=claimed.envelope))
            except Refusal as refusal:
                self._refused(refusal)
                del self._claimed[claimed.digest]
            else:
                self._follow(claimed, answer.next)

    def _uploaded(self, claimed: _Claimed) -> None:
        """The bytes have arrived: have them admitted and receipted."""
        session, claim = self._session(claimed.player), bytes.fromhex(claimed.digest)
        try:
            expected = self._decide(
                partial(claims.expected_artifact, session=session, claim=claim, role=claimed.artifact.role)
            )
            assert not isinstance(expected, bytes)  # nothing is uploaded twice
            lease = expected.attempt.lease
            self.meter.bytes[_purpose(claimed.taken)] += claimed.artifact.size
            try:
                self._physics.admit(claimed.taken.task, expected)
            except BytesRefused as refusal:
                self._decide(partial(claims.record_refused, lease=lease, refusal=refusal))
                raise
            self._decide(partial(claims.record_received, lease=lease))
        except Refusal as refusal:
            self._refused(refusal)

    # --- bans ------------------------------------------------------------------------------------------------

    def _banned(self, player: Player) -> None:
        """A banned device goes; its owner may come back under new keys."""
        self._note_bans()
        again = player.behaviour.returns()
        if again is not None:
            newcomer = replace(player, name=f"{player.name}+", owner=f"{player.owner}+", behaviour=again, record=0)
            self.players.append(newcomer)
            self._enter(newcomer)

    def banned(self) -> frozenset[str]:
        """Return the owners who are banned, as far as it was noticed."""
        return frozenset(self._banned_after)

    def _note_bans(self) -> None:
        for player in self.players:
            if player.owner not in self._banned_after:
                stored = self._store.owner(self._session(player).owner)
                if stored is not None and stored.state is OwnerState.BANNED:
                    self._banned_after[player.owner] = self._poisons_of[player.owner]

    # --- numbers ---------------------------------------------------------------------------------------------

    def _refused(self, refusal: Refusal) -> None:
        self._refusals[refusal.code] += 1

    def _meter_unit(self, player: Player, taken: Taken) -> None:
        purpose = _purpose(taken)
        self.meter.units[purpose] += player.behaviour.works(taken)
        self.meter.bytes[purpose] += self._shard_bytes
        base = taken.task.round - 1
        if self._bases.get(player.name) != base:
            self.meter.bytes[purpose] += self._checkpoint_bytes
        self._bases[player.name] = max(base, self._bases.get(player.name, 0))

    def outcome(self) -> Outcome:
        """Return what came of it so far."""
        self._note_bans()
        ids = {player.owner: self._session(player).owner for player in self.players}
        tally = Tally(self._store, self.players, self.truths, ids, self._banned_after)
        return Outcome(
            rounds=self.office.published(),
            units=tally.merged_units(),
            hours=(self.office.clock.now_ms() - START_MS) / HOUR_MS,
            owners=tuple(tally.owner(owner) for owner in dict.fromkeys(player.owner for player in self.players)),
            honest_banned=tally.honest_banned(),
            honest_rejected=tally.honest_rejected(),
            compute_share=self.meter.share(self.meter.units),
            byte_share=self.meter.share(self.meter.bytes),
            trained=dict(self.meter.units),
            moved_bytes=dict(self.meter.bytes),
            audits={state.value: count for state, count in self._store.audit_counts().items()},
            refusals=dict(self._refusals + self._referees.refusals),
        )


def _purpose(taken: Taken) -> str:
    return "unit" if taken.replica_of is None else "replica"
