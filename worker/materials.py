"""What a unit is trained from, as files on this disk, and which of the samples in them were taken down."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.documents import RunConfig

if TYPE_CHECKING:  # numpy and torch take seconds to load
    from diloco.shards import ShardSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Materials:
    """The weights to start from, the shards in the unit's order, and of each the samples that its round leaves out.

    `networks`: the folder of the text encoders, for runs whose shards hold captions alone.
    """

    base: Path
    shards: tuple[Path, ...]
    without: tuple[tuple[int, ...], ...]
    networks: Path | None = None

    def shard_set(self, config: RunConfig, device: str) -> "ShardSet":
        """Return the samples that the unit draws from.

        Args:
            device: what text encoders run on, if the run needs them here.

        Raises:
            ShardCorrupt: a file is no shard, or they do not fit each other, the run, or what was taken down.
            NetworksMissing: the run needs text encoders here, and they are not there.
        """
        from diloco.shards import Shard
        from verify.networks import encode_for
        from verify.replay import shard_set

        encode = encode_for(config, self.networks, device)
        return shard_set(config, [Shard.open(path) for path in self.shards], self.without, encode)
