"""Where things lie under a run's public directory, on disk and behind its public URL alike."""

from typing import Final

RUN_CONFIG: Final = "run.json"
ROOT_KEY: Final = "root.pub"
"""The root's public key, 64 hex digits and a newline; its SHA-256 is the run id."""
DELEGATION: Final = "delegation.json"
LATEST: Final = "latest.json"
"""A copy of the newest checkpoint's signed manifest."""
CALIBRATION: Final = "calibration.json"
"""The measurements that the run's tolerances come from, if it was calibrated; the run config names its digest."""
DATASET: Final = "dataset.json"
"""What the curator of the data has signed, if the run's data has one."""
TAKEDOWNS: Final = "takedowns.json"
"""A copy of the newest list of pictures taken down, once there is one."""
MANIFEST: Final = "manifest.json"
WEIGHTS: Final = "transformer/diffusion_pytorch_model.safetensors"
MOMENTUM: Final = "state/momentum.safetensors"
RESIDUAL: Final = "state/residual.safetensors"
EMA: Final = "ema/diffusion_pytorch_model.safetensors"
"""The running average of the weights, if the run keeps one; with a config.json beside it, a model of its own."""
PATCH: Final = "patch.safetensors.zst"
"""What leads from the weights of the checkpoint before to a checkpoint's own."""

ROLE_DELTA: Final = "delta"
ROLE_WEIGHTS: Final = "weights"
ROLE_MOMENTUM: Final = "momentum"
ROLE_RESIDUAL: Final = "residual"
ROLE_EMA: Final = "ema"


STATE: Final = (WEIGHTS, MOMENTUM, RESIDUAL)
"""A round's whole state: what the next one starts from, each file as large as the model in fp32."""
STATE_ROLES: Final = {WEIGHTS: ROLE_WEIGHTS, MOMENTUM: ROLE_MOMENTUM, RESIDUAL: ROLE_RESIDUAL, EMA: ROLE_EMA}


def checkpoint_directory(checkpoint: int) -> str:
    """Return the directory of a checkpoint; in it lie its manifest and every file that the manifest lists."""
    return f"checkpoints/{checkpoint:06d}"


def shard_path(sha256: str) -> str:
    """Return the path of a data shard."""
    return f"shards/{sha256}.safetensors"


def delta_path(sha256: str) -> str:
    """Return the path of a merged delta, by the SHA-256 of its file."""
    return f"deltas/{sha256}.safetensors.zst"


def takedowns_path(sha256: str) -> str:
    """Return the path of a list of pictures taken down, by the SHA-256 of its payload."""
    return f"takedowns/{sha256}.json"


def log_path(checkpoint: int) -> str:
    """Return the path of the log entries that a checkpoint's manifest closes, one JSON object a line."""
    return f"log/{checkpoint:06d}.jsonl"


LOG_TAIL: Final = "log/tail.jsonl"
"""The log entries after the newest manifest: verdicts, the revealed epoch, the round that is open."""


def metrics_path(checkpoint: int) -> str:
    """Return the path of a checkpoint's measurements (validation loss); informative, not part of its identity."""
    return f"metrics/{checkpoint:06d}.json"
