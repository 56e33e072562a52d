"""The public rule by which pictures that were taken down are left out of a unit, and what makes a list of them hold.

A list only grows, and each entry counts from the round after the checkpoint whose manifest is the first to name it. So
any newer list says the same of an older round, and no unit that is at work changes its meaning.
"""

from collections import Counter

from protocol.documents import RunConfig, Takedowns
from protocol.errors import PayloadInvalid, TakedownsDiffer


def samples_taken_down(takedowns: Takedowns | None, round_number: int, shard: str) -> tuple[int, ...]:
    """Return which samples of a shard the units of a round leave out: their numbers in the shard, in ascending order.

    Args:
        takedowns: the list that holds for the round, or any newer one; None: nothing was taken down yet.
    """
    entries = () if takedowns is None else takedowns.entries
    return tuple(sorted(entry.sample for entry in entries if entry.shard == shard and entry.from_round <= round_number))


def samples_of(config: RunConfig) -> dict[str, int]:
    """Return how many samples each of the run's shards holds, the held-out one among them, by SHA-256."""
    return {shard.sha256: shard.samples for shard in (*config.data.shards, config.data.heldout)}


def check_takedowns(takedowns: Takedowns, config: RunConfig, checkpoint: int) -> None:
    """Check a list that the manifest of a checkpoint names, by itself.

    Raises:
        PayloadInvalid: it names a sample that is none, or one twice; leaves nothing of a shard; is not in the order of
            its rounds; or reaches beyond the next one.
    """
    samples = samples_of(config)
    seen: set[tuple[str, int]] = set()
    last = 0
    for entry in takedowns.entries:
        name = f"Takedowns: sample {entry.sample} of shard {entry.shard[:12]}"
        if entry.sample >= samples.get(entry.shard, 0):
            raise PayloadInvalid(f"{name} is no sample of the run.")
        if (entry.shard, entry.sample) in seen:
            raise PayloadInvalid(f"{name} is taken down twice.")
        if not last <= entry.from_round <= checkpoint + 1:
            raise PayloadInvalid(f"{name} counts from round {entry.from_round}, out of order.")
        seen.add((entry.shard, entry.sample))
        last = entry.from_round
    for shard, count in Counter(shard for shard, _ in seen).items():
        if count >= samples[shard]:
            raise PayloadInvalid(f"Takedowns: nothing is left of shard {shard[:12]}.")


def check_grown(before: Takedowns | None, after: Takedowns | None, checkpoint: int) -> None:
    """Check that a list holds all of an older one, and beside that only what counts later.

    Args:
        before: what the manifest of `checkpoint` names.
        after: what the manifest of a later checkpoint names.

    Raises:
        TakedownsDiffer: the past was rewritten, which nobody may do to units that were trained by it.
    """
    old, new = (() if found is None else found.entries for found in (before, after))
    if new[: len(old)] != old:
        raise TakedownsDiffer(
            f"The list of pictures taken down that checkpoint {checkpoint} names was rewritten since: a list may only "
            "grow. The operator must answer for that."
        )
    if any(entry.from_round <= checkpoint + 1 for entry in new[len(old) :]):
        raise TakedownsDiffer(
            f"A picture was taken down after checkpoint {checkpoint} for rounds whose units were leased before that. "
            "The operator must answer for that."
        )
