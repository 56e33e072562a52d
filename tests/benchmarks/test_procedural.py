from pathlib import Path

import numpy as np

from benchmarks.procedural import CONDITIONING, MODEL, SHAPES, shard, small_run, trained_weights
from diloco.evaluate import heldout_loss
from diloco.schema import schema_of
from diloco.shards import Shard
from mmdit.conditioning import encode_caption
from protocol.canonical import sha256_hex

SEED = bytes(range(32))


def test_a_seed_gives_the_same_pictures_on_every_machine() -> None:
    assert sha256_hex(shard(SEED, 3, 40)) == "e72caaf40b8a0c0ecbc365803427966adcbc7cd394143a357816add3dac8a168"


def test_no_picture_comes_twice_and_each_has_a_caption_that_fits() -> None:
    pictures = [Shard.open(shard(SEED, number, 200)) for number in range(2)]
    latents = np.concatenate([each.latent for each in pictures]).reshape(400, -1)
    assert len(np.unique(latents, axis=0)) == 400
    assert latents.min() >= -1
    assert latents.max() <= 1
    lengths = np.diff(pictures[0].parts[""].offsets)
    assert lengths.min() >= 5
    assert lengths.max() <= CONDITIONING.max_tokens


def test_a_caption_says_which_shape_is_shown() -> None:
    pictures = Shard.open(shard(SEED, 0, 300))
    means = {}
    for name in ("disc", "rails"):
        first, _ = encode_caption(name, CONDITIONING)
        of_it = [i for i in range(300) if np.array_equal(pictures.parts[""].of(i).tokens[0], first[0])]
        assert len(of_it) > 300 / len(SHAPES) / 2
        means[name] = np.mean(np.abs(np.diff(pictures.latent[of_it, 0].astype(np.float32), axis=2)))
    assert means["rails"] > 1.3 * means["disc"], "rails have more edges from left to right"


def test_a_run_is_small_complete_and_learns(tmp_path: Path) -> None:
    run = small_run(seed=SEED, units=3, rounds=4, shards=12, folder=tmp_path)
    assert schema_of(MODEL).num_elements < 100_000
    assert len({run.unit(number, index).shards.shards[0] for number in range(1, 5) for index in range(3)}) == 12
    paths = run.write_shards(tmp_path / "data")
    assert [sha256_hex(path.read_bytes()) for path in paths] == [ref.sha256 for ref in run.config.data.shards]

    def loss(weights: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> float:
        return heldout_loss(MODEL, weights, run.heldout, SEED, count=64, batch=64, max_tokens=8, device="cpu")

    assert loss(trained_weights(run, rounds=2)) < 0.7 * loss(dict(run.genesis))
