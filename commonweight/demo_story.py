"""What became of the demo's hostile volunteers, read from the run's public log as anybody could."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol import layout
from protocol.documents import Verification

_REASONS: Final = {
    "probation": "new owners are audited always",
    "drawn": "a secret draw picked it, which nobody could foresee",
    "few": "there were too few others to compare it with",
    "outlier": "it stood out among the deltas of its round",
    "too-fast": "it came too fast",
    "conflict": "there were two claims for one lease",
    "late": "another result for the same unit happened to come",
    "overdue": "its bytes came when everybody could know that it was not drawn",
    "distrusted": "its owner had let another audit go by",
    "recheck": "its owner had been banned, or had let an audit go by",
    "replica": "it was to repeat another volunteer's unit, and its answer was not the other's",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """A hostile volunteer as it knows itself: its attack, and its claims by digest, forged (True) or honest."""

    number: int
    attack: str
    claims: Mapping[str, bool]


@dataclass(slots=True, kw_only=True)
class Story:
    """A hostile volunteer as the log knows it. Checkpoints are numbers; `merged` maps forged claims to theirs.

    `audits` counts those of its claims; `confirmed` has the numbers of those that a volunteer or an auditor confirmed.
    `first_refuted` is the first opinion against one of its claims with the reason of that audit; `banned_after` the
    number of forged claims made until the ban.
    """

    hostile: Hostile
    audits: int = 0
    confirmed: set[int] = field(default_factory=set)
    first_refuted: Mapping[str, Any] | None = None
    reason: str = ""
    merged: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    unmerged: dict[str, int] = field(default_factory=dict)
    banned_after: int | None = None
    forged: int = 0


def read_entries(public: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield kind and body of every entry of a run's public log, in order; `verify draws` checks the chain."""
    tail = public / layout.LOG_TAIL
    files = sorted(path for path in tail.parent.glob("*.jsonl") if path != tail)
    for path in (*files, *([tail] if tail.exists() else [])):
        for line in path.read_bytes().splitlines():
            entry = json.loads(line)
            yield entry["kind"], json.loads(entry["body"])


def tell(public: Path, hostile: Hostile) -> Story:
    """Follow a hostile volunteer's claims through the log."""
    story = Story(hostile=hostile)
    member = None
    reasons: dict[int, str] = {}
    for kind, body in read_entries(public):
        claim: str = body.get("claim", "")
        mine = claim in hostile.claims
        if kind == "claim" and mine:
            member = body["member"]
            story.forged += hostile.claims[claim]
        elif kind == "audit":
            reasons[body["audit"]] = body["reason"] if mine else "replica"
            story.audits += mine
        elif kind == "agreed" and mine:
            story.confirmed.add(body["audit"])
        elif kind == "opinion" and mine:
            _note_opinion(story, body, reasons[body["audit"]])
        elif kind == "verdict" and mine and body["code"] == "MERGED" and hostile.claims[claim]:
            story.merged[claim], story.weights[claim] = body["checkpoint"], body["weight"]
        elif kind == "unmerged" and mine:
            story.unmerged[claim] = body["in"]
        elif kind == "owner" and body["event"] == "banned" and body["member"] == member:
            story.banned_after = story.forged
    return story


def _note_opinion(story: Story, body: Mapping[str, Any], reason: str) -> None:
    if body["finding"] == "confirmed":
        story.confirmed.add(body["audit"])
    elif story.first_refuted is None:
        story.first_refuted = body
        story.reason = reason


def sentences(story: Story, rules: Verification) -> Sequence[str]:
    """Return the story in a few lines."""
    hostile = story.hostile
    honest = len(hostile.claims) - story.forged
    lines = [f"volunteer {hostile.number} was hostile ({hostile.attack}): {honest} honest units, {story.forged} forged"]
    refuted = story.first_refuted
    if refuted is None:
        lines.append("  no audit has met a forged unit of it; with more rounds one would")
    else:
        audits = "1 audit" if story.audits == 1 else f"{story.audits} audits"
        raw = f"raw difference {refuted['raw_difference']:.3g} (tolerance {rules.tolerance:g})"
        decoded = f"decoded {refuted['code_difference']:.3g} (tolerance {rules.code_tolerance:g})"
        banned = f"  banned after {_units(story.banned_after or 0)}; {audits} of its claims"
        lines += [
            f"  caught: {_REASONS[story.reason]}; an auditor trained the unit again and got another delta:",
            f"    {raw}, {decoded}",
            f"{banned}, {len(story.confirmed)} confirmed",
        ]
    lines += _merged_lines(story)
    return lines


def _units(count: int) -> str:
    return "1 forged unit" if count == 1 else f"{count} forged units"


def _numbers(checkpoints: Iterable[int]) -> str:
    return "checkpoint " + ", ".join(map(str, sorted(set(checkpoints))))


def _merged_lines(story: Story) -> list[str]:
    if not story.merged:
        return ["  none of its forged units was merged"]
    share = sum(story.weights.values()) / 2**24
    into = _numbers(story.merged.values())
    lines = [f"  merged before that: {_units(len(story.merged))}, {100 * share:.1f} % of one merge in all ({into})"]
    if story.unmerged:
        lines.append(f"  audited back and taken out again: {len(story.unmerged)} ({_numbers(story.unmerged.values())})")
    left = [claim for claim in story.merged if claim not in story.unmerged and story.weights[claim]]
    if left:
        lines.append(f"  still in the last checkpoint: {len(left)} (found out after the last round, or not at all)")
    return lines
