"""Checkpoint 0: the first weights, from the run's seed."""

from diloco.streams import Stream
from diloco.tables import Floats
from mmdit.config import MMDiTConfig
from mmdit.initial import initial_weights


def initial_state(config: MMDiTConfig, seed: bytes) -> dict[str, Floats]:
    """Return all tensors of checkpoint 0, fp32, with the position-embedding buffer.

    Each tensor has its own stream, "init/NAME", so its values do not depend on which other tensors there are.

    Args:
        seed: the run's 32-byte seed.
    """
    return initial_weights(config, lambda name, count: Stream(seed, f"init/{name}").normal(0, 0, count))
