import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from diloco.container import expected_header
from diloco.frames import FRAME, write_frames
from protocol import layout
from protocol.documents import Artifact
from protocol.errors import (
    BytesRefused,
    ContentMismatch,
    DeltaCodeIllegal,
    DeltaNotFinite,
    DeltaOversized,
    DeltaSchemaMismatch,
    DeltaStreamCorrupt,
    DeltaTruncated,
    DigestMismatch,
)
from tests.verify.examples import PublishedRun
from verify.admission import admit_delta
from verify.plain_files import file_sha256
from verify.replay import codec_config, delta_schema


@pytest.fixture
def delta(published: PublishedRun, tmp_path: Path) -> "Received":
    return Received(published, tmp_path / "delta")


class Received:
    """A delta that a test spoils: its bytes, and the claim that fits them unless the test keeps the old one."""

    def __init__(self, run: PublishedRun, path: Path) -> None:
        self.config = run.config
        self.schema, self.codec = delta_schema(run.config), codec_config(run.config)
        entry = run.manifest(1).merged[0]
        self.unit = entry.unit
        self.path = path
        self.raw = bytearray((run.public / layout.delta_path(entry.blob_sha256)).read_bytes())
        self.honest = Artifact(
            role="delta", content_sha256=entry.content_sha256, blob_sha256=entry.blob_sha256, size=entry.size
        )
        self.header = len(expected_header(self.schema, self.codec, bytes.fromhex(self.unit)))
        self.codes = self.header + 2 * sum(self.codec.num_blocks(spec.num_elements) for spec in self.schema.tensors)

    @contextmanager
    def content(self) -> Iterator[bytearray]:
        """Give the unpacked content to be spoilt, and pack it again as a writer would."""
        content = bytearray(zstandard.ZstdDecompressor().stream_reader(bytes(self.raw), read_across_frames=True).read())
        yield content
        write_frames(self.path, len(content), [content])
        self.raw = bytearray(self.path.read_bytes())

    def admit(self, *, unit: str | None = None) -> None:
        """Admit the bytes under a claim whose size and SHA-256 are theirs."""
        self.path.write_bytes(self.raw)
        artifact = replace(self.honest, blob_sha256=hashlib.sha256(self.raw).hexdigest(), size=len(self.raw))
        admit_delta(self.path, config=self.config, unit=unit or self.unit, artifact=artifact)


def test_an_honest_delta_is_admitted(delta: Received) -> None:
    delta.path.write_bytes(delta.raw)
    admit_delta(delta.path, config=delta.config, unit=delta.unit, artifact=delta.honest)


def test_an_honest_delta_that_another_compressor_packed_is_admitted_too(delta: Received) -> None:
    plain = zstandard.ZstdDecompressor().stream_reader(bytes(delta.raw), read_across_frames=True).read()
    assert len(plain) < FRAME
    packed = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(plain)
    delta.raw = delta.raw[:8] + len(packed).to_bytes(4, "little") + packed
    assert hashlib.sha256(delta.raw).hexdigest() != delta.honest.blob_sha256
    delta.admit()


def _truncate(delta: Received) -> None:
    del delta.raw[-1]


def _empty(delta: Received) -> None:
    delta.raw.clear()


def _append(delta: Received) -> None:
    delta.raw += b"\0"


def _no_table(delta: Received) -> None:
    delta.raw[0] ^= 1


def _no_frame(delta: Received) -> None:
    delta.raw[12] ^= 1


def _bomb(delta: Received) -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(2**27))
    delta.raw[8:] = len(bomb).to_bytes(4, "little") + bomb


def _uncompressed(delta: Received) -> None:
    with delta.content() as content:
        plain = content
    delta.raw = plain


def _other_length(delta: Received) -> None:
    with delta.content() as content:
        content += b"\0"


def _huge_header(delta: Received) -> None:
    with delta.content() as content:
        content[:8] = struct.pack("<Q", 66 * 2**20)


def _other_name(delta: Received) -> None:
    with delta.content() as content:
        position = content.index(b"norm_out")
        content[position : position + 4] = b"mron"


def _nan_scale(delta: Received) -> None:
    with delta.content() as content:
        content[delta.header : delta.header + 2] = b"\xc0\x7f"


def _infinite_scale(delta: Received) -> None:
    with delta.content() as content:
        content[delta.codes - 2 : delta.codes] = b"\x80\x7f"


def _negative_scale(delta: Received) -> None:
    with delta.content() as content:
        content[delta.header + 1] |= 0x80


def _illegal_code(delta: Received) -> None:
    with delta.content() as content:
        content[delta.codes] = delta.codec.packing.values


def _illegal_last_code(delta: Received) -> None:
    with delta.content() as content:
        content[-1] = 0xFF


def _padding(delta: Received) -> None:
    assert delta.schema.tensors[-1].num_elements % delta.codec.packing.digits
    with delta.content() as content:
        content[-1] = 0


def _other_content(delta: Received) -> None:
    with delta.content() as content:
        content[delta.codes] = (content[delta.codes] + 1) % delta.codec.packing.values


SPOILED = [
    pytest.param(_truncate, DeltaTruncated, id="one byte too short"),
    pytest.param(_empty, DeltaTruncated, id="empty"),
    pytest.param(_append, DeltaOversized, id="one byte too long"),
    pytest.param(_no_table, DeltaStreamCorrupt, id="no table of frames"),
    pytest.param(_no_frame, DeltaStreamCorrupt, id="a frame that is none"),
    pytest.param(_bomb, DeltaStreamCorrupt, id="a stream of 128 MB"),
    pytest.param(_uncompressed, DeltaStreamCorrupt, id="not compressed"),
    pytest.param(_other_length, DeltaStreamCorrupt, id="one byte of content too many"),
    pytest.param(_huge_header, DeltaSchemaMismatch, id="a header of 66 MB"),
    pytest.param(_other_name, DeltaSchemaMismatch, id="a tensor of another name"),
    pytest.param(_nan_scale, DeltaNotFinite, id="NaN"),
    pytest.param(_infinite_scale, DeltaNotFinite, id="infinity in the last scale"),
    pytest.param(_negative_scale, DeltaCodeIllegal, id="a negative scale"),
    pytest.param(_illegal_code, DeltaCodeIllegal, id="a byte that no encoder writes"),
    pytest.param(_illegal_last_code, DeltaCodeIllegal, id="such a byte at the very end"),
    pytest.param(_padding, DeltaCodeIllegal, id="padding that is not zero"),
    pytest.param(_other_content, ContentMismatch, id="another content than claimed"),
]


@pytest.mark.parametrize(("spoil", "refusal"), SPOILED)
def test_a_delta_that_is_not_right_is_refused_even_if_its_claim_fits_its_bytes(
    delta: Received, spoil: Callable[[Received], None], refusal: type[BytesRefused]
) -> None:
    spoil(delta)
    with pytest.raises(refusal):
        delta.admit()


def test_a_delta_of_another_unit_is_refused(delta: Received) -> None:
    with pytest.raises(DeltaSchemaMismatch, match="made for another unit"):
        delta.admit(unit="ab" * 32)


def test_bytes_that_differ_from_the_claim_are_refused_before_their_content_is_read(delta: Received) -> None:
    _nan_scale(delta)
    delta.path.write_bytes(delta.raw)
    with pytest.raises(DigestMismatch):
        admit_delta(
            delta.path, config=delta.config, unit=delta.unit, artifact=replace(delta.honest, size=len(delta.raw))
        )


@pytest.mark.parametrize(("more", "refusal"), [(1, DeltaTruncated), (-1, DeltaOversized)])
def test_a_size_other_than_claimed_is_refused_with_both_numbers(
    delta: Received, more: int, refusal: type[BytesRefused]
) -> None:
    delta.path.write_bytes(delta.raw)
    size = len(delta.raw)
    with pytest.raises(refusal, match=f"has {size:,} bytes; its claim says {size + more:,}"):
        admit_delta(delta.path, config=delta.config, unit=delta.unit, artifact=replace(delta.honest, size=size + more))


def test_a_files_digest_is_read_in_chunks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
