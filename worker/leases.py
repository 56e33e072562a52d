"""Does a lease follow from the run's public rule? Nobody may choose a volunteer's data or seed, nor its base."""

from dataclasses import dataclass

from protocol.assignment import unit_id, unit_seed, unit_shards
from protocol.documents import Digest, FileEntry, Lease, Manifest, RunConfig
from protocol.errors import AnswerInvalid
from protocol.keys import KeyId
from protocol.layout import ROLE_DELTA, ROLE_WEIGHTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A lease whose signature holds, as it came: its envelope, the time left, and the checkpoint it starts from."""

    lease: Lease
    envelope: bytes
    remaining_ms: int
    base_checkpoint: int


def check_grant(grant: Grant, config: RunConfig, config_sha256: Digest, device: KeyId) -> None:
    """Check a lease before any time or traffic is spent on it.

    Checks: 0 it is this device's; 1 the index is one of the round's; 2 unit, seed and shards follow from round and
    index; 3 the base is the checkpoint before the round; 4 it lets a delta be uploaded.

    Raises:
        AnswerInvalid: a check fails; the coordinator is wrong or lies, so the lease is not worked on.
    """
    lease = grant.lease
    unit = unit_id(config_sha256, lease.round, lease.index)
    if lease.device != device:  # 0
        raise AnswerInvalid("The lease is for another device.")
    if lease.index >= config.rounds.units:  # 1
        raise AnswerInvalid(f"The lease is for unit {lease.index} of a round of {config.rounds.units}.")
    if lease.unit != unit or lease.seed != unit_seed(unit):  # 2, stops a hand-picked seed
        raise AnswerInvalid("The lease's unit and seed do not follow from its round and index.")
    if lease.shards != unit_shards(config, lease.round, lease.index):  # 2, stops hand-picked data
        raise AnswerInvalid("The lease's shards do not follow from its round and index.")
    if grant.base_checkpoint != lease.round - 1:  # 3
        raise AnswerInvalid(f"A unit of round {lease.round} can't start from checkpoint {grant.base_checkpoint}.")
    if not any(limit.role == ROLE_DELTA for limit in lease.artifacts):  # 4
        raise AnswerInvalid("The lease does not let a delta be uploaded.")


def check_base(manifest: Manifest, round_number: int, base_sha256: str | None) -> FileEntry:
    """Return the weights that a round starts from, as the manifest of the checkpoint before it names them.

    Args:
        base_sha256: the weights that a lease names; None where nobody else names any.

    Raises:
        AnswerInvalid: the manifest is another checkpoint's, or names other weights.
    """
    if manifest.checkpoint != round_number - 1:
        raise AnswerInvalid(f"The manifest is of checkpoint {manifest.checkpoint}, not {round_number - 1}.")
    weights = manifest.state_file(ROLE_WEIGHTS)
    if weights is None or base_sha256 not in (None, weights.sha256):
        # Stops a coordinator from training volunteers from weights that it did not publish.
        raise AnswerInvalid(f"The lease's base is not the published weights of checkpoint {manifest.checkpoint}.")
    return weights
