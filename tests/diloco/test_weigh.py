from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diloco.codec import CodecConfig, EncodedDelta, encode
from diloco.container import Container, write_container
from diloco.packing import Signed
from diloco.schema import Schema, TensorSpec
from diloco.streams import Stream
from diloco.tables import Floats
from diloco.weigh import GROUP_RUNS, ROW, RUN, delta_norm2, gram, sampling_rate, weigh_delta, weighing_sketch
from tests.diloco.examples import CODEC, FINE, OTHER_SEED, SCHEMA, SEED, UNIT_ID, container, delta, normals

LARGE = Schema(
    tensors=(
        TensorSpec(name="a.large", shape=(2048, 2048)),
        TensorSpec(name="b.odd", shape=(4097, 1027)),
        TensorSpec(name="c.short", shape=(7,)),
    )
)
"""8.4 million parameters, so that one run in 16 is drawn."""
EIGHT_BITS = CodecConfig(kind="dither", levels=127, block=256, reach=1280, width=256)
each_codec = pytest.mark.parametrize("codec", [CODEC, FINE, EIGHT_BITS], ids=["ternary", "7 levels", "127 levels"])


def large_delta(codec: CodecConfig) -> EncodedDelta:
    """Random codes of all sizes, under scales that are all alike."""
    codes = {spec.name: codec.packing.pack(_random_numbers(spec, codec.levels)) for spec in LARGE.tensors}
    scales = {
        spec.name: np.full(codec.num_blocks(spec.num_elements), 0x3C00, dtype=np.uint16) for spec in LARGE.tensors
    }
    return EncodedDelta(schema=LARGE, codec=codec, codes=codes, scales=scales)


def _random_numbers(spec: TensorSpec, levels: int) -> Signed:
    drawn = Stream(SEED, f"init/{spec.name}").words(0, 0, -(-spec.num_elements // 4)).view(np.uint16)
    digits = (drawn[: spec.num_elements] % np.uint16(2 * levels + 1)).astype(np.int16)
    return np.subtract(digits, levels).astype(np.int8)


def written(path: Path, encoded: EncodedDelta) -> Container:
    write_container(path, encoded, UNIT_ID)
    return Container.open(path, encoded.schema, encoded.codec, UNIT_ID)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Container:
    return written(tmp_path_factory.mktemp("large") / "delta", large_delta(CODEC))


def opened(path: Path, block: int, number: int = 0, levels: int = 1) -> Container:
    codec = CodecConfig(kind="dither", levels=levels, block=block, reach=1280, width=256)
    return written(path, encode(delta(number), SCHEMA, codec, bytes([number]) * 32))


def plain_sketch(item: Container, seed: bytes) -> npt.NDArray[np.float64]:
    """The sketch as the module's description says it, row by row."""
    stream = Stream(seed, "weigh")
    runs = []
    for spec in item.schema.tensors:
        values = np.zeros(-(-spec.num_elements // ROW) * ROW)
        values[: spec.num_elements] = item.tensor(spec.name).reshape(-1)
        rows = values.reshape(-1, ROW)
        runs += [rows[start : start + RUN] for start in range(0, len(rows), RUN)]
    rate = sampling_rate(sum(len(run) for run in runs))
    draws = stream.words(0, 0, -(-len(runs) // rate)) % np.uint64(rate)
    drawn = [k * rate + int(draw) for k, draw in enumerate(draws)]
    kept = [runs[number] for number in drawn if number < len(runs)]
    groups = [np.concatenate(kept[start : start + GROUP_RUNS]) for start in range(0, len(kept), GROUP_RUNS)]
    table = _signs(stream.words(1, 0, GROUP_RUNS * RUN * ROW // 64)).reshape(-1, ROW)
    own = _signs(stream.words(2, 0, len(groups))).reshape(len(groups), -1)
    rotations = stream.words(3, 0, len(groups)) % np.uint64(ROW)
    total = np.zeros(ROW)
    for group, signs, rotation in zip(groups, own, rotations.tolist(), strict=True):
        summed = np.sum(group * table[: len(group)] * signs[: len(group), None], axis=0)
        total += np.roll(summed, rotation)
    return total


def _signs(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    return 1.0 - 2.0 * bits.astype(np.float64)


@pytest.mark.parametrize("levels", [1, 2, 7, 127])
@pytest.mark.parametrize("block", [16, 256, 1024, 2048, 65_536])
def test_a_sketch_is_what_its_description_says_for_every_size_of_block(tmp_path: Path, block: int, levels: int) -> None:
    item = opened(tmp_path / "delta", block, levels=levels)
    expected = plain_sketch(item, SEED)
    assert weighing_sketch(item, SEED) == pytest.approx(expected, abs=1e-5 * float(np.abs(expected).max()))


@each_codec
def test_a_large_model_is_sketched_by_one_run_in_sixteen(tmp_path: Path, codec: CodecConfig) -> None:
    item = written(tmp_path / "delta", large_delta(codec))
    expected = plain_sketch(item, SEED)
    assert weighing_sketch(item, SEED) == pytest.approx(expected, abs=1e-5 * float(np.abs(expected).max()))


@each_codec
def test_what_the_seed_did_not_draw_is_not_looked_at_and_what_it_drew_counts(
    tmp_path: Path, codec: CodecConfig
) -> None:
    before = weighing_sketch(written(tmp_path / "before", large_delta(codec)), SEED)
    seen = 0
    for run in range(16):
        changed = large_delta(codec)
        codes = changed.codes["a.large"]
        place = codec.packing.num_bytes(run * RUN * ROW)
        codes[place] = (int(codes[place]) + 1) % codec.packing.values
        seen += not np.array_equal(before, weighing_sketch(written(tmp_path / "after", changed), SEED))
    assert seen == 1


def test_the_rate_leaves_small_models_whole() -> None:
    assert [sampling_rate(rows) for rows in (1, 1023, 1024, 4096, 8191, 8192, 10**7)] == [1, 1, 2, 8, 15, 16, 32]


@each_codec
def test_inner_products_of_sketches_estimate_those_of_the_deltas(tmp_path: Path, codec: CodecConfig) -> None:
    schema = Schema(tensors=(TensorSpec(name="x", shape=(300, 601)),))
    shared = normals("shared", (300, 601), 1e-3)
    deltas = [shared + normals(f"own{k}", (300, 601), 1e-3) for k in range(4)]
    deltas.append(-deltas[0])
    items = [_container(tmp_path / str(k), values, schema, codec) for k, values in enumerate(deltas)]
    flat = np.stack([item.tensor("x").reshape(-1).astype(np.float64) for item in items])
    exact = flat @ flat.T
    scale = float(exact[0, 0])
    errors = []
    for seed in (bytes([k]) * 32 for k in range(10)):
        sketches = np.stack([weighing_sketch(item, seed).astype(np.float64) for item in items])
        errors.append((sketches @ sketches.T - exact) / scale)
    assert float(np.std(errors)) < 0.05
    assert float(np.abs(np.mean(errors, axis=0)).max()) < 0.05


def _container(path: Path, values: Floats, schema: Schema, codec: CodecConfig) -> Container:
    return written(path, encode({"x": values}, schema, codec, SEED))


def test_another_seed_gives_another_sketch(tmp_path: Path) -> None:
    item = container(tmp_path, 0)
    assert not np.array_equal(weighing_sketch(item, SEED), weighing_sketch(item, OTHER_SEED))


@pytest.mark.parametrize("levels", [1, 7, 127])
@pytest.mark.parametrize("block", [16, 256, 4096, 65_536])
def test_the_norm_is_that_of_the_whole_decoded_delta(tmp_path: Path, block: int, levels: int) -> None:
    item = opened(tmp_path / "delta", block, levels=levels)
    exact = sum(float(np.sum(chunk.astype(np.float64) ** 2)) for chunk in item.decoded_chunks())
    assert delta_norm2(item) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("levels", [1, 7, 127])
@pytest.mark.parametrize("block", [16, 256, 2048, 65_536])
def test_where_every_run_is_drawn_the_size_is_exact(tmp_path: Path, block: int, levels: int) -> None:
    item = opened(tmp_path / "delta", block, levels=levels)
    assert weigh_delta(item, SEED).norm2 == pytest.approx(delta_norm2(item), rel=1e-12)


def test_squares_of_the_largest_codes_of_the_longest_blocks_do_not_overflow(tmp_path: Path) -> None:
    codec = CodecConfig(kind="dither", levels=127, block=65_536, reach=1280, width=256)
    schema = Schema(tensors=(TensorSpec(name="x", shape=(3, 65_536)),))
    loudest = {"x": codec.packing.pack(np.full(3 * 65_536, -127, dtype=np.int8))}
    ones = {"x": np.full(3, 0x3F80, dtype=np.uint16)}
    item = written(tmp_path / "delta", EncodedDelta(schema=schema, codec=codec, codes=loudest, scales=ones))
    assert delta_norm2(item) == weigh_delta(item, SEED).norm2 == 3 * 65_536 * 127**2


@each_codec
def test_the_size_of_a_large_delta_is_estimated_to_a_few_per_cent(tmp_path: Path, codec: CodecConfig) -> None:
    item = written(tmp_path / "delta", large_delta(codec))
    for number in range(5):
        assert weigh_delta(item, bytes([number]) * 32).norm2 == pytest.approx(delta_norm2(item), rel=0.05)


def test_a_single_loud_block_is_seen_by_its_scale_wherever_it_lies(large: Container, tmp_path: Path) -> None:
    changed = large_delta(CODEC)
    changed.scales["a.large"][12_345] = 0x4200  # 32, 4,096 times as loud as the others
    loud = written(tmp_path / "loud", changed)
    for number in range(5):
        norm2 = weigh_delta(loud, bytes([number]) * 32).norm2
        assert norm2 == pytest.approx(delta_norm2(loud), rel=0.15)
        assert norm2 > 100 * delta_norm2(large)


def test_a_loud_block_can_not_hide_among_loud_ones_that_are_silent(large: Container, tmp_path: Path) -> None:
    changed = large_delta(CODEC)
    numbers = CODEC.packing.unpack(changed.codes["a.large"], 2048 * 2048).reshape(-1, 256)
    blocks_of_a_run = RUN * ROW // 256
    numbers[::blocks_of_a_run] = 0  # one silent block in each run,
    changed.scales["a.large"][::blocks_of_a_run] = 0x4200  # as loud as the one that is not
    changed.scales["a.large"][12_345] = 0x4200
    codes = dict(changed.codes) | {"a.large": CODEC.packing.pack(numbers.reshape(-1))}
    loud = written(tmp_path / "loud", EncodedDelta(schema=LARGE, codec=CODEC, codes=codes, scales=changed.scales))
    for number in range(5):
        norm2 = weigh_delta(loud, bytes([number]) * 32).norm2
        assert norm2 > delta_norm2(loud)
        assert norm2 > 100 * delta_norm2(large)


def test_a_delta_that_is_silent_wherever_it_is_drawn_is_measured_as_a_whole(tmp_path: Path) -> None:
    silent = {spec.name: np.zeros(spec.shape, dtype=np.float32) for spec in LARGE.tensors}
    silent["a.large"][1000, :] = 1e-3
    item = written(tmp_path / "delta", encode(silent, LARGE, CODEC, SEED))
    for number in range(3):
        found = weigh_delta(item, bytes([number]) * 32)
        assert found.norm2 == pytest.approx(delta_norm2(item), rel=0.01)
    nothing = {spec.name: np.zeros(spec.shape, dtype=np.float32) for spec in SCHEMA.tensors}
    found = weigh_delta(written(tmp_path / "nothing", encode(nothing, SCHEMA, CODEC, SEED)), SEED)
    assert found.norm2 == 0.0
    assert not found.sketch.any()


def test_a_gram_matrix_is_of_sixteen_bit_integers_on_one_scale() -> None:
    sketches = [normals(f"sketch{k}", (ROW,), 2.0**k) for k in range(3)]
    products = gram(sketches)
    assert products.dtype == np.int64
    assert np.array_equal(products, products.T)
    largest = max(float(np.abs(sketch).max()) for sketch in sketches)
    rounded = [np.rint(sketch.astype(np.float64) / largest * 32_767).astype(int).tolist() for sketch in sketches]
    assert products[0, 2] == sum(a * b for a, b in zip(rounded[0], rounded[2], strict=True))
    assert not gram([np.zeros(ROW, dtype=np.float32)] * 2).any()
