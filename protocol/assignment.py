"""The public rule by which a unit's id, seed and shards follow from the run config alone.

Nobody chooses them: neither the volunteer, who could look for an easy seed, nor the coordinator, who could favour a
friend. Source: PROTOCOL.md section 5; the verifier, not the prover, fixes data and randomness.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence

from protocol.documents import Digest, RunConfig, RunId, ShardRef, UnitId
from protocol.errors import PayloadInvalid


def unit_id(config_sha256: Digest, round_number: int, index: int) -> UnitId:
    """Return SHA-256 over the config digest, the round and the unit's index in it."""
    text = b"commonweight/unit/v1\0" + bytes.fromhex(config_sha256) + b"%d/%d" % (round_number, index)
    return UnitId(hashlib.sha256(text).hexdigest())


def unit_seed(unit: UnitId) -> Digest:
    """Return the 32-byte seed, in hex, that all of a unit's randomness comes from."""
    return Digest(hashlib.sha256(b"commonweight/unit-seed/v1\0" + bytes.fromhex(unit)).hexdigest())


def unit_shards(config: RunConfig, round_number: int, index: int) -> tuple[Digest, ...]:
    """Return the digests of a unit's shards: a group of those whose pictures have one size.

    Units are counted over all rounds of a stage. In each epoch the shards of every size are put into a new order and
    dealt into groups of `shards_per_unit`, or one fewer, the groups of all sizes are put into an order, and each unit
    takes the next: so every shard is in one unit of an epoch, and nobody chooses which.

    Raises:
        PayloadInvalid: no shard has the size that the round's stage asks for; no such run is founded.
    """
    first, shards_of_stage = stage_shards(config, round_number)
    groups = _group_sizes(config, shards_of_stage)
    if not groups:
        raise PayloadInvalid(f"RunConfig: no shard has pictures of the size that round {round_number} trains on.")
    epoch, place = divmod((round_number - first) * config.rounds.units + index, sum(groups.values()))
    names = {
        f"{size[0]}/{size[1]}/{number}": (size, number) for size, count in groups.items() for number in range(count)
    }
    size, number = names[sorted(names, key=lambda name: _epoch_rank(config, epoch, name))[place]]
    shards = [Digest(shard.sha256) for shard in shards_of_stage if (shard.height, shard.width) == size]
    ordered = sorted(shards, key=lambda shard: _epoch_rank(config, epoch, shard))
    return tuple(ordered[number :: groups[size]])


def stage_shards(config: RunConfig, round_number: int) -> tuple[int, tuple[ShardRef, ...]]:
    """Return the first round of the stage that a round is in, and the shards that its units train on.

    A size belongs to the stages whose side is nearer to it than twice or half of it: between side^2 / 2 and 2 side^2
    latent pixels, the upper bound left out.
    """
    begun = [stage for stage in config.rounds.stages if stage.first_round <= round_number]
    if not begun:
        return 1, config.data.shards
    stage = max(begun, key=lambda stage: stage.first_round)
    pixels = stage.side * stage.side
    return stage.first_round, tuple(
        shard for shard in config.data.shards if pixels <= 2 * shard.height * shard.width < 4 * pixels
    )


def _group_sizes(config: RunConfig, shards: Sequence[ShardRef]) -> dict[tuple[int, int], int]:
    """Return into how many groups the shards of each size are dealt."""
    counts = Counter((shard.height, shard.width) for shard in shards)
    return {size: -(-counts[size] // config.rounds.shards_per_unit) for size in sorted(counts)}


def _epoch_rank(config: RunConfig, epoch: int, name: str) -> bytes:
    text = b"commonweight/epoch/v1\0" + bytes.fromhex(config.seed) + f"{epoch}/{name}".encode("ascii")
    return hashlib.sha256(text).digest()


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
