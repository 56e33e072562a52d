from pathlib import Path

import numpy as np

from diloco.sketch import BUCKETS, sketch
from diloco.streams import Stream
from diloco.tables import Floats
from tests.diloco.examples import OTHER_SEED, SEED, container, encoded, normals


def plain(flat: Floats, seed: bytes) -> Floats:
    """The definition, element by element of each row."""
    stream = Stream(seed, "sketch")
    rows = -(-flat.size // BUCKETS)
    padded = np.zeros(rows * BUCKETS, dtype=np.float32)
    padded[: flat.size] = flat
    buckets = np.zeros(BUCKETS, dtype=np.float32)
    for r in range(rows):
        words = [int(word) for word in stream.words(r // 64, 0, 64 * 17)[r % 64 * 17 :][:17]]
        signs = np.array([-1 if words[i // 64] >> (i % 64) & 1 else 1 for i in range(BUCKETS)], dtype=np.float32)
        buckets += np.roll(signs * padded[r * BUCKETS : (r + 1) * BUCKETS], words[16] % BUCKETS)
    return buckets


def test_the_sketch_is_signed_rotated_rows_added_up() -> None:
    flat = normals("x", (70 * BUCKETS + 3,))
    assert np.array_equal(sketch([flat], SEED), plain(flat, SEED))


def test_where_chunks_end_does_not_matter(tmp_path: Path) -> None:
    coded = encoded(1)
    whole = np.concatenate([values.reshape(-1) for values in coded.decoded().values()])
    expected = sketch([whole], SEED)
    assert np.array_equal(sketch(coded.decoded_chunks(), SEED), expected)
    assert np.array_equal(sketch(container(tmp_path, 1).decoded_chunks(), SEED), expected)
    assert np.array_equal(sketch(np.array_split(whole, 37), SEED), expected)


def test_distances_of_sketches_estimate_distances_of_deltas() -> None:
    a, b = normals("a", (200_000,)), normals("b", (200_000,))
    close = a + np.float32(0.01) * b
    for seed in (SEED, OTHER_SEED):
        for other in (b, close):
            true = float(np.linalg.norm(a - other))
            estimate = float(np.linalg.norm(sketch([a], seed) - sketch([other], seed)))
            assert abs(estimate / true - 1) < 0.1


def test_another_seed_gives_another_sketch() -> None:
    flat = normals("a", (5_000,))
    assert not np.array_equal(sketch([flat], SEED), sketch([flat], OTHER_SEED))
