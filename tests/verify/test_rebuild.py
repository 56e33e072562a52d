import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import zstandard

from diloco import NUMERICS
from diloco.frames import write_frames
from mmdit.export import load_checkpoint
from protocol import layout
from protocol.assignment import member_of, unit_id
from protocol.documents import FileEntry, Manifest, MergeEntry, RunId, Takedown, Takedowns, digest_of, sign
from protocol.errors import (
    BytesRefused,
    CheckpointCorrupt,
    DeltasPruned,
    DigestMismatch,
    DirectoryNotEmpty,
    NumericsMismatch,
    RebuildDiffers,
    UsageError,
    WrongRun,
)
from tests.verify.examples import COORDINATOR, OWNERS, ROOT, RUN, STRANGER, UNCHECKED, PublishedRun, publish_run
from verify.plain_files import file_sha256
from verify.rebuild import RebuiltRound, rebuild


@pytest.fixture
def mirror(published: PublishedRun, tmp_path: Path) -> PublishedRun:
    return published.copy(tmp_path / "mirror")


def test_a_run_is_rebuilt_to_the_same_bytes(published: PublishedRun, tmp_path: Path) -> None:
    rounds: list[RebuiltRound] = []
    report = rebuild(published.public, tmp_path / "out", rounds.append, run=RUN)
    weights = [file_sha256(published.checkpoint(number) / layout.WEIGHTS) for number in range(3)]
    assert [(r.checkpoint, r.last, r.deltas, r.weights_sha256) for r in rounds] == [
        (1, 2, 2, weights[1]),
        (2, 2, 4, weights[2]),
    ]
    assert (report.run, report.checkpoint, report.deltas, report.weights_sha256) == (RUN, 2, 6, weights[2])
    for path in (layout.WEIGHTS, layout.MOMENTUM, "transformer/config.json", "commonweight.json"):
        assert (tmp_path / "out" / path).read_bytes() == (published.checkpoint(2) / path).read_bytes()


def test_what_was_rebuilt_can_be_drawn_from_and_nothing_else_is_left(published: PublishedRun, tmp_path: Path) -> None:
    report = rebuild(published.public, tmp_path / "out")
    assert load_checkpoint(report.directory).config.num_layers == 2
    left = {path.relative_to(report.directory).as_posix() for path in report.directory.rglob("*") if path.is_file()}
    assert left == {
        *layout.STATE_ROLES, "transformer/config.json", "ema/config.json", "scheduler/scheduler_config.json",
        "commonweight.json",
    }  # fmt: skip


def test_only_manifests_deltas_and_the_first_weights_are_needed(mirror: PublishedRun, tmp_path: Path) -> None:
    for number in (1, 2):
        for entry in mirror.manifest(number).files:
            (mirror.checkpoint(number) / entry.path).unlink()
    (mirror.public / layout.LATEST).unlink()
    assert rebuild(mirror.public, tmp_path / "out", run=RUN).checkpoint == 2


def test_a_run_without_rounds_is_rebuilt_as_its_first_weights(mirror: PublishedRun, tmp_path: Path) -> None:
    mirror.publish([mirror.manifest(0)])
    report = rebuild(mirror.public, tmp_path / "out", run=RUN)
    assert (report.checkpoint, report.deltas, report.weights_sha256) == (0, 0, mirror.config.genesis_sha256)
    assert load_checkpoint(report.directory).config.num_layers == 2


def _refused(mirror: PublishedRun, tmp_path: Path, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        rebuild(mirror.public, tmp_path / "out", run=RUN)


# --- a mirror that is incomplete or damaged ------------------------------------------------------------------


def test_a_pruned_delta_is_named_before_anything_is_merged(mirror: PublishedRun, tmp_path: Path) -> None:
    entry = mirror.manifest(2).merged[0]
    (mirror.public / layout.delta_path(entry.blob_sha256)).unlink()
    _refused(mirror, tmp_path, DeltasPruned, f"{entry.blob_sha256}.* of checkpoint 2 is not there")
    assert not (tmp_path / "out").exists()


def test_a_pruned_run_is_rebuilt_from_the_checkpoint_that_the_refusal_names(
    mirror: PublishedRun, tmp_path: Path
) -> None:
    for entry in mirror.manifest(1).merged:
        (mirror.public / layout.delta_path(entry.blob_sha256)).unlink()
    _refused(mirror, tmp_path, DeltasPruned, "--from 1")
    report = rebuild(mirror.public, tmp_path / "out", start=1)
    newest = mirror.manifest(2)
    assert (report.checkpoint, report.deltas) == (2, len(newest.merged))
    assert file_sha256(tmp_path / "out" / layout.WEIGHTS) == newest.file(layout.WEIGHTS).sha256
    with pytest.raises(UsageError, match="no checkpoint 3"):
        rebuild(mirror.public, tmp_path / "other", start=3)
    rebuild(mirror.public, tmp_path / "copy", start=2)
    assert file_sha256(tmp_path / "copy" / layout.MOMENTUM) == newest.file(layout.MOMENTUM).sha256
    assert (mirror.checkpoint(2) / layout.MOMENTUM).exists()


def test_a_damaged_delta_is_named(mirror: PublishedRun, tmp_path: Path) -> None:
    path = mirror.public / layout.delta_path(mirror.manifest(1).merged[0].blob_sha256)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x10
    path.write_bytes(raw)
    _refused(mirror, tmp_path, DigestMismatch, path.name)


def test_damaged_first_weights_are_named(mirror: PublishedRun, tmp_path: Path) -> None:
    path = mirror.checkpoint(0) / layout.WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    _refused(mirror, tmp_path, CheckpointCorrupt, "000000.*does not have the SHA-256")


def test_a_missing_manifest_is_named(mirror: PublishedRun, tmp_path: Path) -> None:
    (mirror.checkpoint(1) / layout.MANIFEST).unlink()
    _refused(mirror, tmp_path, CheckpointCorrupt, r"000001/manifest\.json can't be read")


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointCorrupt, match=r"root\.pub"):
        rebuild(tmp_path / "empty", tmp_path / "out")


def test_nothing_is_written_over(mirror: PublishedRun, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    _refused(mirror, tmp_path, DirectoryNotEmpty, "nothing was overwritten")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_another_run_is_refused(mirror: PublishedRun, tmp_path: Path) -> None:
    with pytest.raises(WrongRun):
        rebuild(mirror.public, tmp_path / "out", run=RunId(STRANGER.public.key_id))


def test_other_numerics_are_refused_before_any_work(mirror: PublishedRun, tmp_path: Path) -> None:
    config = replace(mirror.config, numerics=NUMERICS + 1)
    (mirror.public / layout.RUN_CONFIG).write_bytes(sign(config, ROOT))
    _refused(mirror, tmp_path, NumericsMismatch, "install a newer Commonweight")


# --- a coordinator that signed what does not follow ----------------------------------------------------------

Change = Callable[[Manifest], Manifest]


def _with_file(path: str, sha256: str) -> Change:
    def change(manifest: Manifest) -> Manifest:
        files = tuple(replace(entry, sha256=sha256) if entry.path == path else entry for entry in manifest.files)
        return replace(manifest, files=files)

    return change


def _with_entry(position: int, **changes: object) -> Change:
    def change(manifest: Manifest) -> Manifest:
        entries = list(manifest.merged)
        entries[position] = replace(entries[position], **changes)  # type: ignore[arg-type]
        return replace(manifest, merged=tuple(entries))

    return change


def _swap_weights(manifest: Manifest) -> Manifest:
    first, second, *others = manifest.merged
    return replace(
        manifest,
        merged=(replace(first, weight=second.weight + 1), replace(second, weight=first.weight - 1), *others),
    )


def _drop_one(manifest: Manifest) -> Manifest:
    half = tuple(replace(entry, weight=2**24) for entry in manifest.merged[:1])
    return replace(manifest, merged=half)


def _count_for_nothing(manifest: Manifest) -> Manifest:
    return replace(manifest, merged=tuple(replace(entry, influence=0, weight=0) for entry in manifest.merged))


DIFFERENT: list[tuple[int, Change, str]] = [
    (1, _with_file(layout.WEIGHTS, "ab" * 32), "Checkpoint 1 does not follow from its deltas: its weights"),
    (2, _with_file(layout.WEIGHTS, "ab" * 32), "Checkpoint 2 does not follow from its deltas: its weights"),
    (2, _with_file(layout.MOMENTUM, "ab" * 32), "Checkpoint 2 does not follow from its deltas: its momentum"),
    (2, _with_file("transformer/config.json", "ab" * 32), "another transformer/config.json than the run config gives"),
    (0, _with_file(layout.WEIGHTS, "ab" * 32), "Checkpoint 0 does not hold the first weights"),
    (1, _swap_weights, "the rules give it 8388608"),
    (1, _drop_one, "Checkpoint 1 does not follow from its deltas"),
    (1, _count_for_nothing, "Checkpoint 1 does not follow from its deltas"),
    (2, _with_entry(0, weight=2**24), "the rules give it"),
    (2, _with_entry(0, round=2), "which is no unit of round 2"),
    (1, _with_entry(0, unit="ab" * 32), "which is no unit of round 1"),
    (1, _with_entry(0, samples=10**6), "counts 1000000 samples for unit"),
    (2, _with_entry(0, late=2), "of round 1 as 2 rounds late"),
    (2, _with_entry(0, influence=2**20), "the rules give it"),
    (2, _with_entry(1, member=member_of(RUN, OWNERS[2].public.key_id)), "the rules give it"),  # then over its cap
    (2, lambda manifest: replace(manifest, weigh_seed="5e" * 32), "the rules give it"),
    (2, lambda manifest: replace(manifest, weigh_seed=None), "does not say under which seed it was weighed"),
    (0, lambda manifest: replace(manifest, weigh_seed="5e" * 32), "names a seed for weighing, but was weighed without"),
    (1, lambda manifest: replace(manifest, merged=()), "Checkpoint 1 merged 0 deltas"),
    (
        1,
        lambda manifest: replace(manifest, outer=replace(manifest.outer, lr=0.8)),
        "with another outer step than the run config's",
    ),
    (
        1,
        lambda manifest: replace(manifest, merged=manifest.merged + manifest.merged[:1]),
        "Checkpoint 1 merged unit .* a second time",
    ),
]


@pytest.mark.parametrize(("number", "change", "said"), DIFFERENT)
def test_a_signed_manifest_that_does_not_follow_from_the_record_is_found(
    mirror: PublishedRun, tmp_path: Path, number: int, change: Change, said: str
) -> None:
    mirror.forge(number, change)
    _refused(mirror, tmp_path, RebuildDiffers, said)


def test_a_unit_merged_in_two_rounds_is_found(mirror: PublishedRun, tmp_path: Path) -> None:
    again = replace(mirror.manifest(1).merged[0], claim="ab" * 32)
    mirror.forge(2, lambda manifest: replace(manifest, merged=(*manifest.merged, again)))
    _refused(mirror, tmp_path, RebuildDiffers, "Checkpoint 2 merged unit .* a second time")


def test_work_of_a_later_round_is_found(mirror: PublishedRun, tmp_path: Path) -> None:
    mirror.forge(1, lambda manifest: replace(manifest, merged=(*manifest.merged, mirror.manifest(2).merged[-1])))
    _refused(mirror, tmp_path, RebuildDiffers, "which is no unit of round 2")


def test_work_beyond_the_staleness_bound_is_found(mirror: PublishedRun, tmp_path: Path) -> None:
    config = replace(mirror.config, rounds=replace(mirror.config.rounds, staleness_bound=0))
    _resign(mirror, config_change=lambda _: config)
    _refused(mirror, tmp_path, RebuildDiffers, "came 1 rounds late; the run merges work that is up to 0")


def _resign(mirror: PublishedRun, *, config_change: Callable[[object], object]) -> None:
    """Let the root sign another config, and the coordinator every manifest under it, with units named to match."""
    config = config_change(mirror.config)
    assert isinstance(config, type(mirror.config))
    (mirror.public / layout.RUN_CONFIG).write_bytes(sign(config, ROOT))
    old, new = digest_of(mirror.config), digest_of(config)
    renamed = {unit_id(old, r, i): unit_id(new, r, i) for r in (1, 2) for i in range(config.rounds.units)}

    def entry_under_new(entry: MergeEntry) -> MergeEntry:
        return replace(entry, unit=renamed[entry.unit])  # type: ignore[index]

    manifests = [
        replace(manifest, config_sha256=new, merged=tuple(map(entry_under_new, manifest.merged)))
        for manifest in map(mirror.manifest, range(3))
    ]
    mirror.publish(manifests)


def test_a_delta_that_the_rules_refuse_is_found_even_if_the_coordinator_signed_for_it(
    mirror: PublishedRun, tmp_path: Path
) -> None:
    entry = mirror.manifest(1).merged[0]
    path = mirror.public / layout.delta_path(entry.blob_sha256)
    plain = bytearray(zstandard.ZstdDecompressor().stream_reader(path.read_bytes(), read_across_frames=True).read())
    plain[-1] = 0xFF  # no five trits
    write_frames(path, len(plain), [plain])
    illegal = path.rename(mirror.public / layout.delta_path(file_sha256(path)))
    mirror.forge(1, _with_entry(0, blob_sha256=file_sha256(illegal), size=illegal.stat().st_size))
    with pytest.raises(BytesRefused, match=illegal.name) as caught:
        rebuild(mirror.public, tmp_path / "out", run=RUN)
    assert caught.value.code == "DELTA_CODE_ILLEGAL"


@pytest.mark.parametrize("snapshot", [0, 2])
def test_a_snapshot_that_is_not_there_yet_or_older_than_the_last_one_is_found(
    mirror: PublishedRun, tmp_path: Path, snapshot: int
) -> None:
    mirror.forge(2 if snapshot == 0 else 1, lambda manifest: replace(manifest, snapshot=snapshot))
    _refused(mirror, tmp_path, RebuildDiffers, f"names {snapshot} as the newest one that is kept whole")


def test_a_broken_chain_of_manifests_is_found(mirror: PublishedRun, tmp_path: Path) -> None:
    changed = replace(mirror.manifest(1), log_head="ab" * 32)
    (mirror.checkpoint(1) / layout.MANIFEST).write_bytes(sign(changed, COORDINATOR))
    _refused(mirror, tmp_path, RebuildDiffers, "checkpoint 2 does not follow on the one before it")


def test_two_manifests_of_one_checkpoint_are_found(mirror: PublishedRun, tmp_path: Path) -> None:
    other = replace(mirror.manifest(2), log_head="ab" * 32)
    (mirror.public / layout.LATEST).write_bytes(sign(other, COORDINATOR))
    _refused(mirror, tmp_path, RebuildDiffers, "two different manifests of one checkpoint")


def test_a_manifest_in_the_place_of_another_is_found(mirror: PublishedRun, tmp_path: Path) -> None:
    shutil.copyfile(mirror.checkpoint(2) / layout.MANIFEST, mirror.checkpoint(1) / layout.MANIFEST)
    _refused(mirror, tmp_path, RebuildDiffers, "In the place of checkpoint 1 lies the manifest of 2")


def test_a_run_that_does_not_start_from_rest_is_found(mirror: PublishedRun, tmp_path: Path) -> None:
    momentum = mirror.manifest(1).state_file(layout.ROLE_MOMENTUM)
    assert momentum is not None
    state = next(part for part in mirror.manifest(1).state if part.role == layout.ROLE_MOMENTUM)
    mirror.forge(
        0,
        lambda manifest: replace(
            manifest,
            files=(*manifest.files, FileEntry(path=momentum.path, sha256=momentum.sha256, size=momentum.size)),
            state=(*manifest.state, state),
        ),
    )
    _refused(mirror, tmp_path, RebuildDiffers, "starts with a momentum")


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b"round", b"raund"),
        lambda raw: b"",
        lambda raw: raw + raw,
        lambda raw: b"{}",
        lambda raw: b"\xff",
    ],
)
def test_a_log_that_does_not_lead_to_the_signed_head_is_found(
    mirror: PublishedRun, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = mirror.public / layout.log_path(2)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RebuildDiffers, match="log of checkpoint 2"):
        rebuild(mirror.public, tmp_path / "out")


# --- runs that replay nothing, and runs that took something out again ------------------------------------------


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    return publish_run(tmp_path_factory.mktemp("unchecked") / "public", verification=UNCHECKED)


@pytest.fixture(scope="module")
def mended(tmp_path_factory: pytest.TempPathFactory) -> PublishedRun:
    """Owner 1's first delta was merged into checkpoint 1 and is taken out by checkpoint 3."""
    return publish_run(
        tmp_path_factory.mktemp("mended") / "public",
        merged_units=(((1, 0), (1, 1), (1, 2)), ((2, 0), (2, 2)), ((2, 1), (3, 0), (3, 1), (3, 2))),
        taken_out={3: [(1, 1)]},
    )


def test_a_run_that_replays_nothing_is_weighed_by_samples_and_lateness(unchecked: PublishedRun, tmp_path: Path) -> None:
    report = rebuild(unchecked.public, tmp_path / "out", run=RUN)
    assert report.weights_sha256 == unchecked.manifest(2).file(layout.WEIGHTS).sha256
    assert {manifest.weigh_seed for manifest in map(unchecked.manifest, range(3))} == {None}
    mirror = unchecked.copy(tmp_path / "mirror")
    mirror.forge(2, _with_entry(1, influence=2**20))
    _refused(mirror, tmp_path / "refused", RebuildDiffers, "by a record, but the run keeps no records")


def test_what_was_taken_out_is_taken_out_again(mended: PublishedRun, tmp_path: Path) -> None:
    report = rebuild(mended.public, tmp_path / "out", run=RUN)
    assert (report.checkpoint, report.deltas, report.without, report.left_out) == (3, 9, None, 0)
    assert len(mended.manifest(3).unmerged) == 1
    assert file_sha256(tmp_path / "out" / layout.WEIGHTS) == mended.manifest(3).file(layout.WEIGHTS).sha256


def _with_removal(**changes: object) -> Change:
    def change(manifest: Manifest) -> Manifest:
        (entry,) = manifest.unmerged
        return replace(manifest, unmerged=(replace(entry, **changes),))  # type: ignore[arg-type]

    return change


@pytest.mark.parametrize(
    ("number", "change", "said"),
    [
        (3, lambda manifest: replace(manifest, unmerged=()), "Checkpoint 3 does not follow from its deltas"),
        (3, _with_removal(weight=1), "takes out claim .* which was not merged like that"),
        (3, _with_removal(checkpoint=2), "takes out claim .* which was not merged like that"),
        (3, _with_removal(claim="ab" * 32), "takes out claim .* which was not merged like that"),
        (3, lambda manifest: replace(manifest, unmerged=manifest.unmerged * 2), "takes out claim .* a second time"),
    ],
)
def test_a_delta_taken_out_otherwise_than_it_went_in_is_found(
    mended: PublishedRun, tmp_path: Path, number: int, change: Change, said: str
) -> None:
    mirror = mended.copy(tmp_path / "mirror")
    mirror.forge(number, change)
    _refused(mirror, tmp_path, RebuildDiffers, said)


def test_a_delta_that_is_taken_out_must_still_be_there(mended: PublishedRun, tmp_path: Path) -> None:
    mirror = mended.copy(tmp_path / "mirror")
    (entry,) = mirror.manifest(3).unmerged
    (mirror.public / layout.delta_path(entry.blob_sha256)).unlink()
    _refused(mirror, tmp_path, DeltasPruned, "of checkpoint 1 is not there.*--from 3")
    with pytest.raises(DeltasPruned, match=r"of checkpoint 3 is not there.*--from 3"):
        rebuild(mirror.public, tmp_path / "other", start=1)


# --- what if somebody had never taken part ---------------------------------------------------------------------


def _owner_key_id(number: int) -> str:
    return OWNERS[number].public.key_id


@pytest.mark.parametrize("name", [member_of(RUN, _owner_key_id(1)), _owner_key_id(1), OWNERS[1].public.hex])
def test_a_member_can_be_left_out_by_any_of_its_names(mended: PublishedRun, tmp_path: Path, name: str) -> None:
    rounds: list[RebuiltRound] = []
    report = rebuild(mended.public, tmp_path / "out", rounds.append, without=name)
    assert report.without == member_of(RUN, _owner_key_id(1))
    assert (report.deltas, report.left_out) == (6, 3)
    assert [done.deltas for done in rounds] == [2, 2, 2]
    assert report.weights_sha256 == rounds[-1].weights_sha256 == file_sha256(tmp_path / "out" / layout.WEIGHTS)
    assert report.weights_sha256 != mended.manifest(3).file(layout.WEIGHTS).sha256
    assert load_checkpoint(report.directory).config.num_layers == 2


def test_without_its_poisoner_a_run_is_the_run_of_the_others(published: PublishedRun, tmp_path: Path) -> None:
    """Owner 2 was merged into checkpoint 2 only: what the others did before must come out as published."""
    rounds: list[RebuiltRound] = []
    rebuild(published.public, tmp_path / "out", rounds.append, without=_owner_key_id(2))
    assert rounds[0].weights_sha256 == published.manifest(1).file(layout.WEIGHTS).sha256
    assert rounds[1].weights_sha256 != published.manifest(2).file(layout.WEIGHTS).sha256
    assert [done.deltas for done in rounds] == [2, 2]


def test_a_round_of_one_member_alone_leaves_the_momentum_to_move_on(tmp_path: Path) -> None:
    run = publish_run(tmp_path / "public", merged_units=(((1, 0),), ((2, 1),)))
    rounds: list[RebuiltRound] = []
    report = rebuild(run.public, tmp_path / "out", rounds.append, without=_owner_key_id(1))
    assert [done.deltas for done in rounds] == [1, 0]
    assert rounds[0].weights_sha256 == run.manifest(1).file(layout.WEIGHTS).sha256 != report.weights_sha256


def test_deltas_of_the_member_left_out_need_not_be_there(mended: PublishedRun, tmp_path: Path) -> None:
    mirror = mended.copy(tmp_path / "mirror")
    for number in (1, 2, 3):
        for entry in mirror.manifest(number).merged:
            if entry.member == member_of(RUN, _owner_key_id(1)):
                (mirror.public / layout.delta_path(entry.blob_sha256)).unlink()
    assert rebuild(mirror.public, tmp_path / "out", without=_owner_key_id(1)).left_out == 3


def test_only_a_member_of_the_run_can_be_left_out_and_only_from_before_it_came(
    published: PublishedRun, tmp_path: Path
) -> None:
    for name, start, said in (
        (STRANGER.public.hex, 0, "Nobody known as"),
        ("somebody", 0, "64 hex digits"),
        (_owner_key_id(0), 1, "part of checkpoint 1 already"),
    ):
        with pytest.raises(UsageError, match=said):
            rebuild(published.public, tmp_path / "out", without=name, start=start)
    assert rebuild(published.public, tmp_path / "out", without=_owner_key_id(2), start=1).left_out == 2


def take_down(mirror: PublishedRun, *lists: tuple[Takedown, ...]) -> None:
    """Let the manifests of checkpoints 1, 2 ... name these lists, each published."""
    for number, entries in enumerate(lists, start=1):
        digest = None
        if entries:
            takedowns = Takedowns(run=RUN, entries=entries)
            digest = digest_of(takedowns)
            path = mirror.public / layout.takedowns_path(digest)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(sign(takedowns, COORDINATOR))
        mirror.forge(number, partial(replace, takedowns_sha256=digest))


def test_lists_of_pictures_taken_down_may_grow_and_nothing_else(mirror: PublishedRun, tmp_path: Path) -> None:
    shard = mirror.config.data.shards[0].sha256
    first = Takedown(shard=shard, sample=0, from_round=2, reason="asked for")
    later = replace(first, sample=1, from_round=3)
    take_down(mirror, (first,), (first, later))
    rebuild(mirror.public, tmp_path / "grown")
    for number, (lists, words) in enumerate(
        (
            (((first,), ()), "was rewritten since"),
            (((first,), (replace(first, reason="another"),)), "was rewritten since"),
            (((first,), (first, replace(later, from_round=2))), "leased before that"),
            (((first, first), (first,)), "taken down twice"),
        )
    ):
        take_down(mirror, *lists)
        with pytest.raises(RebuildDiffers, match=words):
            rebuild(mirror.public, tmp_path / f"out-{number}")
    take_down(mirror, (first,), (first,))
    for path in (mirror.public / "takedowns").iterdir():
        path.unlink()
    with pytest.raises(CheckpointCorrupt, match="takedowns/"):
        rebuild(mirror.public, tmp_path / "missing")
