"""The MMDiT of Stable Diffusion 3 (arXiv 2403.03206, section 4), with diffusers' parameter names.

Two streams of tokens, image and text, each with weights of its own, meet in one attention per block. Modulation by the
timestep and the pooled text enters through adaptive layer norms. `state_dict()` has exactly the keys and shapes of
`diffusers.SD3Transformer2DModel`, so a published checkpoint loads there with no conversion.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from mmdit.attention import Attention, JointAttention
from mmdit.config import MMDiTConfig
from mmdit.layers import FeedForward, Modulation, PatchEmbed, TimeTextEmbed, apply_linear, layer_norm, modulate
from mmdit.silence import merge_silence, on_the_keys

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class Block(nn.Module):
    """One joint block: attention over both streams, then a feed-forward net for each."""

    def __init__(self, config: MMDiTConfig, index: int, *, device: str | None) -> None:
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        dual = index in config.dual_attention_layers
        last = index == config.num_layers - 1
        self.norm1 = Modulation(hidden, 9 if dual else 6, device=device)
        self.norm1_context = Modulation(hidden, 2 if last else 6, device=device)
        self.attn = JointAttention(hidden, heads, config.qk_norm, context_pre_only=last, device=device)
        self.attn2 = Attention(hidden, heads, config.qk_norm, device=device) if dual else None
        self.ff = FeedForward(hidden, device=device)
        self.ff_context = None if last else FeedForward(hidden, device=device)

    def forward(
        self, x_BLD: Tensor, text_BMD: Tensor, act_BD: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Update both streams; the last block returns the text as it came.

        Args:
            x_BLD: image tokens.
            text_BMD: text tokens.
            act_BD: SiLU of the conditioning vector, the same for every block.
            mask: added to the scores of the joint attention, if anything is.
        """
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1.forward(act_BD)
        normed_BLD = layer_norm(x_BLD)
        text_in_BMD, text_gates = self._modulated_text(text_BMD, act_BD)
        update_BLD, text_update_BMD = self.attn.joint(modulate(normed_BLD, shift, scale), text_in_BMD, mask)
        x_BLD = torch.addcmul(x_BLD, gate, update_BLD)
        if self.attn2 is not None:
            shift2, scale2, gate2 = dual
            x_BLD = torch.addcmul(x_BLD, gate2, self.attn2.forward(modulate(normed_BLD, shift2, scale2)))
        x_BLD = torch.addcmul(x_BLD, gate_mlp, self.ff.forward(modulate(layer_norm(x_BLD), shift_mlp, scale_mlp)))
        if self.ff_context is not None and text_update_BMD is not None:
            gate, shift_mlp, scale_mlp, gate_mlp = text_gates
            text_BMD = torch.addcmul(text_BMD, gate, text_update_BMD)
            widened = self.ff_context.forward(modulate(layer_norm(text_BMD), shift_mlp, scale_mlp))
            text_BMD = torch.addcmul(text_BMD, gate_mlp, widened)
        return x_BLD, text_BMD

    def _modulated_text(self, text_BMD: Tensor, act_BD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        chunks = self.norm1_context.forward(act_BD)
        # The last block's map comes from another class in diffusers, whose order is scale, shift.
        shift, scale = chunks[:2] if self.ff_context is not None else chunks[::-1]
        return modulate(layer_norm(text_BMD), shift, scale), chunks[2:]


class MMDiT(nn.Module):
    """The transformer: latent, text and timestep in, velocity out.

    `MMDiT(config, device="meta")` allocates nothing. A fresh instance holds torch's default random weights; training
    starts from `mmdit.initial.initial_weights` through `build`. With `checkpointing` a block keeps only what enters it,
    and is computed again for its gradients.
    """

    def __init__(self, config: MMDiTConfig, *, device: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        hidden = config.hidden_size
        self.pos_embed = PatchEmbed(config, device=device)
        self.time_text_embed = TimeTextEmbed(config.pooled_projection_dim, hidden, device=device)
        self.context_embedder = nn.Linear(config.joint_attention_dim, hidden, device=device)
        self.transformer_blocks = nn.ModuleList(Block(config, i, device=device) for i in range(config.num_layers))
        self.norm_out = Modulation(hidden, 2, device=device)
        self.proj_out = nn.Linear(hidden, config.patch_size**2 * config.out_channels, device=device)

    def forward(self, latent_BCHW: Tensor, text_BLD: Tensor, pooled_BP: Tensor, timestep_B: Tensor) -> Tensor:
        """Predict the velocity d latent / d t.

        Args:
            latent_BCHW: noisy latent; H and W are multiples of the patch, up to the position table's size.
            text_BLD: text tokens of width `joint_attention_dim`, zero padded.
            pooled_BP: pooled text.
            timestep_B: 1000 t, a float, with t in 0..1 and t = 1 pure noise.

        Returns:
            velocity [B, out_channels, H, W].

        Raises:
            ValueError: the latent does not fit the patch or the position table.
        """
        x_BLD = self.pos_embed.forward(latent_BCHW)
        # Every modulation starts with the same SiLU: taken once.
        act_BD = functional.silu(self.time_text_embed.forward(timestep_B, pooled_BP))
        text_BMD, louder_BM = merge_silence(text_BLD)
        mask = None if louder_BM is None else on_the_keys(louder_BM, x_BLD.shape[1])
        text_BMD = apply_linear(self.context_embedder, text_BMD)
        for block in self.transformer_blocks:
            assert isinstance(block, Block)
            run = _computed_again if self.checkpointing else Block.forward
            x_BLD, text_BMD = run(block, x_BLD, text_BMD, act_BD, mask)
        scale, shift = self.norm_out.forward(act_BD)
        patches_BLP = apply_linear(self.proj_out, modulate(layer_norm(x_BLD), shift, scale))
        return self._unpatchify(patches_BLP, latent_BCHW.shape[-2:])

    def _unpatchify(self, patches_BLP: Tensor, size: torch.Size) -> Tensor:
        p, channels = self.config.patch_size, self.config.out_channels
        grid = patches_BLP.view(-1, size[0] // p, size[1] // p, p, p, channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, size[0], size[1])


def _computed_again(
    block: Block, x_BLD: Tensor, text_BMD: Tensor, act_BD: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    # Who calls the model with other weights (`functional_call`) takes them away again before the backward pass.
    weights = dict(block.named_parameters())
    inputs = (x_BLD, text_BMD, act_BD, mask)
    # Nothing in a block is random.
    result: tuple[Tensor, Tensor] = checkpoint(
        torch.func.functional_call, block, weights, inputs, use_reentrant=False, preserve_rng_state=False
    )
    return result


def trainable_schema(config: MMDiTConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Name and shape of every parameter, sorted by name; the position table, which is not trained, is left out.

    Nothing of the model's size is allocated.
    """
    model = MMDiT(config, device="meta")
    return tuple(sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters()))


def build(config: MMDiTConfig, weights: Mapping[str, Array], *, device: str) -> MMDiT:
    """A model holding copies of `weights` (names as in `state_dict()`, position table included) on `device`.

    Raises:
        ValueError: a name is missing or unknown, or a shape or dtype differs; the message names it.
    """
    model = MMDiT(config, device="meta")
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if weights.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        raise ValueError(f"these weights are not this model's: missing {missing[:3]}, unknown {unknown[:3]}")
    state: dict[str, Tensor] = {}
    for name, shape in expected.items():
        array = weights[name]
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, the model needs float32 {shape}")
        state[name] = torch.tensor(array, device=device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(requires_grad=True)
