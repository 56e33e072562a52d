import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from diloco.shards import Shard, ShardInfo, ShardSet, write_shard
from protocol.errors import ShardCorrupt
from tests.diloco.examples import INFO, shard_bytes, shard_set


def halves(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float16]]:
    return np.arange(int(np.prod(shape)), dtype=np.float16).reshape(shape)


def test_samples_come_back_without_padding(tmp_path: Path) -> None:
    texts = [halves(3, 2), halves(0, 2), halves(1, 2)]
    raw = write_shard(halves(3, 1, 2, 2), texts, halves(3, 5), INFO)
    (tmp_path / "shard").write_bytes(raw)
    for shard in (Shard.open(raw), Shard.open(tmp_path / "shard")):
        assert (shard.n, shard.info) == (3, INFO)
        for i in range(3):
            sample = shard.sample(i)
            assert np.array_equal(sample.text, texts[i])
            assert np.array_equal(sample.latent, halves(3, 1, 2, 2)[i])
            assert np.array_equal(sample.pooled, halves(3, 5)[i])


def test_safetensors_reads_a_shard() -> None:
    tensors = load(shard_bytes(0, 5))
    assert sorted(tensors) == ["latent", "pooled", "text", "text_offsets"]
    assert tensors["text_offsets"].tolist() == [0, 1, 3, 6, 10, 11]


def test_equal_content_gives_equal_bytes() -> None:
    assert shard_bytes(0, 9) == shard_bytes(0, 9) != shard_bytes(1, 9)


def test_a_set_counts_through_its_shards_and_pads_a_batch() -> None:
    shards = shard_set()
    assert shards.n == 33
    assert np.array_equal(shards.sample(20).latent, shards.shards[1].sample(0).latent)
    latent, text, pooled = shards.batch([0, 32, 19], 6)
    assert (latent.shape, text.shape, pooled.shape) == ((3, 1, 4, 4), (3, 6, 12), (3, 8))
    last = shards.shards[1].sample(12)
    assert np.array_equal(text[1, : len(last.text)].numpy(), last.text.astype(np.float32))
    assert not text[1, len(last.text) :].any()
    with pytest.raises(IndexError):
        shards.sample(33)
    with pytest.raises(IndexError):
        shards.sample(-1)


def test_a_text_longer_than_the_runs_limit_is_refused() -> None:
    with pytest.raises(ShardCorrupt, match="Sample 3 has 4 text tokens; the run's limit is 2"):
        shard_set().batch([3], 2)


def test_shards_of_different_shapes_cannot_be_mixed() -> None:
    other = Shard.open(write_shard(halves(1, 1, 2, 2), [halves(1, 12)], halves(1, 8), INFO))
    with pytest.raises(ShardCorrupt, match="different shapes"):
        ShardSet([Shard.open(shard_bytes(0, 5)), other])


@given(cut=st.integers(0, 10_000))
@settings(max_examples=50)
def test_a_shard_cut_anywhere_is_refused(cut: int) -> None:
    raw = shard_bytes(0, 5)
    with pytest.raises(ShardCorrupt, match="must be fetched again"):
        Shard.open(raw[: cut % len(raw)])


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shard").touch()
    with pytest.raises(ShardCorrupt):
        Shard.open(tmp_path / "shard")


def rewritten(**changes: object) -> bytes:
    """Write a shard that is canonical in form and wrong in content."""
    shard = Shard.open(shard_bytes(0, 5))
    tensors = {name: getattr(shard, name).copy() for name in ("text_offsets", "latent", "pooled", "text")}
    described = {**INFO.to_json(5)}
    for name, value in changes.items():
        if name in tensors:
            tensors[name] = value
        else:
            described[name] = value
    return save(tensors, {"shard": json.dumps(described, separators=(",", ":"), sort_keys=True)})


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"n": 6},
        {"licence": 1},
        {"unexpected": "x"},
        {"latent": np.full((5, 1, 4, 4), np.nan, dtype=np.float16)},
        {"latent": np.zeros((4, 1, 4, 4), dtype=np.float16)},
        {"latent": np.zeros((5, 1, 4, 4), dtype=np.float32)},
        {"pooled": np.zeros((5, 8, 1), dtype=np.float16)},
        {"text_offsets": np.array([0, 3, 1, 6, 10, 11])},
        {"text_offsets": np.array([0, 1, 3, 6, 10, 12])},
        {"text_offsets": np.array([1, 1, 3, 6, 10, 11])},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_content_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ShardCorrupt):
        Shard.open(rewritten(**changes))


def test_shapes_that_do_not_fit_each_other_are_not_written() -> None:
    with pytest.raises(ValueError, match="needs as many texts"):
        write_shard(halves(2, 1, 2, 2), [halves(1, 2)], halves(2, 5), INFO)
    with pytest.raises(ValueError, match="pooled is float32"):
        write_shard(halves(1, 1, 2, 2), [halves(1, 2)], np.zeros((1, 5), dtype=np.float32), INFO)


def test_a_shard_need_not_name_its_captions() -> None:
    info = ShardInfo(licence="CC0-1.0", source="x")
    assert Shard.open(write_shard(halves(1, 1, 2, 2), [halves(1, 2)], halves(1, 5), info)).info == info
