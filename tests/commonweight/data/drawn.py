"""Folders of drawn pictures with captions, as somebody would have them; some of them spoilt."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}


def picture(number: int) -> tuple[Image.Image, str]:
    """A coloured square or circle on a light ground, and its caption; no two numbers give the same picture."""
    chance = random.Random(number)
    image = Image.new("RGB", chance.choice([(64, 64), (80, 60), (60, 80)]), (255 - number % 50, 240, 230))
    colour, shape = chance.choice(sorted(COLOURS)), chance.choice(["square", "circle"])
    left, top, side = chance.randrange(4, 20), chance.randrange(4, 20), chance.randrange(12, 36)
    draw = ImageDraw.Draw(image)
    (draw.rectangle if shape == "square" else draw.ellipse)((left, top, left + side, top + side), fill=COLOURS[colour])
    return image, f"a {colour} {shape}"


def folder(root: Path, count: int) -> Path:
    """`count` pictures, half of them with .txt and half with .json captions; and six that can't be used."""
    root.mkdir(parents=True)
    for number in range(count):
        image, caption = picture(number)
        path = root / f"{number:04d}.{'png' if number % 3 else 'jpg'}"
        image.save(path)
        if number % 2:
            path.with_suffix(".txt").write_text(f"{caption}\n")
        else:
            said = {
                "caption": caption,
                "license": "CC-BY-4.0" if number % 4 else "CC0-1.0",
                "url": "https://example.org",
            }
            path.with_suffix(".json").write_text(json.dumps(said))
    image, caption = picture(0)
    for name, content in (("corrupt", b"\xff\xd8\xff rubbish"), ("empty", b"")):
        (root / f"{name}.jpg").write_bytes(content)
        (root / f"{name}.txt").write_text("a thing")
    Image.new("RGB", (8, 8)).save(root / "tiny.png")
    (root / "tiny.txt").write_text("a speck")
    image.save(root / "silent.png")
    (root / "zz-again.png").write_bytes((root / "0001.png").read_bytes())
    (root / "zz-again.txt").write_text("the same again")
    image.save(root / "zz-odd.png")
    (root / "zz-odd.json").write_text(json.dumps({"caption": "odd", "license": "All rights reserved"}))
    return root


SKIPPED = {"corrupt": 2, "duplicate": 1, "licence": 1, "no caption": 1, "too small": 1}
"""Of `folder`, where CC0-1.0 and CC-BY-4.0 are accepted."""
