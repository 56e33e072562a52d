"""What anybody can check of a run with one command: its draws, a verdict, its policy."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from commonweight.cli import main
from diloco.codec import encode
from diloco.container import Container, write_container
from protocol import layout
from protocol.assignment import unit_id, unit_seed
from protocol.documents import UnitId, digest_of
from protocol.keys import PrivateKey, PublicKey
from protocol.log import LogEntry, log_line
from tests.verify.examples import RUN, PublishedRun
from tests.verify.test_draws import ADA, Book
from tests.worker.files_server import serving
from verify.replay import codec_config, delta_schema


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main.run([str(argument) for argument in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# --- replay ----------------------------------------------------------------------------------------------------


def unit_of(run: PublishedRun, round_number: int, index: int) -> UnitId:
    return unit_id(digest_of(run.config), round_number, index)


@pytest.mark.parametrize("by_id", [True, False], ids=["id", "place"])
def test_a_merged_unit_is_run_again_and_confirmed(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], by_id: bool
) -> None:
    unit = unit_of(published, 2, 1)
    named = unit[:12] if by_id else "2/1"
    code, out, err = command(
        capsys, "verify", "replay", named, "--public", published.public, "--home", tmp_path, "--threads", 1
    )

    assert (code, err) == (0, "")
    assert f"unit {unit[:12]}: round 2, index 1, of run {RUN[:12]}" in out
    assert "merged into checkpoint 2" in out
    assert "least raw difference  0" in out
    assert "confirmed:" in out


def forged_delta(run: PublishedRun, target: Path, factor: float) -> Path:
    """The delta of unit 1/0, so many times as large."""
    (entry,) = (entry for entry in run.manifest(1).merged if entry.unit == unit_of(run, 1, 0))
    unit = bytes.fromhex(entry.unit)
    path = run.public / layout.delta_path(entry.blob_sha256)
    container = Container.open(path, delta_schema(run.config), codec_config(run.config), unit)
    delta = {name: container.tensor(name) * np.float32(factor) for name in container.schema.names}
    seed = bytes.fromhex(unit_seed(UnitId(entry.unit)))
    write_container(target, encode(delta, container.schema, container.codec, seed), unit)
    return target


def test_a_forged_delta_is_refuted_with_both_differences_and_exit_code_1(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged = forged_delta(published, tmp_path / "forged", -1.0)
    code, out, err = command(
        capsys, "verify", "replay", "1/0", "--public", published.public, "--home", tmp_path, "--delta", forged,
        "--threads", 1,
    )  # fmt: skip

    assert (code, err) == (1, "")
    difference = re.search(r"least raw difference +([0-9.]+) +at most 0.001", out)
    assert difference is not None
    assert float(difference[1]) > 1.0
    assert out.rstrip().endswith("refuted: running the unit again does not give this delta")


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        ("1/3", "has no unit 1/3"),
        ("0/0", "has no unit 0/0"),
        ("abc", "neither ROUND/INDEX nor 8 or more"),
        ("deadbeef", "no unit deadbeef"),
        ("1/2/3", "neither ROUND/INDEX"),
    ],
)
def test_a_unit_that_the_run_does_not_have_is_a_wrong_use(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], unit: str, said: str
) -> None:
    code, _, err = command(capsys, "verify", "replay", unit, "--public", published.public, "--home", tmp_path)

    assert code == 2
    assert said in err


def test_without_a_run_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, "verify", "replay", "deadbeef", "--home", tmp_path)

    assert code == 2
    assert "--join" in err


def test_another_runs_files_are_not_taken_for_the_joined_ones(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(
        capsys, "verify", "replay", "1/0", "--public", published.public, "--home", tmp_path,
        "--join", f"cw1:example.org:1:{'ab' * 32}",
    )  # fmt: skip

    assert code == 1
    assert "[WRONG_RUN]" in err


# --- draws -----------------------------------------------------------------------------------------------------


def write_log(run: PublishedRun, signed: Sequence[LogEntry], tail: Sequence[LogEntry]) -> None:
    """Put a log under the run's two checkpoints and after them."""
    last = signed[-1]
    (run.public / layout.log_path(1)).write_bytes(b"".join(map(log_line, signed)))
    (run.public / layout.log_path(2)).write_bytes(b"")
    (run.public / layout.LOG_TAIL).write_bytes(b"".join(map(log_line, tail)))
    for checkpoint in (1, 2):
        run.forge(checkpoint, lambda found: replace(found, log_position=last.position, log_head=last.head.hex()))


def book_of(run: PublishedRun) -> Book:
    book = Book(run.config.verification, run.config.training)
    book.open(1)
    for _ in range(2):
        book.refereed(ADA)
    book.reveal(1)
    book.open(2)
    return book


def test_a_log_that_holds_is_counted(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = published.copy(tmp_path / "public")
    entries = book_of(run).entries()
    write_log(run, entries[:-2], entries[-2:])
    code, out, err = command(capsys, "verify", "draws", run.public, "--run", RUN)

    assert (code, err) == (0, "")
    assert f"{len(entries)} entries, chained; {len(entries) - 2} of them under a signed manifest" in out
    assert "2, of which 1 are revealed" in out
    assert "2 probation" in out
    assert "0 units by volunteers, 2 by auditors: 100.0 %" in out
    assert "--run" not in out


def test_draws_are_checked_over_the_network_too(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = published.copy(tmp_path / "public")
    entries = book_of(run).entries()
    write_log(run, entries, [])
    with serving(run.public) as server:
        code, out, err = command(capsys, "verify", "draws", server.url)

    assert (code, err) == (0, "")
    assert "2 probation" in out


def test_a_drawn_claim_that_was_spared_is_named(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = published.copy(tmp_path / "public")
    book = book_of(run)
    spared = book.claim(ADA)
    book.reveal(2)
    write_log(run, book.entries(), [])
    code, _, err = command(capsys, "verify", "draws", run.public, "--run", RUN)

    assert code == 1
    assert f"Claim {spared[:12]}" in err
    assert err.rstrip().endswith("[LOG_DIFFERS]")


@pytest.mark.parametrize("spoiled", ["head", "order", "history"])
def test_a_log_that_is_not_the_signed_one_is_refused(
    published: PublishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoiled: str
) -> None:
    run = published.copy(tmp_path / "public")
    entries = book_of(run).entries()
    write_log(run, entries, [])
    path = run.public / layout.log_path(1)
    lines = path.read_bytes().splitlines(keepends=True)
    if spoiled == "head":
        path.write_bytes(b"".join(lines[:-1]))
    elif spoiled == "order":
        path.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    else:
        run.forge(1, lambda found: replace(found, log_head="00" * 32))
        run.publish([run.manifest(1)])
    code, _, err = command(capsys, "verify", "draws", run.public, "--run", RUN)

    assert code == 1
    assert "LOG_DIFFERS" in err


# --- policy ----------------------------------------------------------------------------------------------------


def test_a_policy_says_what_it_lets_through_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "verify", "policy")

    assert code == 0
    assert re.search(r"gets merged until caught, expected +18\.0 +19\.0", out)
    assert re.search(r"in the long run +5\.0 % +5\.5 % +5\.2 %", out)


def test_settings_can_be_tried_out_but_not_on_a_signed_run(
    published: PublishedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "verify", "policy", "--set", "verification.floor=0.2")
    assert code == 0
    assert re.search(r"gets merged until caught, expected +4\.0 +4\.0", out)

    code, out, _ = command(capsys, "verify", "policy", published.public)
    assert code == 0
    assert "floor 5 %" in out

    code, _, err = command(capsys, "verify", "policy", published.public, "--set", "verification.floor=0.2")
    assert code == 2
    assert "signed" in err
    code, _, err = command(capsys, "verify", "policy", "--set", "verification.mode=none")
    assert code == 2
    assert "mode is none" in err


# --- the auditor's key -----------------------------------------------------------------------------------------


def test_an_auditors_key_is_made_and_its_public_half_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "auditor", "init", "--home", tmp_path / "auditor")
    again = command(capsys, "auditor", "init", "--home", tmp_path / "auditor")[1]

    assert code == 0
    public = re.search(r"public key: ([0-9a-f]{64})\n", out)
    assert public is not None
    assert PublicKey.from_hex(public[1]) == PrivateKey.load(tmp_path / "auditor/auditor.pem").public
    assert out == again


def test_an_auditor_without_a_delegation_says_who_makes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(capsys, "auditor", "init", "--home", tmp_path)
    join = f"cw1:127.0.0.1:1:{'ab' * 32}"
    code, _, err = command(capsys, "auditor", "start", "--join", join, "--home", tmp_path, "--json")

    assert code == 1
    assert "commonweight coordinator delegate" in err
