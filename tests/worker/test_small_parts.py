"""Keys, consent, locks, delays, hardware, events: the small rules that a volunteer would notice."""

import dataclasses
import io
import json
import re
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from diloco.container import largest_container
from protocol.documents import ArtifactLimit, DeviceDelegation, ShardRef, verify
from protocol.errors import (
    AnswerInvalid,
    ConsentNeeded,
    DeviceUnavailable,
    DirectoryInUse,
    DiskFull,
    KeyUnreadable,
    NetworksMissing,
)
from protocol.limits import MAX_TEXT_CHARACTERS
from tests.protocol.examples import LEASE, run_config
from tests.worker.small_config import small_config
from verify.hearing import refuse_unnamed
from verify.replay import codec_config, delta_schema
from worker import audit_progress, progress
from worker.audit_progress import AUDIT_EVENTS
from worker.backoff import DEFAULT_BACKOFF, as_asked_ms
from worker.consent import ensure_consent, reflow, terms_text
from worker.durable import disk_named, write_durably
from worker.hardware import device_class, resolve_device, resolve_threads
from worker.home import WorkerHome
from worker.identity import load_or_make_identity, read_revocation
from worker.materials import Materials
from worker.progress import (
    EVENTS,
    FILES,
    Downloaded,
    Event,
    Finished,
    Leased,
    Ready,
    Refused,
    Step,
    VerdictCame,
    Waiting,
)
from worker.reporters import JsonReporter, PlainReporter, TerminalReporter
from worker.trainer import train_unit


def test_keys_are_made_once_kept_private_and_found_again(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    first, second = load_or_make_identity(directory), load_or_make_identity(directory)

    assert first.owner.public == second.owner.public
    assert first.device.public == second.device.public
    assert first.owner.public != first.device.public
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())
    delegation = verify(DeviceDelegation, first.delegation_envelope, first.owner.public)
    assert delegation.device_public_key == first.device.public.hex
    assert read_revocation(directory, first).owner_public_key == first.owner.public.hex


@pytest.mark.parametrize("name", ["owner.pem", "device.pem"])
def test_a_lost_key_is_reported_and_never_replaced(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "keys"
    load_or_make_identity(directory)
    (directory / name).unlink()

    with pytest.raises(KeyUnreadable, match=name):
        load_or_make_identity(directory)
    assert not (directory / name).exists()


def test_a_crash_while_keys_are_made_leaves_no_half_identity(tmp_path: Path) -> None:
    draft = tmp_path / "keys.new"
    draft.mkdir()
    (draft / "owner.pem").write_text("half")

    load_or_make_identity(tmp_path / "keys")

    assert not draft.exists()


def test_changed_terms_are_asked_again_and_refusing_them_stores_nothing(tmp_path: Path) -> None:
    config = run_config()
    changed = dataclasses.replace(config, terms="Be kinder.")
    asked: list[str] = []

    def answer(*, yes: bool) -> "object":
        def ask(text: str) -> bool:
            asked.append(text)
            return yes

        return ask

    path = tmp_path / "consent/run.json"
    ensure_consent(path, config, accept_terms=False, ask=answer(yes=True))  # type: ignore[arg-type]
    ensure_consent(path, config, accept_terms=False, ask=None)
    with pytest.raises(ConsentNeeded):
        ensure_consent(path, changed, accept_terms=False, ask=answer(yes=False))  # type: ignore[arg-type]
    ensure_consent(path, config, accept_terms=False, ask=None)

    assert len(asked) == 2
    assert "Be kind." in asked[0]
    assert config.weights_licence in asked[0]
    assert "Be kinder." in asked[1]


def test_a_home_is_locked_until_its_worker_is_gone(tmp_path: Path) -> None:
    home = WorkerHome(tmp_path / "home")
    with home.lock(), pytest.raises(DirectoryInUse), home.lock():
        pass
    with home.lock():
        pass


def test_a_write_that_finds_the_disk_full_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    (tmp_path / "file.new").symlink_to("/dev/full")

    with pytest.raises(DiskFull, match=str(path)):
        write_durably(path, b"new")

    assert path.read_bytes() == b"old"
    write_durably(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="can't be written") as caught, disk_named(tmp_path):
        (tmp_path / "no" / "such").write_bytes(b"")
    assert not isinstance(caught.value, DiskFull)


@given(attempt=st.integers(0, 10_000), fraction=st.floats(0, 1, exclude_max=True), asked=st.integers(0, 10**9))
def test_delays_stay_between_what_was_asked_for_and_the_bound(attempt: int, fraction: float, asked: int) -> None:
    delay = DEFAULT_BACKOFF.delay_ms(attempt, fraction, at_least_ms=asked)

    assert min(asked, 300_000) <= delay <= min(asked, 300_000) + min(300_000, 1000 * 2 ** min(attempt, 32))


def test_the_bound_doubles_from_a_second_to_five_minutes() -> None:
    almost_one = 1 - 2**-40
    bounds = [round(DEFAULT_BACKOFF.delay_ms(attempt, almost_one) / 1000) for attempt in range(11)]

    assert bounds == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]


@pytest.mark.parametrize(
    ("asked", "waited"), [(-(2**70), 500), (0, 500), (499, 500), (7_000, 7_000), (300_001, 300_000), (2**70, 300_000)]
)
def test_a_time_to_wait_that_a_server_names_is_taken_within_reason(asked: int, waited: int) -> None:
    assert as_asked_ms(asked) == waited


def test_terms_are_shown_as_text_and_cannot_command_the_terminal() -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ered\r"
    config = run_config()
    shown = terms_text(
        dataclasses.replace(
            config,
            name="n" + evil,
            weights_licence="L" + evil + "\nsecond",
            terms="first\n\n" + evil + "second",
            data=dataclasses.replace(config.data, name="d" + evil, licence="l" + evil),
        )
    )
    lines = terms_text(config).count("\n") + 2
    assert shown.count("\n") == lines
    assert all(line.isprintable() for line in shown.split("\n"))
    assert "\n\n?]0;owned??[2J?31m?red second\n" in shown


def test_terms_are_broken_to_the_width_of_the_terminal_and_lists_stay_lists() -> None:
    text = "Title:\n\nOne two\nthree four\nfive.\n\n- an item\n- another item of some length\n  code\nSix."

    assert reflow(text, 20) == (
        "Title:\n\nOne two three four\nfive.\n\n- an item\n- another item of\n  some length\n  code\nSix."
    )


@pytest.mark.parametrize(
    ("mode", "said"), [("none", "Nobody trains a unit again"), ("replay", "excluded from this run; you can appeal")]
)
def test_consent_names_the_source_of_the_data_and_how_work_is_checked(
    mode: Literal["none", "replay"], said: str
) -> None:
    config = run_config()
    shown = terms_text(dataclasses.replace(config, verification=dataclasses.replace(config.verification, mode=mode)))

    assert config.data.source in shown
    assert said in shown


ENCODERS = {
    "kind": "encoders",
    "stored": False,
    "encoders": [{"name": "clip_l", "tokens": 77}, {"name": "t5\x1b", "tokens": 128}],
}
"""As in a run config whose shards hold captions alone."""


def test_consent_names_the_text_encoders_that_this_machine_would_run() -> None:
    config = run_config()
    asked = "- Your machine runs the run's text encoders besides: clip_l (77 tokens), t5? (128 tokens)."

    assert asked in terms_text(dataclasses.replace(config, conditioning=ENCODERS))
    assert "text encoders" not in terms_text(dataclasses.replace(config, conditioning={**ENCODERS, "stored": True}))
    assert "text encoders" not in terms_text(config)

    placed = terms_text(dataclasses.replace(config, conditioning={**ENCODERS, "source": "somebody/networks@1\x1b"}))
    assert "It needs their networks (to be had from somebody/networks@1?), which --components names" in placed


def test_who_has_no_text_encoders_is_told_where_they_are_to_be_had() -> None:
    config = dataclasses.replace(run_config(), conditioning={**ENCODERS, "source": "somebody/networks@1"})
    with pytest.raises(NetworksMissing, match=r"Get them from somebody/networks@1, and say with --components"):
        refuse_unnamed(config, named=False)
    refuse_unnamed(config, named=True)


def test_what_was_fetched_is_named_for_a_person() -> None:
    weights = "checkpoints/000003/transformer/diffusion_pytorch_model.safetensors"
    assert Downloaded(file=weights, bytes=2048, seconds=0.1).line() == (
        "Fetched the weights of checkpoint 3: 2.0 KiB in 0.1 s."
    )
    shard = f"shards/{'ab' * 32}.safetensors"
    assert Downloaded(file=shard, bytes=40960, seconds=2).line() == "Fetched a shard of 40.0 KiB in 2.0 s."


def test_a_verdict_names_the_unit_as_it_was_leased() -> None:
    verdict = VerdictCame(
        claim="c" * 64, unit="ab" * 32, round=1, index=0, outcome="accepted", code="MERGED", sentence="It was merged.",
        weight=1, checkpoint=1,
    )  # fmt: skip
    assert verdict.line() == "Round 1, unit 0 (abababababab) was accepted: It was merged. [MERGED]"
    gone = dataclasses.replace(verdict, round=None, index=None)
    assert gone.line() == "Unit abababababab was accepted: It was merged. [MERGED]"


def test_one_of_a_kind_is_not_told_as_many() -> None:
    ready = Ready(device="cpu", threads=1, repeatable=True, reason="", seconds=1.0)
    assert ready.line() == "Ready to train on cpu with 1 CPU thread."
    assert dataclasses.replace(ready, threads=2).line().endswith("with 2 CPU threads.")
    finished = Finished(
        reason="Done.", units=1, accepted=1, rejected=0, refused=0, waiting_units=1, bytes_up=0, bytes_down=0,
        seconds=1.0,
    )  # fmt: skip
    assert finished.line() == (
        "Done. 1 unit trained, 1 verdict heard (1 accepted, 0 rejected), 0 B up, 0 B down. "
        "1 finished unit waits on this disk, to be sent at the next start."
    )
    assert "4 units trained, 6 verdicts heard" in dataclasses.replace(finished, units=4, accepted=6).line()
    assert "4 units trained, 0 verdicts heard, 0 B up" in dataclasses.replace(finished, units=4, accepted=0).line()


def test_the_live_line_says_that_files_are_waited_for_and_nothing_is_live_before_the_first_unit() -> None:
    live = io.StringIO()
    terminal = TerminalReporter(Console(file=live, width=200, force_terminal=True), lambda: "12:00:00")
    terminal.report(Waiting(reason="nobody answers", code="UNREACHABLE", seconds=0.0))
    assert live.getvalue().strip() == "\x1b[33m12:00:00 Waiting: nobody answers [UNREACHABLE]\x1b[0m"
    lease = "l" * 32
    terminal.report(
        Leased(lease=lease, unit="u", round=1, index=2, steps=400, base_checkpoint=0, remaining_seconds=9.0)
    )
    terminal.report(Waiting(reason="no files", code="UNREACHABLE", seconds=30.0, part=FILES))
    time.sleep(0.3)
    terminal.close()

    assert re.search(r"waiting for files, next try in (30|29) s", live.getvalue())
    assert "/400" not in live.getvalue()
    assert live.getvalue().rindex("\x1b[?25h") > live.getvalue().rindex("\x1b[?25l")  # the cursor is shown again


def test_the_device_class_is_coarse_and_names_what_computes() -> None:
    described = device_class("cpu", 1)

    assert re.fullmatch(r"cpu-[a-z0-9_]+-[a-z0-9]+-torch\d+\.\d+-t1", described)
    assert len(described) <= MAX_TEXT_CHARACTERS


def test_threads_are_what_was_asked_for_or_all_there_are() -> None:
    assert resolve_threads(3) == 3
    assert resolve_threads(None) >= 1


def test_asking_for_a_gpu_that_is_not_there_names_the_way_out() -> None:
    import torch

    assert resolve_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert resolve_device("cuda") == resolve_device("auto") == "cuda"
    else:
        assert resolve_device("auto") == "cpu"
        with pytest.raises(DeviceUnavailable, match="--device cpu"):
            resolve_device("cuda")


def test_a_lease_that_allows_less_than_a_delta_may_have_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = small_config((ShardRef(sha256="ab" * 32, size=1, samples=1, height=8, width=8),), units=1, steps=1)
    most = largest_container(delta_schema(config), codec_config(config))

    def train(max_bytes: int) -> None:
        lease = replace(LEASE, artifacts=(ArtifactLimit(role="delta", max_bytes=max_bytes),))
        materials = Materials(base=tmp_path / "missing", shards=(tmp_path / "gone",), without=((),))
        train_unit(config, lease, materials, device="cpu", on_step=lambda *_: None)

    with pytest.raises(AnswerInvalid, match=f"allows less than the {most:,} bytes"):
        train(most - 1)
    with pytest.raises(FileNotFoundError):
        train(most)


def test_the_worker_connects_before_it_imports_torch() -> None:
    code = "import sys, worker.daemon; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize(("module", "events"), [(progress, EVENTS), (audit_progress, AUDIT_EVENTS)])
def test_every_event_and_each_of_its_fields_is_documented(module: ModuleType, events: tuple[type[Event], ...]) -> None:
    assert module.__doc__ is not None
    described = {
        name: set(re.findall(r"[a-z_]+", fields))
        for name, fields in re.findall(r"^    ([a-z_]+) +([a-z_, ]+)$", module.__doc__, re.MULTILINE)
    }
    assert described == {event.NAME: {field.name for field in dataclasses.fields(event)} for event in events}
    assert not {event.NAME for event in AUDIT_EVENTS} & {event.NAME for event in EVENTS}


def test_json_lines_are_one_object_each_and_go_silent_when_nobody_listens() -> None:
    stream = io.StringIO()
    reporter = JsonReporter(stream)
    reporter.report(Step(unit="u", round=1, step=2, steps=3, loss=0.5))
    assert json.loads(stream.getvalue()) == {
        "event": "step",
        "unit": "u",
        "round": 1,
        "step": 2,
        "steps": 3,
        "loss": 0.5,
    }

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    silent = JsonReporter(Gone())
    silent.report(Waiting(reason="x", code="", seconds=1))
    silent.report(Waiting(reason="x", code="", seconds=1))


def test_a_strangers_sentence_cannot_command_the_terminal() -> None:
    event = Refused(claim="c" * 64, unit="u", code="CODE", sentence="\x1b[2Jcleared\nand [red]painted[/red]")
    plain = io.StringIO()
    PlainReporter(plain, lambda: "12:00:00").report(event)
    live = io.StringIO()
    terminal = TerminalReporter(Console(file=live, width=200), lambda: "12:00:00")
    terminal.report(event)
    terminal.close()

    assert plain.getvalue().count("\n") == 1
    for shown in (plain.getvalue(), live.getvalue()):
        assert "\x1b[2J" not in shown
        assert "[red]painted[/red]" in shown


def test_what_is_said_twice_in_a_row_is_shown_once() -> None:
    stream = io.StringIO()
    reporter = PlainReporter(stream, lambda: "12:00:00")
    for seconds in (1.0, 2.0, 4.0):
        reporter.report(Waiting(reason="the coordinator is away", code="UNREACHABLE", seconds=seconds))

    assert stream.getvalue() == "12:00:00 Waiting 1 s: the coordinator is away [UNREACHABLE]\n"
