"""The public rule by which a unit's id, seed and shards follow from the run config alone.

Nobody chooses them: neither the volunteer, who could look for an easy seed, nor the coordinator, who could favour a
friend. Source: PROTOCOL.md section 5; the verifier, not the prover, fixes data and randomness.
"""

import hashlib

from protocol.documents import Digest, RunConfig, RunId, UnitId


def unit_id(config_sha256: Digest, round_number: int, index: int) -> UnitId:
    """Return SHA-256 over the config digest, the round and the unit's index in it."""
    text = b"commonweight/unit/v1\0" + bytes.fromhex(config_sha256) + b"%d/%d" % (round_number, index)
    return UnitId(hashlib.sha256(text).hexdigest())


def unit_seed(unit: UnitId) -> Digest:
    """Return the 32-byte seed, in hex, that all of a unit's randomness comes from."""
    return Digest(hashlib.sha256(b"commonweight/unit-seed/v1\0" + bytes.fromhex(unit)).hexdigest())


def unit_shards(config: RunConfig, round_number: int, index: int) -> tuple[Digest, ...]:
    """Return the digests of a unit's shards: consecutive ones in the run's order, which covers them evenly."""
    shards = config.data.shards
    per_unit = min(config.rounds.shards_per_unit, len(shards))
    first = ((round_number - 1) * config.rounds.units + index) * per_unit
    return tuple(Digest(shards[(first + k) % len(shards)].sha256) for k in range(per_unit))


def is_short(config: RunConfig, unit: UnitId) -> bool:
    """Return whether a unit is one of the short ones: whether the first 24 bits of its id are below `short_share`.

    So that slow machines have something to do that they finish in time. Nobody chooses which units they are.
    """
    return unit < short_below(config)


def short_below(config: RunConfig) -> str:
    """Return the text that the ids of short units, and of no others, come before in alphabetical order."""
    share = config.training.short_share
    return f"{share:06x}" if share < 1 << 24 else "g"


def unit_steps(config: RunConfig, unit: UnitId) -> int:
    """Return the inner steps of a unit."""
    return config.training.short_steps if is_short(config, unit) else config.training.steps


def unit_samples(config: RunConfig, unit: UnitId) -> int:
    """Return how many samples a unit trains on, which is what it weighs in a merge."""
    return unit_steps(config, unit) * config.training.batch


def most_samples(config: RunConfig) -> int:
    """Return how many samples the largest units train on."""
    return config.training.steps * config.training.batch


def lr_scale(config: RunConfig, round_number: int) -> float:
    """Return the learning rate's share in a round: linear from 1 in round 1 to `lr_final_share` in the last one."""
    planned = config.rounds.planned
    if planned == 1:
        return 1.0
    progress = min(round_number - 1, planned - 1) / (planned - 1)
    return 1.0 - (1.0 - config.training.lr_final_share) * progress


def member_of(run: RunId, owner: str) -> Digest:
    """Return the pseudonym, in a run's public records, of the owner whose key has the id `owner` (64 hex digits).

    Stable within the run, and not linkable to the same key in another run.
    """
    return Digest(hashlib.sha256(b"commonweight/member/v1\0" + bytes.fromhex(run + owner)).hexdigest())
