"""`init`: what a new run consists of, what it refuses, and that a founding that was killed can be done again."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from commonweight.digits import LICENCE, SOURCE, load_digits, shard_bytes, write_digits
from coordinator.directory import RunDirectory, RunIdentity
from coordinator.forecast import forecast
from coordinator.founding import delegate_auditor, found, renew
from coordinator.settings import Settings
from coordinator.signed import differences
from diloco.shards import ShardInfo, pack_shard, write_shard
from mmdit.export import load_checkpoint
from protocol import layout
from protocol.documents import Manifest
from protocol.errors import (
    ConfigInvalid,
    DelegationInvalid,
    DirectoryInUse,
    DirectoryNotEmpty,
    KeyUnreadable,
    LocalProblem,
    Refusal,
    ShardCorrupt,
)
from protocol.keys import PrivateKey
from protocol.limits import DAY_MS, DELEGATION_MS

NOW_MS = 1_800_000_000_000
Founding = Callable[..., RunIdentity]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    return write_digits(tmp_path_factory.mktemp("data"), shards=3)


@pytest.fixture
def founding(tmp_path: Path, data: tuple[list[Path], Path]) -> Founding:
    """Found a run in tmp_path/run; keyword arguments win over the usual ones."""

    def do(*overrides: str, name: str = "run", **changed: object) -> RunIdentity:
        shards, heldout = data
        usual: dict[str, object] = {
            "shards": shards,
            "heldout": heldout,
            "root_key_out": tmp_path / "root.pem",
            "seed": bytes(32),
            "now_ms": NOW_MS,
        }
        return found(RunDirectory(tmp_path / name), Settings.parse("", overrides), **usual | changed)  # type: ignore[arg-type]

    return do


def manifest_of(directory: RunDirectory) -> Manifest:
    return directory.trust().manifest((directory.checkpoint(0) / layout.MANIFEST).read_bytes())


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_checkpoint_0_is_published_whole_under_a_signed_manifest(founding: Founding, tmp_path: Path) -> None:
    identity = founding()
    directory = RunDirectory(tmp_path / "run")
    manifest = manifest_of(directory)
    files = contents(directory.checkpoint(0))
    assert {entry.path for entry in manifest.files} == files.keys() - {layout.MANIFEST}
    for entry in manifest.files:
        assert (hashlib.sha256(files[entry.path]).hexdigest(), len(files[entry.path])) == (entry.sha256, entry.size)
    weights, momentum = manifest.state_file(layout.ROLE_WEIGHTS), manifest.state_file(layout.ROLE_MOMENTUM)
    assert weights is not None
    assert weights.sha256 == identity.config.genesis_sha256
    assert momentum is None
    assert (manifest.checkpoint, manifest.merged, manifest.previous_manifest_sha256) == (0, (), None)
    assert (manifest.log_position, manifest.log_head) == (0, "0" * 64)
    assert (directory.public / layout.LATEST).read_bytes() == files[layout.MANIFEST]
    assert {layout.RUN_CONFIG, layout.ROOT_KEY, layout.DELEGATION} < files.keys()


def test_the_published_model_loads_and_is_the_one_of_the_run_config(founding: Founding, tmp_path: Path) -> None:
    identity = founding()
    loaded = load_checkpoint(RunDirectory(tmp_path / "run").checkpoint(0))
    assert loaded.config.to_diffusers() == identity.config.model
    assert dataclasses.asdict(loaded.conditioning) == identity.config.conditioning
    assert {"kind": "pixel", **dataclasses.asdict(loaded.space)} == identity.config.space


def test_the_shards_are_published_under_their_digests_in_the_given_order(
    founding: Founding, tmp_path: Path, data: tuple[list[Path], Path]
) -> None:
    config = founding().config
    shards, heldout = data
    for path, ref in zip([*shards, heldout], [*config.data.shards, config.data.heldout], strict=True):
        published = RunDirectory(tmp_path / "run").public / layout.shard_path(ref.sha256)
        assert published.read_bytes() == path.read_bytes()
        assert ref.size == path.stat().st_size
    assert sum(ref.samples for ref in config.data.shards) + config.data.heldout.samples == 1797


def test_the_same_seed_gives_the_same_first_weights_and_another_run(founding: Founding, tmp_path: Path) -> None:
    first = founding(name="a", root_key_out=tmp_path / "a.pem")
    second = founding(name="b", root_key_out=tmp_path / "b.pem")
    third = founding(name="c", root_key_out=tmp_path / "c.pem", seed=None)
    assert first.config == second.config
    assert len({first.run, second.run, third.run}) == 3
    assert first.config.genesis_sha256 != third.config.genesis_sha256


def test_run_toml_says_what_the_run_uses_and_an_operators_own_is_kept_beside_it(
    founding: Founding, tmp_path: Path
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.root.mkdir()
    directory.settings_file.write_text("[training]\nsteps = 20 # mine\n")
    identity = founding("training.steps=40")
    assert directory.settings().training.steps == 40
    assert differences(directory.settings(), identity.config) == ()
    assert (directory.root / "run.toml.old").read_text() == "[training]\nsteps = 20 # mine\n"


def test_a_run_toml_that_says_the_same_is_left_as_it_is(founding: Founding, tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.root.mkdir()
    directory.settings_file.write_text("[training]\nsteps = 40 # mine\n")
    founding("training.steps=40")
    assert directory.settings_file.read_text() == "[training]\nsteps = 40 # mine\n"


def test_a_run_is_never_founded_over_another(founding: Founding, tmp_path: Path) -> None:
    founding()
    before = contents(tmp_path)
    with pytest.raises(DirectoryNotEmpty, match="holds a run already"):
        founding(root_key_out=tmp_path / "other.pem")
    del before["run/lock"]
    assert before.items() <= contents(tmp_path).items()


def test_somebody_elses_folders_are_not_touched(founding: Founding, tmp_path: Path) -> None:
    (tmp_path / "run/public").mkdir(parents=True)
    (tmp_path / "run/public/index.html").write_text("mine")
    with pytest.raises(DirectoryNotEmpty, match="public"):
        founding()
    assert (tmp_path / "run/public/index.html").read_text() == "mine"
    assert not (tmp_path / "root.pem").exists()


def test_an_existing_root_key_is_never_overwritten(founding: Founding, tmp_path: Path) -> None:
    PrivateKey.from_seed(bytes(32)).save(tmp_path / "root.pem")
    before = (tmp_path / "root.pem").read_bytes()
    with pytest.raises(KeyUnreadable, match="--root-key"):
        founding()
    assert contents(tmp_path) == {"root.pem": before}
    with pytest.raises(KeyUnreadable, match="no directory"):
        founding(root_key_out=tmp_path / "missing/root.pem")


def test_two_foundings_do_not_share_a_directory(founding: Founding, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with RunDirectory(tmp_path / "run").lock(), pytest.raises(DirectoryInUse):
        founding()


def test_a_unit_may_not_ask_a_volunteer_for_more_than_the_run_allows(founding: Founding, tmp_path: Path) -> None:
    split = load_digits().train
    every = list(range(len(split.labels)))
    (tmp_path / "large").write_bytes(shard_bytes(split, every * 5))
    asked = ("rounds.shards_per_unit=1", "rounds.max_mib_per_unit=1")
    with pytest.raises(
        ConfigInvalid, match=r"can make a unit fetch 1,\d{3},\d{3} bytes, but rounds.max_mib_per_unit is 1"
    ):
        founding(*asked, shards=[tmp_path / "large"])
    assert founding(asked[0], "rounds.max_mib_per_unit=2", shards=[tmp_path / "large"], name="other")


def test_data_that_does_not_fit_the_settings_is_refused_with_both_values(
    founding: Founding, tmp_path: Path, data: tuple[list[Path], Path]
) -> None:
    shards, _ = data
    with pytest.raises(ConfigInvalid, match=r"rounds.shards_per_unit is 4, but the data has 3"):
        founding("rounds.shards_per_unit=4")
    with pytest.raises(ConfigInvalid, match="same file"):
        founding(heldout=shards[0])
    for width, length, sentence in (
        (52, 1, r"\(64, 64\), but odd has \(52, 64\)"),
        (64, 9, r"model.max_tokens is 8, but odd has a caption of 9 tokens"),
    ):
        text = np.zeros((length, width), np.float16)
        info = ShardInfo(licence=LICENCE, source=SOURCE)
        odd = write_shard(np.zeros((1, 1, 8, 8), np.float16), [text], np.zeros((1, 64), np.float16), info)
        (tmp_path / "odd").write_bytes(odd)
        with pytest.raises(ConfigInvalid, match=sentence):
            founding(shards=[*shards, tmp_path / "odd"])
    (tmp_path / "colour").write_bytes(
        pack_shard(np.zeros((1, 3, 8, 8), np.float16), ShardInfo(licence=LICENCE, source=SOURCE), captions=["red"])
    )
    with pytest.raises(ConfigInvalid, match=r"needs shards of 1 channels.*but colour has.*\(3, 8, 8\)"):
        founding(shards=[*shards, tmp_path / "colour"])
    other = write_shard(
        np.zeros((1, 1, 8, 8), np.float16),
        [np.zeros((1, 64), np.float16)],
        np.zeros((1, 64), np.float16),
        ShardInfo(licence="CC0-1.0", source="https://example.org"),
    )
    (tmp_path / "other").write_bytes(other)
    with pytest.raises(ConfigInvalid, match="describe your data"):
        founding(shards=[*shards, tmp_path / "other"])
    founding("data.source=https://example.org", "data.licence=CC0-1.0", shards=[*shards, tmp_path / "other"])


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("1:8 99999999:8", "Nobody could read this run"),
        ("1:8 99999999999999999999:8", "it must be pairs of a round and a side"),
        ("1:8 21:8", "has a stage from round 21 on, but rounds.planned is 20: it never comes"),
        ("1:8 2:64", "has a stage of 64 pixels a side from round 2 on, but 0 shards .* sides of about 8"),
    ],
)
def test_stages_that_nobody_could_train_are_refused_and_nothing_is_made(
    founding: Founding, tmp_path: Path, stages: str, words: str
) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        founding(f"rounds.stages={stages}")
    assert not (tmp_path / "run").exists()


def test_a_damaged_or_missing_shard_is_refused_and_nothing_is_made(
    founding: Founding, tmp_path: Path, data: tuple[list[Path], Path]
) -> None:
    shards, _ = data
    (tmp_path / "cut").write_bytes(shards[0].read_bytes()[:-1])
    for bad in (tmp_path / "cut", tmp_path / "missing"):
        with pytest.raises(ShardCorrupt, match=bad.name):
            founding(shards=[*shards, bad])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [None, "[training]\nsteps = 20 # mine\n"])
def test_a_founding_that_fails_leaves_what_was_there_before(
    founding: Founding, tmp_path: Path, words: str | None
) -> None:
    directory = RunDirectory(tmp_path / "run")
    if words is not None:
        directory.root.mkdir()
        directory.settings_file.write_text(words)
    # The export goes through a file beside the key: where that can't be written, founding fails late.
    (tmp_path / ".root.pem.part").mkdir()
    with pytest.raises(LocalProblem, match="No run was made"):
        founding("training.steps=40")
    if words is None:
        assert not directory.root.exists()
    else:
        assert contents(directory.root) == {"run.toml": words.encode()}
    (tmp_path / ".root.pem.part").rmdir()
    assert founding().run


@pytest.mark.slow
def test_a_killed_founding_leaves_a_whole_run_or_one_that_can_be_founded_again(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kill_founding.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert sum(answer["event"] == "os.rename" for answer in answers) >= 8
    assert {answer["killed"] for answer in answers} == {-9}
    assert {answer["whole"] for answer in answers} == {False, True}
    for answer in answers:
        place = Path(answer["place"])
        assert answer["again"] == 0, (answer, done.stderr)
        directory = RunDirectory(place / "run")
        identity = directory.identity()
        assert PrivateKey.load(place / "root.pem").public == identity.root_public
        for entry in manifest_of(directory).files:
            published = (directory.checkpoint(0) / entry.path).read_bytes()
            assert hashlib.sha256(published).hexdigest() == entry.sha256


def test_the_forecast_counts_what_a_round_really_writes(founding: Founding, tmp_path: Path) -> None:
    config = founding("rounds.planned=10", "rounds.units=6", "rounds.min_window_seconds=60").config
    expected = forecast(config, retain_rounds=0, snapshot_every=5)
    weights = (RunDirectory(tmp_path / "run").checkpoint(0) / layout.WEIGHTS).stat().st_size
    shards = [ref.size for ref in (*config.data.shards, config.data.heldout)]
    assert (expected.weights, expected.shards) == (weights, sum(shards))
    assert expected.state == 3 * weights
    assert expected.disk_per_round == expected.patch + expected.state // 5 + 6 * expected.delta
    # The first one, two snapshots, the last few rounds, and one that is being made.
    states = min(1 + 2 + expected.kept_states + 1, 11)
    assert expected.disk_in_all == sum(shards) + states * 3 * weights + 11 * expected.patch + 11 * 6 * expected.delta
    kept = forecast(config, retain_rounds=3, snapshot_every=5)
    assert expected.disk_in_all - kept.disk_in_all == 7 * 6 * expected.delta
    assert expected.uplink_per_round > 6 * weights
    assert "Mbit/s" in expected.lines()[3]
    assert "Mbit/s" not in dataclasses.replace(expected, min_window_seconds=0.0).lines()[3]


def test_the_root_key_renews_the_delegation_and_no_other_key_does(founding: Founding, tmp_path: Path) -> None:
    before = founding()
    later = NOW_MS + 365 * DAY_MS
    with pytest.raises(DelegationInvalid, match="root key of this run"):
        renew(RunDirectory(tmp_path / "run"), PrivateKey.generate(), now_ms=later)
    renewed = renew(RunDirectory(tmp_path / "run"), PrivateKey.load(tmp_path / "root.pem"), now_ms=later)
    after = RunDirectory(tmp_path / "run").identity()
    assert after.delegation == renewed
    assert after.delegation.not_after_ms - before.delegation.not_after_ms == 365 * DAY_MS
    assert after.coordinator.public == before.coordinator.public


# --- verification --------------------------------------------------------------------------------------------


def test_a_run_has_an_auditor_of_its_own_whom_the_root_delegated_and_renews(founding: Founding, tmp_path: Path) -> None:
    founding()
    directory = RunDirectory(tmp_path / "run")
    own = PrivateKey.load(directory.auditor_key).public
    after = NOW_MS + DELEGATION_MS + DAY_MS

    assert directory.trust().admit_auditor(directory.auditor_delegation.read_bytes(), now_ms=NOW_MS) == own
    with pytest.raises(DelegationInvalid, match="expired"):
        directory.trust().admit_auditor(directory.auditor_delegation.read_bytes(), now_ms=after)
    renew(directory, PrivateKey.load(tmp_path / "root.pem"), now_ms=NOW_MS + 30 * DAY_MS)
    assert directory.trust().admit_auditor(directory.auditor_delegation.read_bytes(), now_ms=after) == own
    assert directory.auditor_delegation.stat().st_mode & 0o777 == 0o600


def test_the_auditors_key_is_no_other_key_of_the_run(founding: Founding, tmp_path: Path) -> None:
    identity = founding()
    auditor = PrivateKey.load(RunDirectory(tmp_path / "run").auditor_key).public
    assert auditor not in {identity.root_public, identity.coordinator.public}


def test_the_root_key_and_no_other_lets_more_auditors_judge(founding: Founding, tmp_path: Path) -> None:
    founding()
    directory = RunDirectory(tmp_path / "run")
    another = PrivateKey.generate().public
    root = PrivateKey.load(tmp_path / "root.pem")
    envelope = delegate_auditor(directory, root, another.hex, now_ms=NOW_MS)
    assert directory.trust().admit_auditor(envelope, now_ms=NOW_MS) == another
    with pytest.raises(DelegationInvalid, match="root key of this run"):
        delegate_auditor(directory, PrivateKey.generate(), another.hex, now_ms=NOW_MS)
    with pytest.raises(Refusal):
        delegate_auditor(directory, root, "no key", now_ms=NOW_MS)


def test_the_calibration_that_the_tolerances_come_from_is_published_and_named_in_the_run_config(
    founding: Founding, tmp_path: Path
) -> None:
    calibration = b'{"measured": true}'
    named = f"verification.evidence_sha256={hashlib.sha256(calibration).hexdigest()}"
    identity = founding(named, calibration=calibration)
    assert identity.config.verification.evidence_sha256 == hashlib.sha256(calibration).hexdigest()
    assert (RunDirectory(tmp_path / "run").public / layout.CALIBRATION).read_bytes() == calibration


def test_without_a_calibration_no_evidence_is_named_or_published(founding: Founding, tmp_path: Path) -> None:
    assert founding().config.verification.evidence_sha256 is None
    assert not (RunDirectory(tmp_path / "run").public / layout.CALIBRATION).exists()


@pytest.mark.parametrize(
    ("named", "calibration", "sentence"),
    [
        ("a" * 64, None, r'is "aaaa.*but no calibration is given'),
        ("a" * 64, b"another", r'is "aaaa.*but the calibration given to --calibration has "ae448ac8'),
        (None, b"another", r"is not set, but the calibration given to --calibration has"),
    ],
)
def test_evidence_that_is_not_the_calibration_is_refused_and_nothing_is_made(
    founding: Founding, tmp_path: Path, named: str | None, calibration: bytes | None, sentence: str
) -> None:
    overrides = [] if named is None else [f"verification.evidence_sha256={named}"]
    with pytest.raises(ConfigInvalid, match=r"verification.evidence_sha256 " + sentence):
        founding(*overrides, calibration=calibration)
    assert not (tmp_path / "run").exists()
