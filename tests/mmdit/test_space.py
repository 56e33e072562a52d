from dataclasses import replace

import numpy as np
import pytest

from mmdit.space import FloatImages, PixelSpace

SPACE = PixelSpace(channels=3, height=4, width=5, shift=-1.0, scale=2.0)


def test_every_byte_value_survives_the_way_to_latents_and_back() -> None:
    space = replace(SPACE, channels=1, height=16, width=16)
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    latents = space.encode(images)
    assert latents.shape == (1, 1, 16, 16)
    assert latents.dtype == np.float32
    assert (latents.min(), latents.max()) == (-1.0, 1.0)
    assert np.array_equal(space.decode(latents), images)


def test_rows_columns_and_channels_keep_their_places() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    latents = SPACE.encode(images)
    assert latents.shape == (2, 3, 4, 5)
    assert latents[1, 2, 3, 4] == np.float32(images[1, 3, 4, 2]) / np.float32(255) * 2 - 1
    assert np.array_equal(SPACE.decode(latents), images)


def test_floats_between_zero_and_one_are_taken_as_they_are() -> None:
    images = np.full((1, 4, 5, 3), 0.25, dtype=np.float32)
    assert np.all(SPACE.encode(images) == -0.5)


def test_latents_outside_the_space_are_clipped() -> None:
    latents = np.array([-9.0, 9.0], dtype=np.float32).reshape(1, 1, 1, 2)
    assert replace(SPACE, channels=1).decode(latents).ravel().tolist() == [0, 255]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 5, 4, 3), dtype=np.uint8), "4 x 5 x 3"),
        (np.zeros((1, 4, 5, 3), dtype=np.float64), "float64"),
        (np.full((1, 4, 5, 3), 16, dtype=np.float32), "16.0"),
        (np.full((1, 4, 5, 3), np.nan, dtype=np.float32), "nan"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(images: FloatImages, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPACE.encode(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"scale": 0.0}, "scale is 0"), ({"shift": float("nan")}, "shift is nan"), ({"height": 0}, "height is 0")],
)
def test_a_space_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SPACE, **changes)  # type: ignore[arg-type]
