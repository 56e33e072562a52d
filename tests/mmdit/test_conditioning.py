import hashlib
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdit.conditioning import ConditioningConfig, encode, encode_caption

CONFIG = ConditioningConfig(kind="byte-patch", max_tokens=6, token_dim=64, pooled_dim=64)


def test_the_encoder_gives_the_same_bytes_as_when_it_was_written() -> None:
    text, pooled = encode(["a handwritten seven", "", "naïve café", "0123456789" * 20], CONFIG)
    assert (text.shape, pooled.shape) == ((4, 6, 64), (4, 64))
    assert text.dtype == pooled.dtype == np.float16
    digest = hashlib.sha256(text.tobytes() + pooled.tobytes()).hexdigest()
    assert digest == "8676ccbe4f365ea0b3494c4c2d0e12ddbc25d83119ccac94d59d4d5cabaa987a"


def test_captions_of_the_ten_digits_are_all_distinct() -> None:
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    text, pooled = encode([f"a handwritten {name}" for name in names], CONFIG)
    for a, b in itertools.combinations(range(10), 2):
        assert not np.array_equal(text[a], text[b])
        assert not np.array_equal(pooled[a], pooled[b])


@settings(deadline=None)  # the first call makes the table of patterns
@given(st.text(max_size=6), st.text(max_size=6))
def test_tokens_tell_any_two_captions_apart(a: str, b: str) -> None:
    tokens_a, tokens_b = encode_caption(a, CONFIG)[0], encode_caption(b, CONFIG)[0]
    assert np.array_equal(tokens_a, tokens_b) == (a == b)


def test_all_256_bytes_have_distinct_patterns_in_every_place() -> None:
    # Byte pairs that are valid UTF-8 only together would hide this, so it is asked of single characters at each place.
    for before in range(4):
        tokens = [encode_caption("x" * before + chr(byte), CONFIG)[0].tobytes() for byte in range(128)]
        assert len(set(tokens)) == 128


def test_a_token_holds_four_bytes_and_its_position_as_plus_and_minus_one() -> None:
    tokens, pooled = encode_caption("abcdefghi", CONFIG)
    assert tokens.shape == (3, 64)
    assert set(np.unique(tokens[:2])) == {-1.0, 1.0}
    assert not tokens[2, 12:48].any()
    assert np.array_equal(np.abs(tokens[2, 48:]), np.ones(16))
    assert set(np.unique(pooled)) == {-0.5, 0.5}


def test_letters_can_be_seen_one_by_one_each_with_its_place() -> None:
    letters = ConditioningConfig(kind="bytes", max_tokens=6, token_dim=64, pooled_dim=64)
    tokens, pooled = encode_caption("abca", letters)
    assert tokens.shape == (4, 64)
    assert set(np.unique(tokens)) == {-1.0, 1.0}
    assert np.array_equal(tokens[0, :48], tokens[3, :48]), "the same letter"
    assert not np.array_equal(tokens[0, 48:], tokens[3, 48:]), "in another place"
    assert np.array_equal(pooled, encode_caption("abca", CONFIG)[1])
    assert len(encode_caption("naïve caf", letters)[0]) == 6
    alphabet = {encode_caption(chr(byte), letters)[0].tobytes() for byte in range(128)}
    assert len(alphabet) == 128


def test_a_long_caption_is_cut_for_tokens_but_heard_in_full_by_the_pooled_vector() -> None:
    cut, whole = "twenty-four bytes, ready", "twenty-four bytes, ready and more"
    assert len(cut) == 24
    (cut_tokens, cut_pooled), (whole_tokens, whole_pooled) = encode_caption(cut, CONFIG), encode_caption(whole, CONFIG)
    assert cut_tokens.shape == (6, 64)
    assert np.array_equal(cut_tokens, whole_tokens)
    assert not np.array_equal(cut_pooled, whole_pooled)


def test_the_empty_caption_is_what_no_text_is_in_training() -> None:
    text, pooled = encode([""], CONFIG)
    assert not text.any()
    assert not pooled.any()
    assert encode_caption("", CONFIG)[0].shape == (0, 64)


def test_the_pooled_vector_of_many_words_stays_exact_in_half_precision() -> None:
    one = encode_caption("word", CONFIG)[1].astype(np.float64)
    assert np.array_equal(encode_caption("word " * 1000, CONFIG)[1], 1000 * one)
    assert np.array_equal(encode_caption("word " * 9000, CONFIG)[1], 2048 * one)


def test_wide_tokens_use_more_than_one_hash() -> None:
    wide = replace(CONFIG, token_dim=4096, pooled_dim=2048)
    tokens, pooled = encode_caption("wide", wide)
    assert tokens.shape == (1, 4096)
    assert not np.array_equal(tokens[0, :256], tokens[0, 256:512])
    assert abs(float(pooled.astype(np.float64).sum())) < 0.5 * 6 * 2048**0.5


def test_a_caption_that_is_not_unicode_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="UTF-8"):
        encode_caption("broken \ud800 surrogate", CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "clip"}, "'clip'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"token_dim": 50}, "token_dim 50 leaves 34"),
        ({"token_dim": 48}, "token_dim 48 leaves 32"),
        ({"pooled_dim": 1.5}, "pooled_dim is 1.5"),
    ],
)
def test_a_conditioning_that_cannot_be_is_refused_with_its_numbers(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)  # type: ignore[arg-type]
