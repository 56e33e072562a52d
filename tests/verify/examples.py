"""A small run, really trained, merged and published, with the keys at hand so that tests can sign forgeries."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from diloco import NUMERICS
from diloco.average import average_round, average_share
from diloco.checkpoint import TensorFile, write_checkpoint
from diloco.container import Container, write_container
from diloco.genesis import initial_state
from diloco.merge import MergeFiles, MergeInput, OuterState, UnmergeInput, merge_round
from diloco.shards import Shard, ShardInfo, ShardSet, write_shard
from diloco.trail import merkle_root
from diloco.weigh import weigh_delta
from mmdit.conditioning import ConditioningConfig, encode_caption
from mmdit.config import MMDiTConfig
from mmdit.export import write_description
from mmdit.space import PixelSpace
from protocol import layout
from protocol.assignment import member_of, unit_id, unit_samples, unit_seed, unit_shards
from protocol.canonical import canonical_json, sha256_hex
from protocol.documents import (
    ArtifactLimit,
    Codec,
    DataSet,
    Delegation,
    FileEntry,
    Lease,
    Manifest,
    MergeEntry,
    OuterStep,
    Patch,
    Rounds,
    RunConfig,
    RunId,
    ShardRef,
    StateEntry,
    Training,
    UnitId,
    UnmergeEntry,
    Verification,
    digest_of,
    parse_payload,
    sign,
)
from protocol.envelope import parse_envelope
from protocol.keys import PrivateKey
from protocol.log import EMPTY_LOG_HEAD, LogEntry, log_line, next_head
from verify.plain_files import file_sha256
from verify.policy import ONE, weigh_seed
from verify.replay import codec_config, delta_schema, merge_rules, replay_unit
from verify.weights import Candidate, merge_weights

ROOT = PrivateKey.from_seed(b"\x01" * 32)
COORDINATOR = PrivateKey.from_seed(b"\x02" * 32)
STRANGER = PrivateKey.from_seed(b"\x05" * 32)
OWNERS = tuple(PrivateKey.from_seed(bytes([0x10 + number]) * 32) for number in range(3))
"""Unit (round, index) is trained by owner number `index`."""
RUN = RunId(ROOT.public.key_id)
SEED = bytes(range(32))

MODEL = MMDiTConfig(
    sample_size=4,
    patch_size=2,
    in_channels=1,
    out_channels=1,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=52,
    caption_projection_dim=16,
    pooled_projection_dim=8,
    pos_embed_max_size=2,
    qk_norm="rms_norm",
    dual_attention_layers=(),
)
CONDITIONING = ConditioningConfig(kind="byte-patch", max_tokens=4, token_dim=52, pooled_dim=8)
SPACE = PixelSpace(channels=1, height=4, width=4, shift=-1.0, scale=2.0)

MERGED_UNITS: tuple[tuple[tuple[int, int], ...], ...] = (((1, 0), (1, 1)), ((1, 2), (2, 0), (2, 1), (2, 2)))
"""Which (round, index) each checkpoint after 0 merges: unit (1, 2) came late."""

REPLAY = Verification(
    mode="replay",
    tolerance=1e-3,
    code_tolerance=0.02,
    probation=19,
    floor=838_861,
    referee_share=1_677_722,
    ramp=40,
    owner_cap=2**23,
    weighting="nnm-clip",
    hostile_share=6_710_886,
    unmerge_from=0.5,
    norm_bound=3.0,
    screen_triples=0,
    evidence_sha256=None,
)
UNCHECKED = replace(REPLAY, mode="none")


def shard_bytes(number: int) -> bytes:
    """A shard of 12 pictures, dark or light, with captions to match."""
    captions = [("dark", "light")[i % 2] for i in range(12)]
    texts, pooled = zip(*(encode_caption(caption, CONDITIONING) for caption in captions), strict=True)
    latent = np.array([(-0.5, 0.5)[i % 2] + 0.01 * number for i in range(12)], dtype=np.float16)
    pictures = np.broadcast_to(latent[:, None, None, None], (12, 1, 4, 4)).copy()
    return write_shard(pictures, list(texts), np.stack(pooled), ShardInfo(licence="CC0-1.0", source="made for a test"))


SHARDS = tuple(shard_bytes(number) for number in range(3))


def _shard_ref(content: bytes) -> ShardRef:
    return ShardRef(sha256=sha256_hex(content), size=len(content), samples=12, height=4, width=4)


def run_config(genesis_sha256: str, verification: Verification = REPLAY) -> RunConfig:
    """The run's config around the digest of its first weights."""
    return RunConfig(
        name="tiny",
        numerics=NUMERICS,
        verification=verification,
        seed=SEED.hex(),
        model=MODEL.to_diffusers(),
        conditioning={"kind": "byte-patch", "max_tokens": 4, "token_dim": 52, "pooled_dim": 8},
        space={"kind": "pixel", "channels": 1, "height": 4, "width": 4, "shift": -1.0, "scale": 2.0},
        data=DataSet(
            name="shades",
            source="made for a test",
            licence="CC0-1.0",
            root=merkle_root([bytes.fromhex(sha256_hex(content)) for content in SHARDS]).hex(),
            curator=None,
            manifest_sha256=None,
            shards=tuple(map(_shard_ref, SHARDS)),
            heldout=_shard_ref(shard_bytes(9)),
        ),
        training=Training(
            steps=6,
            short_steps=1,
            short_share=0,
            batch=4,
            lr=0.005,
            lr_final_share=0.5,
            warmup_steps=1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.01,
            grad_clip=1.0,
            text_dropout=6554,
            shift=1.0,
            segment_steps=3,
            precision="fp32",
            optimizer="adamw",
        ),
        codec=Codec(kind="dither", levels=1, block=256, reach=704, width=128),
        patch=Patch(kind="dead-zone", block=1024, threshold=256),
        outer=OuterStep(lr=0.7, momentum=0.9, ema_decay=0.9),
        rounds=Rounds(
            planned=2,
            units=3,
            shards_per_unit=2,
            max_bytes_per_unit=2**30,
            min_window_ms=0,
            min_units=2,
            staleness_bound=1,
            staleness_discount=2**23,
            lease_ms=60_000,
            upload_ms=60_000,
            stages=(),
        ),
        genesis_sha256=genesis_sha256,
        weights_licence="CC0-1.0",
        terms="Be kind.",
    )


def lease_of(config: RunConfig, round_number: int, index: int, base_sha256: str) -> Lease:
    """The lease of a unit, as a coordinator gives it."""
    unit = unit_id(digest_of(config), round_number, index)
    return Lease(
        run=RUN,
        config_sha256=digest_of(config),
        lease="1e" * 16,
        device="de" * 32,
        unit=unit,
        round=round_number,
        index=index,
        base_sha256=base_sha256,
        shards=unit_shards(config, round_number, index),
        takedowns_sha256=None,
        seed=unit_seed(unit),
        artifacts=(ArtifactLimit(role="delta", max_bytes=10**9),),
        duration_ms=60_000,
    )


def shards_of(lease: Lease) -> ShardSet:
    """The shards that a lease names."""
    by_digest = {sha256_hex(content): content for content in SHARDS}
    return ShardSet([Shard.open(by_digest[sha256]) for sha256 in lease.shards])


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """A run's public directory, and what its operator could do to it."""

    public: Path
    config: RunConfig

    def checkpoint(self, number: int) -> Path:
        """A checkpoint's directory."""
        return self.public / layout.checkpoint_directory(number)

    def manifest(self, number: int) -> Manifest:
        """A checkpoint's manifest, unverified."""
        raw = (self.checkpoint(number) / layout.MANIFEST).read_bytes()
        return parse_payload(Manifest, parse_envelope(raw, max_bytes=len(raw)).payload)

    def publish(self, manifests: Sequence[Manifest]) -> None:
        """Sign manifests as the coordinator, chained to each other, and put them in their places."""
        number = manifests[0].checkpoint
        previous = digest_of(self.manifest(number - 1)) if number else None
        for manifest in manifests:
            chained = replace(manifest, previous_manifest_sha256=previous)
            envelope = sign(chained, COORDINATOR)
            (self.checkpoint(chained.checkpoint) / layout.MANIFEST).write_bytes(envelope)
            (self.public / layout.LATEST).write_bytes(envelope)
            previous = digest_of(chained)

    def forge(self, number: int, change: Callable[[Manifest], Manifest]) -> None:
        """Change what a checkpoint's manifest says, and sign it and all later ones again."""
        later: list[Manifest] = []
        while (self.checkpoint(number + 1 + len(later)) / layout.MANIFEST).exists():
            later.append(self.manifest(number + 1 + len(later)))
        self.publish([change(self.manifest(number)), *later])

    def copy(self, target: Path) -> "PublishedRun":
        """A mirror that a test may spoil."""
        return PublishedRun(public=Path(shutil.copytree(self.public, target)), config=self.config)


def publish_run(
    public: Path,
    *,
    verification: Verification = REPLAY,
    merged_units: Sequence[Sequence[tuple[int, int]]] = MERGED_UNITS,
    taken_out: Mapping[int, Sequence[tuple[int, int]]] | None = None,
) -> PublishedRun:
    """Found, train, merge and publish the run under `public`.

    Args:
        merged_units: which (round, index) each checkpoint after 0 merges.
        taken_out: which (round, index) a checkpoint takes out again.
    """
    genesis = public / layout.checkpoint_directory(0)
    (genesis / layout.WEIGHTS).parent.mkdir(parents=True)
    written = write_checkpoint(genesis / layout.WEIGHTS, initial_state(MODEL, SEED))
    config = run_config(written.sha256.hex(), verification)
    run = PublishedRun(public=public, config=config)
    _write_papers(public, config)
    (public / "deltas").mkdir()
    run.publish([_manifest(run, 0, (), ())])
    before: dict[str, UnmergeEntry] = {}
    for number, units in enumerate(merged_units, start=1):
        merged = _merge_entries(run, number, [_train(run, *unit) for unit in units])
        out_again = [unit_id(digest_of(config), *unit) for unit in (taken_out or {}).get(number, ())]
        removed = tuple(before[unit] for unit in out_again)
        _merge(run, number, merged, removed)
        run.publish([_manifest(run, number, merged, removed)])
        before |= {entry.unit: _removal(entry, number) for entry in merged}
    return run


def _merge(run: PublishedRun, number: int, merged: Sequence[MergeEntry], removed: Sequence[UnmergeEntry]) -> None:
    base, place = run.checkpoint(number - 1), run.checkpoint(number)
    for path in (*layout.STATE, layout.PATCH):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
    weights = base / layout.WEIGHTS
    merge_round(
        OuterState(
            weights=weights,
            weights_sha256=bytes.fromhex(file_sha256(weights)),
            momentum=base / layout.MOMENTUM if number > 1 else None,
            residual=base / layout.RESIDUAL if number > 1 else None,
        ),
        [
            MergeInput(claim_digest=bytes.fromhex(entry.claim), container=_container(run, entry), weight=entry.weight)
            for entry in merged
        ],
        merge_rules(run.config),
        MergeFiles(
            weights=place / layout.WEIGHTS,
            momentum=place / layout.MOMENTUM,
            residual=place / layout.RESIDUAL,
            patch=place / layout.PATCH,
        ),
        unmerge=[
            UnmergeInput(
                container=_container(run, entry), weight=entry.weight, rounds_ago=number - 1 - entry.checkpoint
            )
            for entry in removed
        ],
    )
    (place / layout.EMA).parent.mkdir(exist_ok=True)
    average_round(
        base / layout.EMA if number > 1 else weights,
        place / layout.WEIGHTS,
        place / layout.EMA,
        average_share(run.config.outer.ema_decay, number),
    )


def _removal(entry: MergeEntry, checkpoint: int) -> UnmergeEntry:
    return UnmergeEntry(
        claim=entry.claim,
        unit=entry.unit,
        checkpoint=checkpoint,
        blob_sha256=entry.blob_sha256,
        content_sha256=entry.content_sha256,
        size=entry.size,
        weight=entry.weight,
        member=entry.member,
    )


def _write_papers(directory: Path, config: RunConfig) -> None:
    delegation = Delegation(run=RUN, role="coordinator", public_key=COORDINATOR.public.hex, not_after_ms=1)
    (directory / layout.ROOT_KEY).write_text(ROOT.public.hex + "\n")
    (directory / layout.DELEGATION).write_bytes(sign(delegation, ROOT))
    (directory / layout.RUN_CONFIG).write_bytes(sign(config, ROOT))


def _train(run: PublishedRun, round_number: int, index: int) -> tuple[Lease, Path, bytes]:
    weights = run.checkpoint(round_number - 1) / layout.WEIGHTS
    lease = lease_of(run.config, round_number, index, file_sha256(weights))
    _, encoded = replay_unit(run.config, lease, TensorFile.open(weights).load(), shards_of(lease), "cpu")
    temporary = run.public / "deltas" / "new"
    write_container(temporary, encoded, bytes.fromhex(lease.unit))
    path = temporary.rename(run.public / layout.delta_path(file_sha256(temporary)))
    return lease, path, encoded.content_digest()


def _merge_entries(
    run: PublishedRun, number: int, trained: Sequence[tuple[Lease, Path, bytes]]
) -> tuple[MergeEntry, ...]:
    entries = [
        MergeEntry(
            claim=sha256_hex(canonical_json(["a claim for", lease.unit])),
            unit=lease.unit,
            round=lease.round,
            blob_sha256=file_sha256(path),
            content_sha256=content.hex(),
            size=path.stat().st_size,
            weight=0,
            samples=unit_samples(run.config, UnitId(lease.unit)),
            member=member_of(RUN, OWNERS[lease.index].public.key_id),
            audited=False,
            influence=ONE,
            late=number - lease.round,
        )
        for lease, path, content in trained
    ]
    seed = _weigh_seed(run, number)
    weighings = None if seed is None else [weigh_delta(_container(run, each), bytes.fromhex(seed)) for each in entries]
    weights = merge_weights(
        [Candidate.of(entry) for entry in entries],
        rules=run.config.rounds,
        verification=run.config.verification,
        sketches=None if weighings is None else [weighing.sketch for weighing in weighings],
        norms2=None if weighings is None else [weighing.norm2 for weighing in weighings],
    )
    return tuple(replace(entry, weight=weight) for entry, weight in zip(entries, weights, strict=True))


def _weigh_seed(run: PublishedRun, number: int) -> str | None:
    if run.config.verification.mode == "none" or not number:
        return None
    return weigh_seed(b"a secret of this epoch, 32 bytes.", number).hex()


def _container(run: PublishedRun, entry: MergeEntry | UnmergeEntry) -> Container:
    path = run.public / layout.delta_path(entry.blob_sha256)
    return Container.open(path, delta_schema(run.config), codec_config(run.config), bytes.fromhex(entry.unit))


def _manifest(
    run: PublishedRun, number: int, merged: tuple[MergeEntry, ...], removed: tuple[UnmergeEntry, ...]
) -> Manifest:
    place = run.checkpoint(number)
    write_description(place, config=MODEL, conditioning=CONDITIONING, space=SPACE, ema=True)
    _write_papers(place, run.config)
    paths = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    roles = layout.STATE_ROLES
    return Manifest(
        run=RUN,
        config_sha256=digest_of(run.config),
        checkpoint=number,
        snapshot=number,
        previous_manifest_sha256=None,
        outer=run.config.outer,
        weigh_seed=_weigh_seed(run, number),
        merged=merged,
        unmerged=removed,
        files=tuple(
            FileEntry(path=path, sha256=file_sha256(place / path), size=(place / path).stat().st_size) for path in paths
        ),
        state=tuple(StateEntry(role=roles[path], path=path) for path in paths if path in roles),
        takedowns_sha256=None,
        log_position=number,
        log_head=_write_log(run, number),
    )


def _write_log(run: PublishedRun, number: int) -> str:
    """Write a log of one entry for each checkpoint but the first; return its head."""
    head = EMPTY_LOG_HEAD
    for position in range(1, number + 1):
        body = b'{"round":%d}' % position
        head = next_head(head, "closed", body)
        path = run.public / layout.log_path(position)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(log_line(LogEntry(position=position, kind="closed", body=body, head=head)))
    return head.hex()
