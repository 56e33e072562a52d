"""Attention over the image tokens and, jointly, the text tokens."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from mmdit.config import QkNorm
from mmdit.layers import apply_linear
from mmdit.products import attention, linears

_QK_EPS = 1e-6


class HeadNorm(nn.Module):
    """RMS normalisation over the width of a head, with a learned scale."""

    def __init__(self, head_dim: int, *, device: str | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim, device=device))

    def forward(self, x_BLHE: Tensor) -> Tensor:
        """Normalise the last axis; the shape stays."""
        return functional.rms_norm(x_BLHE, self.weight.shape, self.weight.to(x_BLHE.dtype), _QK_EPS)


class Attention(nn.Module):
    """Self-attention of the image stream; the parts shared by both kinds of attention in a block."""

    def __init__(self, hidden: int, heads: int, qk_norm: QkNorm, *, device: str | None) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(hidden, hidden, device=device)
        self.to_k = nn.Linear(hidden, hidden, device=device)
        self.to_v = nn.Linear(hidden, hidden, device=device)
        self.to_out = nn.ModuleList([nn.Linear(hidden, hidden, device=device)])
        self.norm_q = HeadNorm(hidden // heads, device=device) if qk_norm else None
        self.norm_k = HeadNorm(hidden // heads, device=device) if qk_norm else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Attend among the image tokens alone; the shape stays."""
        return self.project_out(_attend(*self.image_heads(x_BLD), None))

    def image_heads(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the image tokens, each [B, L, heads, head width]."""
        q_BLD, k_BLD, v_BLD = linears((self.to_q, self.to_k, self.to_v), x_BLD)
        q_BLHE, k_BLHE = self.split_heads(q_BLD, self.norm_q), self.split_heads(k_BLD, self.norm_k)
        return q_BLHE, k_BLHE, self.split_heads(v_BLD, None)

    def split_heads(self, x_BLD: Tensor, norm: HeadNorm | None) -> Tensor:
        """View the width as heads, and normalise each if the model does."""
        x_BLHE = x_BLD.view(*x_BLD.shape[:2], self.heads, -1)
        return x_BLHE if norm is None else norm.forward(x_BLHE)

    def project_out(self, x_BLD: Tensor) -> Tensor:
        """The output projection of the image stream."""
        out = self.to_out[0]
        assert isinstance(out, nn.Linear)
        return apply_linear(out, x_BLD)


class JointAttention(Attention):
    """Attention over image and text tokens together, each stream with its own projections (SD3 paper, section 4).

    In the last block nothing reads the text afterwards (`context_pre_only`), so its output projection does not exist.
    """

    def __init__(self, hidden: int, heads: int, qk_norm: QkNorm, *, context_pre_only: bool, device: str | None) -> None:
        super().__init__(hidden, heads, qk_norm, device=device)
        self.add_q_proj = nn.Linear(hidden, hidden, device=device)
        self.add_k_proj = nn.Linear(hidden, hidden, device=device)
        self.add_v_proj = nn.Linear(hidden, hidden, device=device)
        self.norm_added_q = HeadNorm(hidden // heads, device=device) if qk_norm else None
        self.norm_added_k = HeadNorm(hidden // heads, device=device) if qk_norm else None
        self.to_add_out = None if context_pre_only else nn.Linear(hidden, hidden, device=device)

    def joint(self, x_BLD: Tensor, text_BMD: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Attend over both streams; returns both updates, the text's only where the block has one.

        `mask`, if any, is added to the scores; it must spread to [B, heads, queries, image and text tokens].
        """
        q_BLHE, k_BLHE, v_BLHE = self.image_heads(x_BLD)
        # In the last block nothing reads what the text asks for, so its queries are not computed.
        asked = () if self.to_add_out is None else (self.add_q_proj,)
        k_BMD, v_BMD, *q_BMD = linears((self.add_k_proj, self.add_v_proj, *asked), text_BMD)
        k_BMHE, v_BMHE = self.split_heads(k_BMD, self.norm_added_k), self.split_heads(v_BMD, None)
        # Joined along the tokens before heads and tokens change places: then each sample is two plain copies.
        k_BSHE, v_BSHE = torch.cat((k_BLHE, k_BMHE), 1), torch.cat((v_BLHE, v_BMHE), 1)
        if self.to_add_out is None:
            update_BLD = self.project_out(_attend(q_BLHE, k_BSHE, v_BSHE, mask))
            update_BLD = _WithUnread.apply(update_BLD, *self._text_query_parameters())  # type: ignore[no-untyped-call]
            return update_BLD, None
        q_BMHE = self.split_heads(q_BMD[0], self.norm_added_q)
        joined_BSD = _attend(torch.cat((q_BLHE, q_BMHE), 1), k_BSHE, v_BSHE, mask)
        # One split, not two slices: its gradient is one concatenation instead of two padded copies and a sum.
        attended_BLD, attended_BMD = torch.split(joined_BSD, [x_BLD.shape[1], text_BMD.shape[1]], dim=1)
        # The linear map folds its bias into the product only if the tokens lie one after the other.
        text_update_BMD = apply_linear(self.to_add_out, attended_BMD.contiguous())
        return self.project_out(attended_BLD.contiguous()), text_update_BMD

    def _text_query_parameters(self) -> list[nn.Parameter]:
        modules = (self.add_q_proj, self.norm_added_q)
        return [parameter for module in modules if module is not None for parameter in module.parameters()]


class _WithUnread(torch.autograd.Function):
    """Hands a tensor through, and gives parameters that nothing reads the zero gradient that they truly have.

    With no gradient at all an optimizer would pass them over, and weight decay would differ from diffusers' model.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *unread: Tensor) -> Tensor:  # noqa: ARG004  they are for `setup_context`
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[Tensor, ...]:
        unread: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        return (*gradients, *(torch.zeros_like(tensor) for tensor in unread))


def _attend(q_BSHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of [B, S, heads, head width]; returns [B, S, D]."""
    out_BHSE = attention(q_BSHE.transpose(1, 2), k_BSHE.transpose(1, 2), v_BSHE.transpose(1, 2), mask)
    return out_BHSE.transpose(1, 2).flatten(2)
