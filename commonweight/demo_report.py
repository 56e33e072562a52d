"""What the demo shows at its end: generated digits with captions, the validation loss by round, and a score.

The score asks a classifier that never saw a generated picture: a support-vector machine, trained on the real training
split only, and measured on the real held-out split beside it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from commonweight.digits import NAMES, Split, caption, load_digits
from commonweight.drawing import Drawing, draw
from mmdit.export import load_checkpoint
from mmdit.space import ByteImages
from protocol import layout

PER_DIGIT: Final = 20
SHOWN_PER_DIGIT: Final = 10
TARGET: Final = 0.90
_ENLARGE: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How many generated digits are recognised, and how good the judge is."""

    recognised: int
    generated: int
    classifier_accuracy: float

    @property
    def share(self) -> float:
        """The share of generated digits recognised as what their captions asked for."""
        return self.recognised / self.generated


def generate(checkpoint: Path, *, seed: int) -> ByteImages:
    """Return PER_DIGIT pictures of each digit, digit by digit: uint8 [200, 8, 8, 1]."""
    captions = [caption(digit) for digit in range(len(NAMES)) for _ in range(PER_DIGIT)]
    return draw(load_checkpoint(checkpoint), captions, Drawing(seed=seed))


def score(pictures: ByteImages) -> Score:
    """Let the classifier say what it sees in the generated pictures."""
    from sklearn.svm import SVC

    digits = load_digits()
    judge = SVC(gamma=0.5 / 8, C=10.0).fit(_features(digits.train), digits.train.labels)
    wanted = np.repeat(np.arange(len(NAMES)), PER_DIGIT)
    seen = judge.predict(pictures.reshape(len(pictures), -1).astype(np.float32) / np.float32(255))
    return Score(
        recognised=int(np.count_nonzero(seen == wanted)),
        generated=len(pictures),
        classifier_accuracy=float(np.mean(judge.predict(_features(digits.heldout)) == digits.heldout.labels)),
    )


def _features(split: Split) -> npt.NDArray[np.float32]:
    return split.pixels.reshape(len(split.pixels), -1)


def draw_sheet(pictures: ByteImages, path: Path) -> None:
    """Write a PNG with SHOWN_PER_DIGIT pictures of each digit in a row, its caption in front."""
    from PIL import Image, ImageDraw, ImageFont

    size = pictures.shape[1] * _ENLARGE
    gap, left = 6, 190
    sheet = Image.new("L", (left + SHOWN_PER_DIGIT * (size + gap) + gap, len(NAMES) * (size + gap) + gap), 255)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for digit in range(len(NAMES)):
        top = gap + digit * (size + gap)
        pen.text((10, top + size // 2), caption(digit), fill=0, font=font, anchor="lm")
        for column in range(SHOWN_PER_DIGIT):
            picture = 255 - pictures[digit * PER_DIGIT + column, :, :, 0]
            tile = Image.fromarray(picture).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(tile, (left + column * (size + gap), top))
    sheet.save(path)


def validation_losses(public: Path) -> dict[int, float]:
    """Return the validation loss of every checkpoint that was measured."""
    losses = {}
    for path in sorted((public / Path(layout.metrics_path(0)).parent).glob("*.json")):
        losses[int(path.stem)] = float(json.loads(path.read_bytes())["validation_loss"])
    return losses


def plot_losses(losses: dict[int, float], path: Path) -> None:
    """Write a PNG with the validation loss by round."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(list(losses), list(losses.values()), marker="o", markersize=3)
    axes.set_xlabel("checkpoint (rounds merged)")
    axes.set_ylabel("validation loss")
    axes.set_title("Validation loss by round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
