"""Every code that a verdict can carry, with what it means to the volunteer who gets it.

A verdict's own sentence says more (which checkpoint, how far apart); the code is what programs go by.
"""

from enum import StrEnum, unique


@unique
class VerdictCode(StrEnum):
    """What became of a claim. The comment of each is the sentence that the documentation gives."""

    MERGED = "MERGED"  # accepted: part of the checkpoint that the verdict names
    REPLICA = "REPLICA"  # accepted: agreed with another volunteer's result for the same unit, which was merged
    TOO_LATE = "TOO_LATE"  # accepted: in order, but no merge could take it any more
    REPLAY_DIFFERS = "REPLAY_DIFFERS"  # rejected: a referee trained the unit again and got another delta; bans
    FORFEIT = "FORFEIT"  # rejected: drawn for an audit, and its bytes never came
    UNDECIDED = "UNDECIDED"  # rejected: a referee refuted it and its replica alike, and no second referee came; no ban
    OWNER_BANNED = "OWNER_BANNED"  # rejected: not merged, because a referee refuted another claim of this owner
    RETRACTED = "RETRACTED"  # rejected after it was merged: an audit back refuted it, and it was taken out again
    RESTORED = "RESTORED"  # accepted on appeal: a second referee confirmed it, and its owner is admitted again
