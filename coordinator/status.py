"""Where a run stands, read from its directory: whether it is served or not, and without disturbing it."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from coordinator.audits import AuditState
from coordinator.directory import RunDirectory
from coordinator.rounds import RoundState
from coordinator.serve import serving_file
from coordinator.sqlite_store import SqliteStore
from coordinator.takedowns import published_takedowns, read_asked
from coordinator.units import UnitState
from protocol import layout
from protocol.canonical import parse_json
from protocol.documents import RunId
from protocol.errors import LocalProblem, PayloadInvalid
from protocol.limits import KIB
from protocol.printing import counted, printable
from verify.plain_files import read_plain

_MOST_BYTES: Final = 64 * KIB
_LARGEST_PID: Final = 2**31 - 1
_WAITING: Final = {
    AuditState.WANTS_REPLICA.value: "for a replica",
    AuditState.REPLICATED.value: "for a comparison",
    AuditState.WANTS_BYTES.value: "for a replica's bytes",
    AuditState.WANTS_REFEREE.value: "for an auditor",
    AuditState.WANTS_SECOND.value: "for a second auditor",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """A run at one instant. `round` is None before the run was served for the first time.

    `units` counts the current round's units by state; `members` counts accepted units of the whole run by pseudonym;
    `owners` counts owners by how far they are trusted, `audits` audits by state; `join` is there only while the run is
    served. `taken_down` counts pictures that units leave out since the newest checkpoint, `to_take_down` those that
    will be left out from the next one on.
    """

    run: RunId
    name: str
    join: str | None
    planned_rounds: int
    checkpoint: int
    validation_loss: float | None
    round: int | None
    round_state: str | None
    units: Mapping[str, int]
    members: Mapping[str, int]
    devices: int
    owners: Mapping[str, int]
    audits: Mapping[str, int]
    taken_down: int
    to_take_down: int

    def to_json(self) -> dict[str, Any]:
        """Return the status as a JSON object."""
        return asdict(self)

    def lines(self) -> tuple[str, ...]:
        """Return the status as lines for a person."""
        loss = "" if self.validation_loss is None else f", validation loss {self.validation_loss:.4f}"
        lines = [
            f"run: {printable(self.name)} ({self.run[:12]})",
            f"served: {self.join}" if self.join else "served: no",
            f"checkpoint: {self.checkpoint} of {self.planned_rounds} planned{loss}",
        ]
        if self.round is None:
            return (*lines, "round: none yet; the run was never served", *self._takedown_lines())
        units = ", ".join(f"{count} {state}" for state, count in self.units.items())
        lines.append(f"round: {self.round}, {self.round_state}; units: {units}")
        seen = counted(self.devices, "device")
        lines.append(f"members: {len(self.members)} with merged or accepted units, {seen} seen")
        most = sorted(self.members.items(), key=lambda item: (-item[1], item[0]))[:10]
        lines += [f"  {member[:12]}: {counted(count, 'unit')}" for member, count in most]
        return (*lines, *self._audit_lines(), *self._takedown_lines())

    def _takedown_lines(self) -> list[str]:
        if not self.taken_down and not self.to_take_down:
            return []
        more = f", {self.to_take_down:,} more with the next checkpoint" if self.to_take_down else ""
        return [f"pictures taken down: {self.taken_down:,}{more}"]

    def _audit_lines(self) -> list[str]:
        owners = ", ".join(f"{count} {state}" for state, count in self.owners.items() if count)
        waiting = ", ".join(
            f"{self.audits[state]} {words}" for state, words in _WAITING.items() if self.audits.get(state)
        )
        done = f"{self.audits.get('passed', 0):,} passed, {self.audits.get('failed', 0):,} failed"
        lines = [f"owners: {owners or 'none yet'}", f"audits: {done}" + (f"; waiting: {waiting}" if waiting else "")]
        if self.audits.get(AuditState.WANTS_SECOND.value):
            lines.append("  a second auditor is needed: `commonweight coordinator delegate` lets one judge")
        return lines


def read_status(directory: RunDirectory) -> RunStatus:
    """Return where the run stands.

    Raises:
        DirectoryNotARun: the directory holds no run.
        DatabaseTooNew: a newer Commonweight serves it.
    """
    trust = directory.trust()
    checkpoint = _newest_checkpoint(directory)
    current, counts, members, devices = None, {}, {}, 0
    owners: dict[str, int] = {}
    audits: dict[str, int] = {}
    if directory.database.exists():
        store = SqliteStore.open(directory.database)
        try:
            current = store.latest_round()
            if current is not None:
                counts = store.unit_counts(current.round)
            members = store.units_by_member()
            devices = store.device_count()
            owners = dict(Counter(owner.state.value for owner in store.owners()))
            audits = {state.value: count for state, count in store.audit_counts().items()}
        finally:
            store.close()
    published = published_takedowns(directory, trust)
    taken_down = {(entry.shard, entry.sample) for entry in (() if published is None else published.entries)}
    return RunStatus(
        run=trust.run,
        name=trust.config.name,
        join=_join(directory),
        planned_rounds=trust.config.rounds.planned,
        checkpoint=checkpoint,
        validation_loss=_validation_loss(directory, checkpoint),
        round=current.round if current else None,
        round_state=_name(current.state) if current else None,
        units={_name(state): count for state, count in counts.items()},
        members=members,
        devices=devices,
        owners=owners,
        audits=audits,
        taken_down=len(taken_down),
        to_take_down=len({(one.shard, one.sample) for one in read_asked(directory.takedowns)} - taken_down),
    )


def _name(state: RoundState | UnitState) -> str:
    return state.name.lower()


def _newest_checkpoint(directory: RunDirectory) -> int:
    folders = (directory.public / "checkpoints").glob(f"[0-9]*/{layout.MANIFEST}")
    return max((int(manifest.parent.name) for manifest in folders), default=0)


def _validation_loss(directory: RunDirectory, checkpoint: int) -> float | None:
    try:
        raw = read_plain(directory.public / layout.metrics_path(checkpoint), _MOST_BYTES)
        return float(parse_json(raw)["validation_loss"])
    except (OSError, PayloadInvalid, ValueError, OverflowError, KeyError, TypeError):
        return None  # not measured yet


def _join(directory: RunDirectory) -> str | None:
    path = serving_file(directory)
    try:
        serving: object = parse_json(read_plain(path, _MOST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    except PayloadInvalid as error:
        raise _unreadable(path, error.message) from None
    match serving:
        case {"join": str(join), "pids": {"supervisor": int(pid)}} if 0 < pid <= _LARGEST_PID:
            return printable(join) if _is_alive(pid) else None
        case _:
            raise _unreadable(path, "it does not say where the run is served")


def _unreadable(path: Path, why: str) -> LocalProblem:
    return LocalProblem(
        f"{path} can't be read ({why.rstrip('.')}). If the run is not being served, remove the file; "
        "if it is, restart `serve`, which writes it anew."
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False  # left behind by a supervisor that was killed
    except PermissionError:
        pass  # another user's process: alive
    return True
