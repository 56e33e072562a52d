"""Buckets, decoding, and the two ways to tell that pictures are the same."""

import io

import numpy as np
import pytest
from PIL import Image

from commonweight.data.pictures import Bucket, PictureSkipped, buckets, closest, decode, look_hash, pixel_digest

SQUARE = Bucket(height=32, width=32)


def _file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_buckets_have_about_the_pixels_of_the_square_and_sides_that_the_model_can_cut() -> None:
    assert buckets(32, step=2, largest=32, most_aspect=2.0) == (SQUARE,)
    found = buckets(256, step=16, largest=768, most_aspect=2.0)
    assert Bucket(height=256, width=256) in found
    assert len(found) > 8
    for bucket in found:
        assert bucket.height % 16 == bucket.width % 16 == 0
        assert max(bucket.aspect, 1 / bucket.aspect) <= 2.0
        assert 0.8 * 256**2 <= bucket.height * bucket.width <= 256**2
    with pytest.raises(ValueError, match="multiple of 16"):
        buckets(250, step=16, largest=768, most_aspect=1.0)
    with pytest.raises(ValueError, match="between 1 and 16"):
        buckets(256, step=16, largest=768, most_aspect=0.5)


def test_a_picture_goes_to_the_bucket_that_cuts_least_of_it() -> None:
    among = (Bucket(height=16, width=64), SQUARE, Bucket(height=64, width=16))
    assert [closest(width, height, among).width for width, height in ((100, 90), (400, 90), (90, 400))] == [32, 64, 16]


def test_a_picture_is_turned_upright_cut_in_the_middle_and_put_on_white() -> None:
    wide = Image.new("RGB", (96, 48), (0, 0, 255))
    wide.paste((255, 0, 0), (24, 0, 72, 48))
    cut = decode(_file(wide), (SQUARE,), channels=3, least_side=8)
    assert (cut.width, cut.height, cut.bucket) == (96, 48, SQUARE)
    assert (cut.pixels[:, 4:-4] == np.array([255, 0, 0], np.uint8)).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    assert decode(_file(wide, "JPEG", exif=exif), (SQUARE,), channels=3, least_side=8).height == 96
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert (decode(_file(clear), (SQUARE,), channels=1, least_side=8).pixels == 255).all()
    assert decode(_file(wide.convert("P")), (SQUARE,), channels=3, least_side=8).pixels.shape == (32, 32, 3)
    assert decode(_file(Image.new("I;16", (40, 40))), (SQUARE,), channels=1, least_side=8).pixels.shape == (32, 32, 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "corrupt"),
        (b"GIF89a but not really", "corrupt"),
        (_file(Image.effect_noise((64, 64), 50))[:900], "corrupt"),
        (_file(Image.new("RGB", (64, 20))), "too small"),
        (_file(Image.new("1", (20_000, 20_000))), "corrupt"),
    ],
    ids=["nothing", "rubbish", "half a file", "a narrow one", "a bomb"],
)
def test_what_is_no_use_is_skipped_for_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(PictureSkipped) as caught:
        decode(content, (SQUARE,), channels=3, least_side=32)
    assert caught.value.reason == reason


def test_a_digest_tells_pictures_apart_and_a_look_survives_small_changes() -> None:
    random = np.random.Generator(np.random.PCG64(4))
    coarse = random.integers(40, 215, (8, 9, 3)).astype(np.uint8)
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)
    brighter = pixels + np.uint8(9)
    assert pixel_digest(pixels) == pixel_digest(pixels.copy()) != pixel_digest(brighter)
    assert look_hash(pixels) == look_hash(brighter) == look_hash(pixels[::2, ::2])
    assert look_hash(pixels) != look_hash(pixels[::-1])
    assert look_hash(np.zeros((2, 3, 1), np.uint8)) == "0" * 16
