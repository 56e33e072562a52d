import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from diloco.layout import Entry, Layout
from diloco.shards import EMPTY, KEPT, SILENT, Shard, ShardInfo, ShardSet, pack_shard, write_shard
from diloco.texts import ByteTexts, CaptionTexts, StoredTexts
from mmdit.conditioning import ConditioningConfig, Encoded, TextLayout, TextPart, encode_caption
from protocol.errors import ShardCorrupt
from protocol.limits import MAX_CAPTION_BYTES
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
            text = shard.parts[""].of(i)
            assert np.array_equal(text.tokens, texts[i])
            assert np.array_equal(shard.latent[i], halves(3, 1, 2, 2)[i])
            assert np.array_equal(text.pooled, halves(3, 5)[i])


def test_safetensors_reads_a_shard() -> None:
    tensors = load(shard_bytes(0, 5))
    assert sorted(tensors) == ["latent", "pooled", "text", "text_offsets"]
    assert tensors["text_offsets"].tolist() == [0, 1, 3, 6, 10, 11]


def test_equal_content_gives_equal_bytes() -> None:
    assert shard_bytes(0, 9) == shard_bytes(0, 9) != shard_bytes(1, 9)


def test_a_set_counts_through_its_shards_and_pads_a_batch() -> None:
    shards = shard_set()
    assert shards.n == 33
    assert shards.place(20) == (shards.shards[1], 0)
    latent, text, pooled = shards.batch([0, 32, 19], 6)
    assert (latent.shape, text.shape, pooled.shape) == ((3, 1, 4, 4), (3, 6, 12), (3, 8))
    last = shards.shards[1].parts[""].of(12).tokens
    assert np.array_equal(text[1, : len(last)].numpy(), last.astype(np.float32))
    assert not text[1, len(last) :].any()
    with pytest.raises(IndexError):
        shards.place(33)
    with pytest.raises(IndexError):
        shards.place(-1)


def test_a_text_longer_than_the_runs_limit_is_refused() -> None:
    with pytest.raises(ShardCorrupt, match="has 4 text tokens; the run's limit is 2"):
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


NAMED = TextLayout(
    parts=(
        TextPart(name="clip_l", row=0, rows=3, column=0, width=2, pooled_at=0, pooled=1),
        TextPart(name="clip_g", row=0, rows=3, column=2, width=3, pooled_at=1, pooled=2),
        TextPart(name="t5", row=3, rows=2, column=0, width=6, pooled_at=3, pooled=0),
    ),
    rows=5,
    token_dim=6,
    pooled_dim=4,
)


def named_parts(n: int) -> dict[str, list[Encoded]]:
    """Texts of three encoders for `n` captions and the empty one; the numbers say which text it is."""
    return {
        part.name: [
            Encoded(
                tokens=np.full((1 + i % part.rows, part.width), 10 * number + i + 1, dtype=np.float16),
                pooled=np.full(part.pooled, 100 * number + i + 1, dtype=np.float16),
            )
            for i in range(n + 1)
        ]
        for number, part in enumerate(NAMED.parts)
    }


def test_captions_come_back_letter_by_letter() -> None:
    captions = ["a red circle", "", "ñandú 🦤", "x"]
    shard = Shard.open(pack_shard(halves(4, 1, 2, 2), INFO, captions=captions))
    assert [shard.caption(i) for i in range(4)] == captions
    assert shard.has_captions
    assert not shard.parts


def test_a_caption_has_a_longest_length_when_it_is_written_and_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pack_shard(halves(1, 1, 2, 2), INFO, captions=["é" * (MAX_CAPTION_BYTES // 2)])
    with pytest.raises(ValueError, match="it may have 16,384"):
        pack_shard(halves(1, 1, 2, 2), INFO, captions=["x" * 16_385])
    monkeypatch.setattr("diloco.shards.MAX_CAPTION_BYTES", 1 << 20)
    raw = pack_shard(halves(1, 1, 2, 2), INFO, captions=["x" * 16_385])
    monkeypatch.undo()
    with pytest.raises(ShardCorrupt, match="it may have 16,384"):
        Shard.open(raw)


def test_bytes_of_captions_are_heard_as_if_they_had_been_encoded_before() -> None:
    conditioning = ConditioningConfig(kind="bytes", max_tokens=6, token_dim=32, pooled_dim=8)
    captions = ["a red circle", "", "blue"]
    encoded = [encode_caption(caption, conditioning) for caption in captions]
    from_captions = Shard.open(pack_shard(halves(3, 1, 2, 2), INFO, captions=captions))
    before = Shard.open(
        write_shard(halves(3, 1, 2, 2), [text for text, _ in encoded], np.stack([p for _, p in encoded]), INFO)
    )
    texts = ByteTexts(conditioning=conditioning)
    batches = [ShardSet([shard], texts).batch([2, 0, 1], 6) for shard in (from_captions, before)]
    for a, b in zip(*batches, strict=True):
        assert torch.equal(a, b)
    assert batches[0][1].any()


def test_each_encoders_text_has_its_rows_and_columns() -> None:
    shard = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, parts=named_parts(2)))
    _, text, pooled = ShardSet([shard], StoredTexts(layout=NAMED)).batch([1], 5)
    assert text[0].tolist() == [
        [2, 2, 12, 12, 12, 0],
        [2, 2, 12, 12, 12, 0],
        [0, 0, 0, 0, 0, 0],
        [22, 22, 22, 22, 22, 22],
        [22, 22, 22, 22, 22, 22],
    ]
    assert pooled[0].tolist() == [2, 102, 102, 0]


def test_an_encoder_can_be_silent_or_hear_the_empty_caption_while_others_hear_the_text() -> None:
    shard = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, parts=named_parts(2)))
    shards = ShardSet([shard], StoredTexts(layout=NAMED))
    _, text, pooled = shards.batch([1, 0], 5, [(KEPT, SILENT, EMPTY), (EMPTY, KEPT, SILENT)])
    assert text[0, :, 0].tolist() == [2, 2, 0, 23, 0]
    assert not text[0, :3, 2:].any()
    assert pooled[0].tolist() == [2, 0, 0, 0]
    assert text[1, :, 0].tolist() == [3, 3, 3, 0, 0]
    assert pooled[1].tolist() == [3, 101, 101, 0]


def test_a_shard_without_what_the_run_hears_is_refused() -> None:
    parts = named_parts(2)
    del parts["t5"]
    shard = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, captions=["a", "b"], parts=parts))
    with pytest.raises(ShardCorrupt, match="no text of t5"):
        ShardSet([shard], StoredTexts(layout=NAMED)).batch([0], 5)
    with pytest.raises(ShardCorrupt, match="no text of the embedded encoder"):
        ShardSet([shard])


def heard(captions: Sequence[str], kept: Sequence[Sequence[bool]] | None = None) -> list[list[Encoded | None]]:
    """What the encoders of `NAMED` make of captions: their length, and how many there are in the encoder's batch."""
    kept = kept or [[True] * len(NAMED.parts)] * len(captions)
    together = [sum(column) for column in zip(*kept, strict=True)]
    return [
        [
            Encoded(
                tokens=np.full((1, part.width), len(caption), dtype=np.float16),
                pooled=np.full(part.pooled, count, dtype=np.float16),
            )
            if wanted
            else None
            for part, count, wanted in zip(NAMED.parts, together, states, strict=True)
        ]
        for caption, states in zip(captions, kept, strict=True)
    ]


def test_captions_are_heard_by_encoders_that_run_here_each_of_which_gets_those_alone_that_it_is_to_hear() -> None:
    shard = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, captions=["four", "sevens!"]))
    shards = ShardSet([shard], CaptionTexts(layout=NAMED, encode=heard))
    for _ in range(2):  # nothing is kept: whoever trains again must make the same batches
        _, text, pooled = shards.batch([1, 0, 1], 5, [(KEPT, KEPT, KEPT), (KEPT, SILENT, KEPT), (EMPTY, KEPT, EMPTY)])
        assert text[:, 0, 0].tolist() == [7, 4, 0]
        assert pooled.tolist() == [[2, 2, 2, 0], [2, 0, 0, 0], [1, 2, 2, 0]]


def test_text_that_a_shard_holds_is_not_encoded_again() -> None:
    parts = named_parts(2)
    held = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, captions=["a", "b"], parts=parts))
    by_shard = ShardSet([held], StoredTexts(layout=NAMED)).batch([1, 0], 5)
    for one, other in zip(
        ShardSet([held], CaptionTexts(layout=NAMED, encode=None)).batch([1, 0], 5), by_shard, strict=True
    ):
        assert torch.equal(one, other)


def test_captions_alone_say_nothing_where_no_encoder_is_loaded() -> None:
    shard = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, captions=["a", "b"]))
    for encode in (None, lambda captions, _kept: [[None] * 3 for _ in captions]):
        with pytest.raises(ShardCorrupt, match=r"is (not )?loaded"):
            ShardSet([shard], CaptionTexts(layout=NAMED, encode=encode)).batch([0], 5)
    without = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, parts={"clip_l": named_parts(2)["clip_l"]}))
    with pytest.raises(ShardCorrupt, match="neither captions nor"):
        ShardSet([without], CaptionTexts(layout=NAMED, encode=heard)).batch([0], 5)


def test_texts_of_other_widths_than_the_runs_are_refused() -> None:
    wide = replace(NAMED, parts=(replace(NAMED.parts[0], width=3), *NAMED.parts[1:]))
    shard = Shard.open(pack_shard(halves(2, 1, 2, 2), INFO, parts=named_parts(2)))
    with pytest.raises(ShardCorrupt, match="different shapes"):
        ShardSet([shard], StoredTexts(layout=wide))


def everything() -> dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]:
    """The tensors of a shard that has captions and the text of every kind of encoder."""
    parts = named_parts(5) | {"": named_parts(4)["clip_l"]}
    return load(pack_shard(halves(5, 1, 4, 4), INFO, captions=["é", "", "b", "cc", "d"], parts=parts))


def rewritten(**changes: object) -> bytes:
    """Write a shard that is canonical in form and wrong in content; None leaves a tensor out."""
    tensors = everything()
    described = {**INFO.to_json(5)}
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        elif isinstance(value, np.ndarray):
            tensors[name] = value
        else:
            described[name] = value
    kinds = {"int64": "I64", "float16": "F16", "uint8": "U8", "float32": "F32"}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries = tuple(
        Entry(name=name, dtype=kinds[str(tensors[name].dtype)], shape=tensors[name].shape) for name in order
    )
    metadata = ("shard", json.dumps(described, separators=(",", ":"), sort_keys=True))
    return Layout(entries=entries, metadata=metadata).prefix() + b"".join(tensors[name].tobytes() for name in order)


def test_a_shard_of_everything_is_read() -> None:
    shard = Shard.open(rewritten())
    assert shard.text_widths == {"": (2, 1), "clip_l": (2, 1), "clip_g": (3, 2), "t5": (6, 0)}
    assert shard.caption(0) == "é"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"n": 6},
        {"licence": 1},
        {"unexpected": "x"},
        {"extra": np.zeros(3, dtype=np.uint8)},
        {"clip_h__text": np.zeros((5, 2), dtype=np.float16)},
        {"latent": np.full((5, 1, 4, 4), np.nan, dtype=np.float16)},
        {"latent": np.zeros((4, 1, 4, 4), dtype=np.float16)},
        {"latent": np.zeros((5, 1, 4, 4), dtype=np.float32)},
        {"latent": np.zeros((0, 1, 4, 4), dtype=np.float16)},
        {"pooled": np.zeros((5, 8, 1), dtype=np.float16)},
        {"pooled": np.zeros((6, 1), dtype=np.float16)},
        {"clip_l__pooled": np.zeros((5, 1), dtype=np.float16)},
        {"t5__pooled": np.full((6, 1), np.inf, dtype=np.float16)},
        {"text_offsets": np.array([0, 3, 1, 6, 10, 11])},
        {"text_offsets": np.array([0, 1, 3, 6, 10, 12])},
        {"text_offsets": np.array([1, 1, 3, 6, 10, 11])},
        {"t5__text_offsets": None},
        {"t5__text": None},
        {"captions": None},
        {"caption_offsets": None},
        {"caption_offsets": np.array([0, 1, 2, 3, 5, 6])},
        {"caption_offsets": np.array([0, 2, 2, 3, 5])},
        {"caption_offsets": np.array([0, 2, 2, 3, 5, 5])},
        {"captions": np.full(6, 0xFF, dtype=np.uint8)},
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


def test_samples_that_were_taken_down_are_drawn_by_no_index_and_all_others_keep_their_order() -> None:
    shards = shard_set().shards
    everything = [(number, at) for number, shard in enumerate(shards) for at in range(shard.n)]
    for without in ([(), ()], [(0, 1, 19), ()], [(3,), (12, 0)], [range(19), (5, 6, 7)], [range(20), (1,)]):
        found = ShardSet(shards, None, [tuple(samples) for samples in without])
        left = [(number, at) for number, at in everything if at not in without[number]]
        assert [(shards.index(shard), at) for shard, at in map(found.place, range(found.n))] == left
        places = found.places_left()
        assert [places.index(place) for place in range(found.n)] == [everything.index(one) for one in left]
        assert sum(place is None for place in places) == 33 - found.n


def test_no_more_can_be_taken_down_than_there_is() -> None:
    shards = shard_set().shards
    with pytest.raises(ShardCorrupt, match="Sample 13 was taken down, of a shard that holds 13"):
        ShardSet(shards, None, [(), (13,)])
    with pytest.raises(ShardCorrupt, match="nothing left to train on"):
        ShardSet(shards, None, [range(20), range(13)])
