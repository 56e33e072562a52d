"""One example of every signed document, with keys from fixed seeds, so that golden bytes can be compared."""

from protocol.documents import (
    Artifact,
    ArtifactLimit,
    BytesReceipt,
    Claim,
    ClaimReceipt,
    Codec,
    Counted,
    DataSet,
    DatasetManifest,
    Delegation,
    DeviceDelegation,
    Document,
    Endpoint,
    FileEntry,
    Lease,
    Manifest,
    MergeEntry,
    Opinion,
    OuterStep,
    OwnerRevocation,
    Patch,
    PreparedShard,
    Rounds,
    RunConfig,
    RunId,
    SessionProof,
    ShardRef,
    Stage,
    StateEntry,
    Takedown,
    Takedowns,
    Training,
    UnmergeEntry,
    Verdict,
    Verification,
    digest_of,
)
from protocol.keys import PrivateKey

ROOT = PrivateKey.from_seed(b"\x01" * 32)
COORDINATOR = PrivateKey.from_seed(b"\x02" * 32)
OWNER = PrivateKey.from_seed(b"\x03" * 32)
DEVICE = PrivateKey.from_seed(b"\x04" * 32)
STRANGER = PrivateKey.from_seed(b"\x05" * 32)
AUDITOR = PrivateKey.from_seed(b"\x06" * 32)

RUN = RunId(ROOT.public.key_id)
CERTIFICATE = "c0" * 32
NOW_MS = 1_800_000_000_000
LATER_MS = NOW_MS + 3_600_000


def run_config(*, shards: int = 5, shards_per_unit: int = 2, units: int = 4, planned: int = 11) -> RunConfig:
    """A complete run config; its model objects need not be real, since `protocol` does not read them."""
    return RunConfig(
        name="example",
        numerics=1,
        verification=Verification(
            mode="replay",
            tolerance=1e-3,
            code_tolerance=1e-3,
            probation=19,
            floor=838_861,
            referee_share=1_677_722,
            ramp=40,
            owner_cap=2**22,
            weighting="nnm-clip",
            hostile_share=6_710_886,
            unmerge_from=0.5,
            norm_bound=3.0,
            screen_triples=64,
            evidence_sha256="e7" * 32,
        ),
        seed="5e" * 32,
        model={"_class_name": "SD3Transformer2DModel", "num_layers": 4, "dual_attention_layers": []},
        conditioning={"kind": "byte-patch", "max_tokens": 8},
        space={"kind": "pixel", "shift": -1, "scale": 2.5},
        data=DataSet(
            name="digits",
            source="scikit-learn",
            licence="CC-BY-4.0",
            root="7e" * 32,
            curator="c5" * 32,
            manifest_sha256="da" * 32,
            shards=tuple(
                ShardRef(sha256=f"{k:02x}" * 32, size=1000 + k, samples=100, height=8, width=8) for k in range(shards)
            ),
            heldout=ShardRef(sha256="fe" * 32, size=500, samples=50, height=8, width=8),
        ),
        training=Training(
            steps=60,
            short_steps=1,
            short_share=0,
            batch=32,
            lr=0.002,
            lr_final_share=0.1,
            warmup_steps=5,
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decay=0.0,
            grad_clip=1.0,
            text_dropout=6554,
            shift=1.0,
            segment_steps=20,
            precision="fp32",
            optimizer="adamw",
        ),
        codec=Codec(kind="dither", levels=7, block=256, reach=1280, width=256),
        patch=Patch(kind="dead-zone", block=1024, threshold=256),
        outer=OuterStep(lr=0.7, momentum=0.9, ema_decay=0.9),
        rounds=Rounds(
            planned=planned,
            units=units,
            shards_per_unit=shards_per_unit,
            max_bytes_per_unit=2**30,
            min_window_ms=0,
            min_units=4,
            staleness_bound=3,
            staleness_discount=2**23,
            lease_ms=60_000,
            upload_ms=60_000,
            stages=(Stage(first_round=1, side=8),),
        ),
        genesis_sha256="9e" * 32,
        weights_licence="CC0-1.0",
        terms="Be kind.",
    )


CONFIG = run_config()
CONFIG_SHA256 = digest_of(CONFIG)
ARTIFACT = Artifact(role="delta", content_sha256="ca" * 32, blob_sha256="b1" * 32, size=123_456)
LEASE = Lease(
    run=RUN,
    config_sha256=CONFIG_SHA256,
    lease="1e" * 16,
    device=DEVICE.public.key_id,
    unit="a1" * 32,
    round=1,
    index=0,
    base_sha256="ba" * 32,
    shards=("00" * 32, "01" * 32),
    takedowns_sha256="7d" * 32,
    seed="5e" * 32,
    artifacts=(ArtifactLimit(role="delta", max_bytes=123_456),),
    duration_ms=60_000,
)
CLAIM = Claim(
    run=RUN,
    lease=LEASE.lease,
    lease_sha256=digest_of(LEASE),
    unit=LEASE.unit,
    device=DEVICE.public.key_id,
    artifacts=(ARTIFACT,),
    trail_root="7a" * 32,
    salt="5a" * 32,
    samples=1920,
    loss=0.125,
    trainer_version="commonweight 0.1.0",
    device_class="cpu-x86_64-avx2-torch2.13-t1",
)
DELEGATION = Delegation(run=RUN, role="coordinator", public_key=COORDINATOR.public.hex, not_after_ms=LATER_MS)
AUDITOR_DELEGATION = Delegation(run=RUN, role="auditor", public_key=AUDITOR.public.hex, not_after_ms=LATER_MS)
ENDPOINT = Endpoint(
    run=RUN, certificate_sha256=CERTIFICATE, public_url="http://example.org:8080/run", not_after_ms=LATER_MS
)
CLAIM_RECEIPT = ClaimReceipt(
    run=RUN,
    claim=digest_of(CLAIM),
    epoch=1,
    log_position=7,
    sketch_seed="5c" * 32,
    audit_share=2**24,
    secret_sha256="5e" * 32,
)
BYTES_RECEIPT = BytesReceipt(run=RUN, claim=digest_of(CLAIM), artifacts=(ARTIFACT,), log_position=8)
VERDICT = Verdict(
    run=RUN,
    claim=digest_of(CLAIM),
    unit=LEASE.unit,
    outcome="accepted",
    code="MERGED",
    sentence="Merged into checkpoint 1.",
    weight=2**22,
    checkpoint=1,
)
OPINION = Opinion(
    run=RUN,
    claim=digest_of(CLAIM),
    unit=LEASE.unit,
    auditor=AUDITOR.public.key_id,
    finding="confirmed",
    raw_difference=1.5e-6,
    code_difference=0.0,
    trail_agrees=False,
    content_sha256="ca" * 32,
    seconds=12.5,
    trainer_version="commonweight 0.1.0",
    device_class="cpu-x86_64-avx2-torch2.13-t1",
)
MANIFEST = Manifest(
    run=RUN,
    config_sha256=CONFIG_SHA256,
    checkpoint=2,
    snapshot=0,
    previous_manifest_sha256="0a" * 32,
    outer=CONFIG.outer,
    weigh_seed="5d" * 32,
    merged=(
        MergeEntry(
            claim=digest_of(CLAIM),
            unit=LEASE.unit,
            round=1,
            blob_sha256=ARTIFACT.blob_sha256,
            content_sha256=ARTIFACT.content_sha256,
            size=ARTIFACT.size,
            weight=2**24,
            samples=1920,
            member="3e" * 32,
            audited=True,
            influence=2**24,
            late=1,
        ),
    ),
    unmerged=(
        UnmergeEntry(
            claim="c1" * 32,
            unit="a2" * 32,
            checkpoint=1,
            blob_sha256="b2" * 32,
            content_sha256="cb" * 32,
            size=ARTIFACT.size,
            weight=2**20,
            member="3f" * 32,
        ),
    ),
    files=(FileEntry(path="transformer/weights.safetensors", sha256="fa" * 32, size=1),),
    state=(StateEntry(role="weights", path="transformer/weights.safetensors"),),
    takedowns_sha256="7d" * 32,
    log_position=9,
    log_head="4e" * 32,
)

_PREPARED = PreparedShard(
    sha256="5a" * 32,
    size=1000,
    samples=100,
    height=8,
    width=8,
    licences=(Counted(name="CC-BY-4.0", pictures=100),),
)

EXAMPLES: tuple[Document, ...] = (
    DELEGATION,
    DeviceDelegation(owner_public_key=OWNER.public.hex, device_public_key=DEVICE.public.hex),
    OwnerRevocation(owner_public_key=OWNER.public.hex),
    ENDPOINT,
    SessionProof(
        run=RUN,
        certificate_sha256=CERTIFICATE,
        nonce="0e" * 32,
        numerics=1,
        trainer_version="commonweight 0.1.0",
        device_class="cpu-x86_64-avx2-torch2.13-t1",
        terms_sha256=CONFIG.terms_sha256,
    ),
    CONFIG,
    LEASE,
    CLAIM,
    CLAIM_RECEIPT,
    BYTES_RECEIPT,
    VERDICT,
    OPINION,
    MANIFEST,
    DatasetManifest(
        name="digits",
        source="scikit-learn",
        licence="CC-BY-4.0",
        encoder={"conditioning": {"kind": "byte-patch", "max_tokens": 8}, "space": {"kind": "pixel"}},
        root="7e" * 32,
        shards=(_PREPARED,),
        heldout=_PREPARED,
        skipped=(Counted(name="corrupt", pictures=3),),
    ),
    Takedowns(run=RUN, entries=(Takedown(shard="00" * 32, sample=3, from_round=2, reason="its maker asked for it"),)),
)
"""One of each, in the order of `protocol.documents.DOCUMENTS`."""
