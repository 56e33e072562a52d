"""The schema: what it refuses by itself, whatever the code above it does, and that its indexes serve every query."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coordinator.sql_files import parse_queries, read_sql
from tests.coordinator import examples


@pytest.fixture
def raw(database: Path) -> Iterator[sqlite3.Connection]:
    """A connection that a careless program could have: our schema, none of our code."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys=ON")
        yield connection


MERGED, CLAIMED, LEASED = (f"lease = '{examples.lease_id(name)}'" for name in ("merged", "claimed", "leased"))
AUDIT = "audit = 1"


def _second_lease(unit: str, device: str) -> str:
    same = "round, owner, state, deadline_ms, lease_envelope, lease_sha256, artifacts, leased_ms, audit_share, scrutiny"
    same += ", late, refused"
    return (
        f"INSERT INTO attempts (lease, unit, device, {same}) "
        f"SELECT '{'0' * 32}', {unit}, {device}, {same} FROM attempts WHERE {LEASED}"
    )


IMPOSSIBLE = {
    "a leased attempt with a claim": f"UPDATE attempts SET state = 'leased' WHERE {CLAIMED}",
    "a claim without a receipt": f"UPDATE attempts SET claim_receipt = NULL WHERE {CLAIMED}",
    "a claim without artifacts": f"UPDATE attempts SET artifacts = '[]' WHERE {CLAIMED}",
    "another claim under the same lease": f"UPDATE attempts SET claim_sha256 = '{'0' * 64}' WHERE {CLAIMED}",
    "a sketch before a claim": f"UPDATE attempts SET sketch = zeroblob(4096) WHERE {LEASED}",
    "a short sketch": f"UPDATE attempts SET state = 'sketched', sketch = zeroblob(12) WHERE {CLAIMED}",
    "received without a receipt": f"UPDATE attempts SET state = 'received' WHERE {CLAIMED}",
    "judged without a verdict": f"UPDATE attempts SET state = 'judged' WHERE {CLAIMED}",
    "a verdict on an open claim": f"UPDATE attempts SET verdict_envelope = x'00' WHERE {CLAIMED}",
    "a judged attempt that goes on": f"UPDATE attempts SET state = 'received' WHERE {MERGED}",
    "an unknown state": f"UPDATE attempts SET state = 'paused' WHERE {LEASED}",
    "text for a number": f"UPDATE attempts SET deadline_ms = 'soon' WHERE {LEASED}",
    "an attempt in another round than its unit": f"UPDATE attempts SET round = 2 WHERE {LEASED}",
    "an attempt that is forgotten though merged": f"DELETE FROM attempts WHERE {MERGED}",
    "two leases of one device": _second_lease(f"'{examples.unit(3).unit}'", "device"),
    "two leases of one unit": _second_lease("unit", f"'{examples.device('bob-1', 'bob').device}'"),
    "a claim that took no time": f"UPDATE attempts SET trained_ms = NULL WHERE {CLAIMED}",
    "a claim before its lease": f"UPDATE attempts SET trained_ms = -1 WHERE {CLAIMED}",
    "a claim of no epoch": f"UPDATE attempts SET epoch = NULL WHERE {CLAIMED}",
    "an epoch without a claim": f"UPDATE attempts SET epoch = 1 WHERE {LEASED}",
    "a probability over one": f"UPDATE attempts SET audit_share = 16777217 WHERE {CLAIMED}",
    "a doubt without a reason": f"UPDATE attempts SET scrutiny = 'pending' WHERE {CLAIMED}",
    "an unknown scrutiny": f"UPDATE attempts SET scrutiny = 'trusted' WHERE {CLAIMED}",
    "bytes that came before their round": f"UPDATE attempts SET late = -1 WHERE {CLAIMED}",
    "half refused": f"UPDATE attempts SET refused = 2 WHERE {CLAIMED}",
    "a verdict that is taken away": f"UPDATE attempts SET verdict_envelope = NULL WHERE {MERGED}",
    "a judged attempt that is put in doubt": (
        f"UPDATE attempts SET scrutiny = 'pending', reason = 'outlier' WHERE {MERGED}"
    ),
    "a judged attempt with another sketch": f"UPDATE attempts SET sketch = randomblob(4096) WHERE {MERGED}",
    "a judged attempt that came later": f"UPDATE attempts SET late = 1 WHERE {MERGED}",
    "a malformed lease id": f"UPDATE attempts SET lease = 'A{'0' * 31}' WHERE {LEASED}",
    "settled without an outcome": f"UPDATE units SET state = 'settled' WHERE unit = '{examples.unit(3).unit}'",
    "an outcome while open": f"UPDATE units SET outcome = 'rejected' WHERE unit = '{examples.unit(3).unit}'",
    "accepted without a choice": (
        f"UPDATE units SET state = 'settled', outcome = 'accepted' WHERE unit = '{examples.unit(3).unit}'"
    ),
    "a choice of another unit's attempt": (
        f"UPDATE units SET state = 'settled', outcome = 'accepted', chosen = '{examples.lease_id('merged')}' "
        f"WHERE unit = '{examples.unit(3).unit}'"
    ),
    "a choice of an attempt without bytes": (
        f"UPDATE units SET state = 'settled', outcome = 'accepted', chosen = '{examples.lease_id('claimed')}' "
        f"WHERE unit = '{examples.unit(1).unit}'"
    ),
    "merged without being accepted": f"UPDATE units SET merged_in = 1 WHERE unit = '{examples.unit(3).unit}'",
    "merged into the past": f"UPDATE units SET merged_in = 0 WHERE unit = '{examples.unit(0).unit}'",
    "a settled unit that opens again": (
        f"UPDATE units SET state = 'open', outcome = NULL, chosen = NULL WHERE unit = '{examples.unit(0).unit}'"
    ),
    "taken out though not retracted": (
        f"UPDATE units SET merged_in = 1, unmerged_in = 2 WHERE unit = '{examples.unit(0).unit}'"
    ),
    "taken out though not merged": (
        f"UPDATE units SET retracted = 1, unmerged_in = 2 WHERE unit = '{examples.unit(0).unit}'"
    ),
    "taken out where it was merged": (
        f"UPDATE units SET merged_in = 1, retracted = 1, unmerged_in = 1 WHERE unit = '{examples.unit(0).unit}'"
    ),
    "half retracted": f"UPDATE units SET retracted = 2 WHERE unit = '{examples.unit(0).unit}'",
    "an audit in an unknown state": f"UPDATE audits SET state = 'paused' WHERE {AUDIT}",
    "an audit for an unknown reason": f"UPDATE audits SET reason = 'mood' WHERE {AUDIT}",
    "an audit of no lease": f"UPDATE audits SET lease = '{'0' * 32}' WHERE {AUDIT}",
    "an audit of no unit": f"UPDATE audits SET unit = '{'0' * 64}' WHERE {AUDIT}",
    "an audit of nobody": f"UPDATE audits SET owner = '{'0' * 64}' WHERE {AUDIT}",
    "an audit of no epoch": f"UPDATE audits SET epoch = 0 WHERE {AUDIT}",
    "a claim that is its own replica": f"UPDATE audits SET replica = lease WHERE {AUDIT}",
    "a replica that nobody leased": f"UPDATE audits SET replica = '{'0' * 32}' WHERE {AUDIT}",
    "a comparison without a replica": f"UPDATE audits SET state = 'replicated' WHERE {AUDIT}",
    "bytes of no replica": f"UPDATE audits SET state = 'wants_bytes' WHERE {AUDIT}",
    "refuted by nobody": f"UPDATE audits SET state = 'failed' WHERE {AUDIT}",
    "in doubt through nobody": f"UPDATE audits SET state = 'wants_second' WHERE {AUDIT}",
    "half an appeal": f"UPDATE audits SET appealed = 2 WHERE {AUDIT}",
    "an opinion on no audit": f"INSERT INTO opinions VALUES (9, '{'0' * 64}', '{'0' * 64}', 'confirmed', x'00')",
    "an opinion that is none": f"INSERT INTO opinions VALUES (1, '{'0' * 64}', '{'0' * 64}', 'maybe', x'00')",
    "an opinion that changes": "UPDATE opinions SET finding = 'refuted'",
    "a second opinion by the same auditor": (
        "INSERT INTO opinions SELECT audit, claim, auditor, 'refuted', x'00' FROM opinions"
    ),
    "two units with one index": f"UPDATE units SET \"index\" = 2 WHERE unit = '{examples.unit(3).unit}'",
    "a unit of a round that is not there": f"UPDATE units SET round = 9 WHERE unit = '{examples.unit(3).unit}'",
    "two rounds at once": (
        "INSERT INTO rounds (round, state, opened_ms, merge, unmerge) VALUES (2, 'collecting', 5, '[]', '[]')"
    ),
    "a merge set before the close": "UPDATE rounds SET merge = '[{}]'",
    "something taken out before the close": "UPDATE rounds SET unmerge = '[{}]'",
    "sketches that weighed nothing yet": f"UPDATE rounds SET weigh_seed = '{'0' * 64}'",
    "published without a manifest": "UPDATE rounds SET state = 'published', closed_ms = 5000",
    "closed before it was opened": "UPDATE rounds SET state = 'closed', closed_ms = 1",
    "a device without an owner": f"UPDATE devices SET owner = '{'0' * 64}'",
    "two owners with one pseudonym": f"UPDATE owners SET member = '{examples.owner('ada').member}'",
    "a log entry that is rewritten": "UPDATE log SET body = x'00' WHERE position = 1",
    "a log that is cut": "DELETE FROM log WHERE position = 2",
    "a gap in the log": "INSERT INTO log VALUES (4, 'claim', x'00', zeroblob(32))",
    "evidence without a lease": f"INSERT INTO evidence VALUES ('{'0' * 32}', 1, x'00')",
}


@pytest.mark.parametrize("statement", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_the_schema_refuses(raw: sqlite3.Connection, statement: str) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        assert raw.execute(statement).rowcount > 0


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("UPDATE owners SET state = 'banned'", "UPDATE owners SET state = 'established'"),
        ("UPDATE owners SET valid_in_row = 3, audited_ms = 7", "UPDATE owners SET audited_ms = -1"),
        (
            "UPDATE rounds SET state = 'closed', closed_ms = 5000, merge = '[1]'",
            "UPDATE rounds SET state = 'merging', merge = '[2]'",
        ),
        (
            "UPDATE rounds SET state = 'closed', closed_ms = 5000, unmerge = '[1]'",
            "UPDATE rounds SET state = 'merging', unmerge = '[]'",
        ),
        (
            "UPDATE rounds SET state = 'closed', closed_ms = 5000, weigh_seed = 'a'",
            "UPDATE rounds SET state = 'merging', weigh_seed = NULL",
        ),
        (
            "UPDATE rounds SET state = 'published', closed_ms = 5000, manifest_sha256 = 'a'",
            "UPDATE rounds SET manifest_sha256 = 'b'",
        ),
        ("UPDATE units SET merged_in = 1 WHERE chosen IS NOT NULL", "UPDATE units SET merged_in = 2"),
        (
            "UPDATE units SET merged_in = 1, retracted = 1, unmerged_in = 2 WHERE chosen IS NOT NULL",
            "UPDATE units SET unmerged_in = 3",
        ),
        (
            "UPDATE units SET merged_in = 1, retracted = 1, unmerged_in = 2 WHERE chosen IS NOT NULL",
            "UPDATE units SET retracted = 0, unmerged_in = NULL",
        ),
    ],
)
def test_what_is_final_stays(raw: sqlite3.Connection, first: str, then: str) -> None:
    assert raw.execute(first).rowcount > 0
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute(then)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("UPDATE owners SET state = 'banned'", "UPDATE owners SET state = 'probation'"),
        (
            "UPDATE units SET merged_in = 1, retracted = 1 WHERE chosen IS NOT NULL",
            "UPDATE units SET retracted = 0 WHERE chosen IS NOT NULL",
        ),
        (
            f"UPDATE attempts SET verdict_envelope = x'01' WHERE {MERGED}",
            f"UPDATE attempts SET verdict_envelope = x'02' WHERE {MERGED}",
        ),
    ],
)
def test_what_an_appeal_changes_can_change(raw: sqlite3.Connection, first: str, then: str) -> None:
    assert raw.execute(first).rowcount > 0
    assert raw.execute(then).rowcount > 0


def test_no_statement_of_every_day_scans_a_table(raw: sqlite3.Connection) -> None:
    for_screens = {"device_count", "outcome_counts", "units_by_member", "owners", "audit_counts"}
    from_the_end = {"latest_round", "log_head"}  # one row each
    for_sweeps = {"rejected_blobs"}  # every ten minutes
    # Indexes that hold nothing but the few rows that wait, and no table at all.
    small = re.compile("USING INDEX (attempts_to_merge|units_to_unmerge)$|^SCAN CONSTANT ROW$")
    for name, statement in parse_queries(read_sql("queries.sql")).items():
        values = dict.fromkeys(re.findall(r":(\w+)", statement), 1)
        plan = [row[3] for row in raw.execute("EXPLAIN QUERY PLAN " + statement, values)]
        scans = [step for step in plan if step.startswith("SCAN") and not small.search(step)]
        if name not in for_screens | from_the_end | for_sweeps:
            assert scans == [], name
