"""What one sees while the demo runs: a live table on a terminal, a line a round elsewhere."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from protocol import layout


@dataclass(slots=True, kw_only=True)
class Volunteer:
    """What is known of one volunteer from its events. `claimed` maps claims to units; `forged` are units."""

    doing: str = "starting"
    units: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    loss: float | None = None
    hostile: bool = False
    claimed: dict[str, str] = field(default_factory=dict)
    forged: set[str] = field(default_factory=set)

    def claims(self) -> dict[str, bool]:
        """Return the volunteer's claims by digest, and whether each was forged."""
        return {claim: unit in self.forged for claim, unit in self.claimed.items()}


@dataclass(slots=True, kw_only=True)
class DemoState:
    """The run as seen from outside: the volunteers' events and the public files. Changes as it is told things."""

    rounds: int
    volunteers: int
    hostile: int = 0
    clock: Callable[[], float] = time.monotonic
    checkpoint: int = 0
    people: dict[int, Volunteer] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    published_at: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        everybody = range(1, self.volunteers + self.hostile + 1)
        self.people = {number: Volunteer(hostile=number > self.volunteers) for number in everybody}
        self.published_at[0] = self.clock()

    def take(self, number: int, event: dict[str, Any]) -> None:
        """Take an event of a volunteer."""
        person = self.people[number]
        match event.get("event"):
            case "lease":
                person.doing = f"round {event['round']}, unit {event['index']}"
            case "step":
                person.loss = event["loss"]
            case "claimed":
                person.claimed[event["claim"]] = event["unit"]
            case "forged":
                person.forged.add(event["unit"])
            case "downloaded":
                person.bytes_down += event["bytes"]
            case "uploaded":
                person.bytes_up += event["bytes"]
                person.units += 1
            case "waiting":
                person.doing = event["reason"]
            case "finished":
                person.doing = "finished"
            case "failed":
                person.doing = event["sentence"]
            case _:
                pass

    def look(self, public: Path) -> None:
        """Look at the public files: the newest checkpoint and the losses that were measured."""
        while self.checkpoint < self.rounds:
            following = self.checkpoint + 1
            if not (public / layout.checkpoint_directory(following) / layout.MANIFEST).exists():
                break
            self.checkpoint = following
            self.published_at[following] = self.clock()
        for checkpoint in range(self.checkpoint + 1):
            path = public / layout.metrics_path(checkpoint)
            if checkpoint not in self.losses and path.exists():
                self.losses[checkpoint] = float(json.loads(path.read_bytes())["validation_loss"])

    @property
    def seconds_left(self) -> float | None:
        """The time that the rounds to come will take if they take as long as the latest ones."""
        done = self.checkpoint
        if done < 1:
            return None
        since = max(0, done - 5)
        pace = (self.published_at[done] - self.published_at[since]) / (done - since)
        return max(0.0, pace * (self.rounds - done) - (self.clock() - self.published_at[done]))

    @property
    def bytes_up(self) -> int:
        """Bytes that all volunteers have sent."""
        return sum(person.bytes_up for person in self.people.values())

    @property
    def bytes_down(self) -> int:
        """Bytes that all volunteers have fetched."""
        return sum(person.bytes_down for person in self.people.values())

    @property
    def validation_loss(self) -> float | None:
        """The newest validation loss."""
        return self.losses[max(self.losses)] if self.losses else None

    def headline(self) -> str:
        """Return the run in a line."""
        heldout = self.validation_loss
        left = self.seconds_left
        units = " ".join(str(person.units) for person in self.people.values())
        return (
            f"round {min(self.checkpoint + 1, self.rounds)}/{self.rounds}"
            f" | validation loss {'-' if heldout is None else f'{heldout:.4f}'}"
            f" | units {units}"
            f" | up {self.bytes_up / 1e6:.1f} MB, down {self.bytes_down / 1e6:.1f} MB"
            f" | {'measuring the pace' if left is None else f'{left:.0f} s left'}"
        )


class DemoView:
    """Shows a `DemoState`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._shown = -1
        self._next = 0.0

    def say(self, sentence: str) -> None:
        """Print a sentence above whatever moves."""
        self._console.print(Text(sentence), soft_wrap=True)

    def show(self, state: DemoState) -> None:
        """Show the state: at most four times a second on a terminal, once a round elsewhere."""
        if not self._console.is_terminal:
            if state.checkpoint > self._shown:
                self._shown = state.checkpoint
                self.say(state.headline())
            return
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.25
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()
        self._live.update(_table(state), refresh=True)

    def close(self) -> None:
        """Stop moving."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _table(state: DemoState) -> Group:
    table = Table(box=None, pad_edge=False)
    for heading in ("volunteer", "units", "loss", "up", "down", "doing"):
        table.add_column(heading, justify="left" if heading in {"volunteer", "doing"} else "right", no_wrap=True)
    for number, person in state.people.items():
        table.add_row(
            f"volunteer {number}{' (hostile)' if person.hostile else ''}",
            str(person.units),
            "-" if person.loss is None else f"{person.loss:.4f}",
            f"{person.bytes_up / 1e6:.1f} MB",
            f"{person.bytes_down / 1e6:.1f} MB",
            Text(person.doing, overflow="ellipsis"),
        )
    return Group(Text(state.headline(), style="bold"), table)
