"""Is this file the delta that was claimed? Everything is checked before a byte of it counts."""

from pathlib import Path

from diloco.container import Container
from protocol.documents import Artifact, RunConfig
from protocol.errors import ContentMismatch, DeltaOversized, DeltaTruncated, DigestMismatch
from verify.plain_files import file_sha256
from verify.replay import codec_config, delta_schema


def admit_delta(
    path: Path, *, config: RunConfig, unit: str, artifact: Artifact, file_digest: str | None = None
) -> None:
    """Check a received delta against its claim and its run; return only if it may be merged.

    Checks: 0 the claimed size, 1 the digest of the file, 2 its frames and the header implied by schema, codec and unit,
    3 finite scales and legal codes, 4 the content digest. Memory does not grow with the file.

    Args:
        path: the received file; it must not change meanwhile.
        unit: the unit's id, 64 hex digits.
        artifact: what the claim committed to.
        file_digest: the file's SHA-256 in hex, if the caller hashed every byte while it was written; else it is read.

    Raises:
        DeltaTruncated, DeltaOversized: the file is shorter or longer than claimed, or than the schema allows.
        DigestMismatch: its bytes are not those of the claim.
        DeltaStreamCorrupt: it does not unpack to what the schema implies.
        DeltaSchemaMismatch: its header is not the implied one.
        DeltaNotFinite, DeltaCodeIllegal: it holds what no encoder writes.
        ContentMismatch: codes and scales are not those of the claim.
    """
    size = path.stat().st_size
    if size != artifact.size:  # 0
        kind = DeltaTruncated if size < artifact.size else DeltaOversized
        raise kind(f"The delta has {size:,} bytes; its claim says {artifact.size:,}.")
    if (file_digest or file_sha256(path)) != artifact.blob_sha256:  # 1
        raise DigestMismatch(f"The delta's bytes do not have the SHA-256 {artifact.blob_sha256[:12]} of its claim.")
    container = Container.open(path, delta_schema(config), codec_config(config), bytes.fromhex(unit))  # 2
    container.check_finite()  # 3
    if container.content_digest().hex() != artifact.content_sha256:  # 4
        raise ContentMismatch(
            f"The delta's codes and scales do not have the content digest {artifact.content_sha256[:12]} of its claim."
        )
