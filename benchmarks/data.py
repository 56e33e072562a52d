"""Data: does drawing keep a step waiting, and do the processes of `data prepare` share the work?

    python -m benchmarks.data [--quick]

Drawing is what a step needs before it can begin: samples out of mapped shards, noise, timesteps, dropped captions. On a
GPU the next batch is drawn in a thread while this one is trained on (`diloco.draws.in_turn`), so that a step waits only
if drawing takes longer than it. What a step of d18 takes is computed, not measured: its products, 6 operations for each
parameter and token, at 45 % of the 165 TFLOP/s of bf16 that an RTX 4090 is sold with.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import torch
from PIL import Image

from benchmarks.report import Report
from commonweight.data.encoders import EmbeddedEncoder
from commonweight.data.index import Rules
from commonweight.data.pictures import Bucket
from commonweight.data.prepare import Recipe, prepare
from diloco.draws import Draws
from diloco.schema import schema_of
from diloco.shards import Shard, ShardInfo, ShardSet, pack_shard
from diloco.texts import ByteTexts, StoredTexts, TextSource
from mmdit.conditioning import ConditioningConfig, Encoded, TextLayout, TextPart
from mmdit.presets import PRESETS
from mmdit.space import PixelSpace
from protocol.keys import PrivateKey

_CARD_OPERATIONS: Final = 0.45 * 165e12
_MOST_SHARE: Final = 0.02
_SIDE: Final = 64
"""Of the latents: 512 x 512 pixels."""
_PREPARED: Final = "rgb32"


def _layout(parts: tuple[TextPart, ...], rows: int) -> TextLayout:
    return TextLayout(parts=parts, rows=rows, token_dim=4096, pooled_dim=2048)


_CLIP_L: Final = TextPart(name="clip_l", row=0, rows=77, column=0, width=768, pooled_at=0, pooled=768)
_CLIP_G: Final = TextPart(name="clip_g", row=0, rows=77, column=768, width=1280, pooled_at=768, pooled=1280)
_T5: Final = TextPart(name="t5", row=77, rows=77, column=0, width=4096, pooled_at=2048, pooled=0)


def _cases() -> Iterator[tuple[str, TextSource, int]]:
    """Name, source of text, and tokens of text."""
    yield "CLIP-L, CLIP-G, T5", StoredTexts(layout=_layout((_CLIP_L, _CLIP_G, _T5), 154)), 154
    yield "CLIP-L, CLIP-G", StoredTexts(layout=_layout((_CLIP_L, _CLIP_G), 77)), 77
    embedded = ConditioningConfig(kind="byte-patch", max_tokens=64, token_dim=4096, pooled_dim=2048)
    yield "captions, embedded encoder", ByteTexts(conditioning=embedded), 64


def _shards(texts: TextSource, count: int) -> ShardSet:
    draw = np.random.default_rng(0)
    latent = draw.standard_normal((count, 16, _SIDE, _SIDE)).astype(np.float16)
    parts = {
        part.name: [
            Encoded(
                tokens=draw.standard_normal((part.rows, part.width)).astype(np.float16),
                pooled=draw.standard_normal(part.pooled).astype(np.float16),
            )
            for _ in range(count + 1)
        ]
        for part in texts.layout.parts
        if part.name
    }
    captions = [f"picture number {number}, of nothing that anybody would know" for number in range(count)]
    raw = pack_shard(latent, ShardInfo(licence="CC0-1.0", source="random numbers"), captions=captions, parts=parts)
    return ShardSet([Shard.open(raw)], texts)


def _drawing(report: Report, *, quick: bool) -> None:
    count, batch, steps = (16, 4, 4) if quick else (64, 8, 24)
    parameters = schema_of(PRESETS["d18"]).num_elements
    for name, texts, tokens in _cases():
        shards, draws = _shards(texts, count), Draws(bytes(32))

        def draw(step: int, shards: ShardSet = shards, draws: Draws = draws, tokens: int = tokens) -> object:
            return draws.batch(step, batch, shards, max_tokens=tokens, text_dropout=30409)

        seconds = median(_timed(draw, step) for step in range(steps)) / batch
        step_seconds = 6 * parameters * (_SIDE * _SIDE // 4 + tokens) / _CARD_OPERATIONS
        waits = max(0.0, seconds - step_seconds)
        report.add_row(
            what=f"drawing: {name}",
            value=round(1e3 * seconds, 3),
            unit="ms of one core a sample",
            of_a_d18_step=round(seconds / step_seconds, 4),
        )
        report.add_target(
            f"{name}: what a step of d18 waits for data, on a card that takes {1e3 * step_seconds:.0f} ms a sample",
            target="at most 0.02",
            value=round(waits / step_seconds, 4),
            met=waits / step_seconds <= _MOST_SHARE,
        )


def _timed(draw: Callable[[int], object], step: int) -> float:
    began = time.process_time()
    draw(step)
    return time.process_time() - began


def _preparing(report: Report, *, quick: bool) -> None:
    count = 64 if quick else 1200
    with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
        pictures = Path(folder, "pictures")
        pictures.mkdir()
        _write_pictures(pictures, count)
        speeds = {
            processes: count / _prepared(pictures, Path(folder, f"out{processes}"), processes) for processes in (1, 2)
        }
    for processes, speed in speeds.items():
        report.add_row(
            what=f"data prepare, {processes} processes",
            value=round(speed, 1),
            unit="pictures of 512 x 384 a second",
            of_a_d18_step=None,
        )
    report.add_target(
        "data prepare: two processes over one, pictures a second",
        target="at least 1.5",
        value=round(speeds[2] / speeds[1], 3),
        met=speeds[2] / speeds[1] >= 1.5,
    )


def _write_pictures(folder: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        raw = io.BytesIO()
        Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC).save(raw, "JPEG", quality=90)
        (folder / f"{number:05d}.jpg").write_bytes(raw.getvalue())
        (folder / f"{number:05d}.txt").write_text(f"picture number {number}")


def _prepared(pictures: Path, out: Path, processes: int) -> float:
    """Prepare a data set and return the seconds that it took, the start of the processes included."""
    shape = PRESETS[_PREPARED]
    side = shape.sample_size
    encoder = EmbeddedEncoder(
        space=PixelSpace(channels=3, height=side, width=side, shift=-1.0, scale=2.0),
        conditioning=ConditioningConfig(kind="bytes", max_tokens=32, token_dim=64, pooled_dim=256),
    )
    recipe = Recipe(
        name="pictures",
        preset=_PREPARED,
        rules=Rules(
            among=(Bucket(height=side, width=side),),
            channels=3,
            least_side=side,
            licence="CC0-1.0",
            source="random numbers",
            licences=None,
            most_caption=200,
        ),
        encoder=encoder,
        seed=bytes(32),
        shard_bytes=1 << 20,
        heldout=16,
        least_in_bucket=1,
    )
    began = time.monotonic()
    prepare(pictures, out, recipe, PrivateKey.generate, processes=processes, on_progress=lambda _: None)
    return time.monotonic() - began


def main() -> int:
    """Measure drawing and preparing; exit status 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Drawing batches, and preparing data sets.")
    parser.add_argument("--quick", action="store_true", help="fewer pictures; writes nothing")
    quick: bool = parser.parse_args().quick
    torch.set_num_threads(1)
    report = Report(name="data")
    _drawing(report, quick=quick)
    _preparing(report, quick=quick)
    return 0 if report.finish(quick=quick) else 1


if __name__ == "__main__":
    sys.exit(main())
