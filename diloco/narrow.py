"""Training with little on the device: copies in the run's precision there, fp32 weights wherever there is room.

It does the same arithmetic as `diloco.unit` does with everything on the device, tensor by tensor. Gradients in bf16 are
what autograd computes either way; each is widened when its turn comes.
"""

from collections.abc import Callable, Mapping

import torch

from diloco.draws import Batch
from diloco.execution import Execution
from diloco.tables import Floats
from mmdit.config import MMDiTConfig
from mmdit.flow import flow_loss_B
from mmdit.transformer import MMDiT, build

_CLIP_EPS = 1e-6
"""What `torch.nn.utils.clip_grad_norm_` adds to the norm before it divides."""


class NarrowTrainer:
    """A model in the run's precision on the device; its fp32 weights, `masters`, there too or in main memory."""

    def __init__(
        self,
        config: MMDiTConfig,
        base: Mapping[str, Floats],
        *,
        device: str,
        dtype: torch.dtype,
        execution: Execution,
        grad_clip: float,
        make_optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer],
    ) -> None:
        self._dtype = dtype
        self._parts = execution.parts
        self._grad_clip = grad_clip
        self._device = device
        self._away = execution.keeping == "host"
        self._home = "cpu" if self._away else device
        whole = build(config, base, device=self._home)
        self.masters = dict(sorted(whole.named_parameters()))
        # One optimiser for each tensor, so that no more than one gradient is ever in fp32.
        self._optimizers = {name: make_optimizer([master]) for name, master in self.masters.items()}
        # In fp32 with everything on the device a copy would be the same numbers twice.
        self._copies = self._away or dtype != torch.float32
        self._model = _copied(whole, device, dtype, copy=self._copies)
        self._model.checkpointing = execution.checkpointing
        self._parameters = dict(self._model.named_parameters())
        self._gradients: dict[str, torch.Tensor] = {}
        self._arrived: set[str] = set()
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(self._taker(name))  # type: ignore[no-untyped-call]

    def step(self, drawn: Batch, lr: float) -> list[torch.Tensor]:
        """Make one step on a batch; return the loss of each part, which add up to the batch's.

        Args:
            drawn: the batch, on the CPU, fp32.
            lr: this step's learning rate.
        """
        losses: list[torch.Tensor] = []
        self._arrived.clear()
        for part in (each.to(self._device) for each in drawn.parts(self._parts)):
            loss = flow_loss_B(self._predict, part.latent, part.text, part.pooled, part.noise, part.t).mean()
            if self._parts > 1:
                loss = loss / self._parts
            torch.autograd.backward([loss])
            losses.append(loss.detach())
        self._update(lr)
        return losses

    def _predict(
        self, latent_BCHW: torch.Tensor, text_BLD: torch.Tensor, pooled_BP: torch.Tensor, timestep_B: torch.Tensor, /
    ) -> torch.Tensor:
        # Timesteps stay fp32: bf16 would merge neighbours. The model narrows them after they have become waves.
        narrow = (x.to(self._dtype) for x in (latent_BCHW, text_BLD, pooled_BP))
        velocity_BCHW: torch.Tensor = self._model(*narrow, timestep_B)
        return velocity_BCHW

    def _taker(self, name: str) -> Callable[[torch.Tensor], None]:
        """Return what takes the tensor's gradient as soon as a backward pass has it."""

        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if name in self._arrived:
                self._gradients[name].add_(gradient.to(self._home))
                return
            self._arrived.add(name)
            kept = gradient.dtype if self._parts == 1 else torch.float32
            if not self._away:
                self._gradients[name] = gradient.to(kept)
            elif name in self._gradients:  # main memory is taken once, since touching new pages costs
                self._gradients[name].copy_(gradient)
            else:
                self._gradients[name] = gradient.to(self._home).to(kept)

        return take

    @torch.no_grad()
    def _update(self, lr: float) -> None:
        norms = [torch.linalg.vector_norm(self._gradients[name].float()) for name in self.masters]
        share = (self._grad_clip / (torch.linalg.vector_norm(torch.stack(norms)) + _CLIP_EPS)).clamp_(max=1.0)
        for name, master in self.masters.items():
            gradient = self._gradients[name] if self._away else self._gradients.pop(name)
            master.grad = gradient.float() * share
            del gradient
            optimizer = self._optimizers[name]
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            master.grad = None
            if self._copies:
                self._parameters[name].copy_(master)


def _copied(whole: MMDiT, device: str, dtype: torch.dtype, *, copy: bool) -> MMDiT:
    """Return the model on `device`, its parameters in `dtype`, copied or else sharing their memory."""
    model = MMDiT(whole.config, device="meta")
    state = {name: parameter.detach().to(device, dtype, copy=copy) for name, parameter in whole.named_parameters()}
    state |= {name: buffer.to(device) for name, buffer in whole.named_buffers()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(requires_grad=True).train()
