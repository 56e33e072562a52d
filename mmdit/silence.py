"""Rows of zeros in the text, of which there are many: padding, and what a dropped encoder would have said.

Text has no positions, so all rows of zeros of a sample stay equal to each other in every block, and what an attention
hears of n equal tokens is what it hears of one whose scores are raised by log n. It is enough to compute one of them.
"""

import torch
from torch import Tensor

from mmdit.transforms import under_transform

# Below this there is too little to save to pay for a mask in every attention.
_WORTH_IT = 0.25


def merge_silence(text_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the text with most rows of zeros left out, and what is to be added to the scores of each row's key.

    A batch stays a rectangle: each sample keeps as many rows as the one that says most needs. Only on a CPU; a GPU
    would have to wait for the number of rows, and its quickest attention takes no such addition.

    Returns:
        text [B, M, D] with M at most L, the rows of zeros last; fp32 [B, M], or None where nothing was left out.
    """
    batch, length, width = text_BLD.shape
    if length == 0 or not _can_be_looked_at(text_BLD):
        return text_BLD, None
    silent_BL = (text_BLD == 0).all(2)
    silent_B = silent_BL.sum(1, keepdim=True)
    kept = int((length - silent_B + (silent_B > 0)).max())
    if kept > (1.0 - _WORTH_IT) * length:
        return text_BLD, None
    order_BM = silent_BL.int().argsort(dim=1, stable=True)[:, :kept]
    merged_BMD = text_BLD.gather(1, order_BM.unsqueeze(2).expand(batch, kept, width))
    spoken_B = length - silent_B
    places_B = (kept - spoken_B).clamp(min=1)  # of a sample without any the number is not used
    louder_BM = (silent_B.float() / places_B).log().expand(batch, kept)
    return merged_BMD, louder_BM.where(torch.arange(kept) >= spoken_B, torch.zeros(()))


def _can_be_looked_at(x: Tensor) -> bool:
    # A subclass, such as a fake tensor, may have no numbers; under `vmap` their choice would have to suit all at once.
    return x.device.type == "cpu" and type(x) is Tensor and not under_transform()


def on_the_keys(louder_BM: Tensor, image_tokens: int) -> Tensor:
    """Return the additions for the keys of image and text together, as an attention mask [B, 1, 1, L + M]."""
    return torch.nn.functional.pad(louder_BM, (image_tokens, 0))[:, None, None, :]
