"""Whether torch.func's transforms are at work: vmap and grad know nothing of backward passes that are written out."""

import torch


def under_transform() -> bool:
    """Return whether a function of torch.func (vmap, grad, ...) calls us, so that plain operations must do."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and bool(active())
