from dataclasses import replace

import pytest

from protocol import layout
from protocol.documents import FileEntry, Manifest, parse_payload, payload_of
from tests.protocol.examples import MANIFEST


def test_public_paths_are_fixed() -> None:
    digest = "ab" * 32
    assert layout.checkpoint_directory(7) == "checkpoints/000007"
    assert layout.checkpoint_directory(1_234_567) == "checkpoints/1234567"
    assert layout.shard_path(digest) == f"shards/{digest}.safetensors"
    assert layout.delta_path(digest) == f"deltas/{digest}.safetensors.zst"
    assert layout.log_path(7) == "log/000007.jsonl"
    assert layout.metrics_path(7) == "metrics/000007.json"


@pytest.mark.parametrize(
    "path",
    [layout.WEIGHTS, layout.MOMENTUM, layout.RUN_CONFIG, layout.ROOT_KEY, layout.DELEGATION, layout.CALIBRATION],
)
def test_every_file_of_a_checkpoint_can_be_listed_in_its_manifest(path: str) -> None:
    manifest = replace(MANIFEST, files=(FileEntry(path=path, sha256="ab" * 32, size=1),))
    assert parse_payload(Manifest, payload_of(manifest)).file(path).size == 1
