"""What a run will ask of the coordinator's disk and uplink, from its settings alone; `init` prints it."""

from dataclasses import dataclass
from typing import Final

from diloco.checkpoint import checkpoint_layout
from diloco.container import largest_container
from diloco.schema import schema_of
from mmdit.config import MMDiTConfig
from mmdit.initial import POSITION_TABLE
from protocol.documents import RunConfig
from protocol.limits import GIB, KIB, MIB
from verify.replay import codec_config, patch_config

_BITS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Sizes in bytes, except where a name says otherwise. `retain_rounds` is 0 for all.

    Downloads are the most that a round can ask for: every unit by another device, which has the weights of no earlier
    round and none of its shards. A device that stays fetches each shard once, and of each round only the patch.

    delta, patch: the most bytes that one may have.
    """

    parameters: int
    weights: int
    delta: int
    patch: int
    shards: int
    shards_per_unit: int
    units: int
    planned: int
    retain_rounds: int
    snapshot_every: int
    kept_states: int
    min_window_seconds: float
    averages: bool

    @property
    def state(self) -> int:
        """A round's whole state: weights, outer momentum, residual, and the running average if there is one."""
        return (4 if self.averages else 3) * self.weights

    @property
    def deltas(self) -> int:
        """The deltas of one round."""
        return self.units * self.delta

    @property
    def disk_per_round(self) -> int:
        """What a round adds on the average, as long as its deltas are kept."""
        return self.patch + self.state // self.snapshot_every + self.deltas

    @property
    def disk_in_all(self) -> int:
        """The whole run, with the states of the last rounds, and one round more being uploaded and merged."""
        kept = min(self.retain_rounds or self.planned, self.planned)
        snapshots = 1 + -(-self.planned // self.snapshot_every)
        states = min(snapshots + self.kept_states + 1, self.planned + 1)
        return self.shards + states * self.state + (self.planned + 1) * self.patch + (kept + 1) * self.deltas

    @property
    def uplink_per_round(self) -> int:
        """What volunteers fetch in a round, at most: weights and shards for every unit."""
        return self.units * (self.weights + self.shards_per_unit)

    def lines(self) -> tuple[str, ...]:
        """Return the forecast as sentences for an operator."""
        kept = f"deltas of {self.retain_rounds:,} rounds" if self.retain_rounds else "all deltas"
        delta = show_bytes(self.delta)
        state = f"a checkpoint has {show_bytes(self.weights)} of weights, as much momentum and residual"
        length = f"{self.planned:,} rounds of {self.units:,} units, keeping {kept}"
        return (
            f"model: {self.parameters:,} parameters; {state}",
            (
                f"bytes a unit: a delta of at most {delta} up, {show_bytes(self.shards_per_unit)} of shards down "
                f"unless they are there already, and a patch of at most {show_bytes(self.patch)} a round"
            ),
            f"disk: {show_bytes(self.disk_per_round)} a round; {show_bytes(self.disk_in_all)} for {length}",
            f"uplink: at most {show_bytes(self.uplink_per_round)} a round to volunteers{self._rate()}",
            f"downlink: {show_bytes(self.deltas)} a round from volunteers",
        )

    def _rate(self) -> str:
        if not self.min_window_seconds:
            return ""
        megabits = self.uplink_per_round * _BITS / self.min_window_seconds / 1e6
        return f", or {megabits:,.1f} Mbit/s if a round lasts no more than {self.min_window_seconds:,g} s"


def forecast(config: RunConfig, *, retain_rounds: int, snapshot_every: int) -> Forecast:
    """Return the forecast of a run; `retain_rounds` and `snapshot_every` as in run.toml."""
    shape = MMDiTConfig.from_diffusers(config.model)
    schema = schema_of(shape)
    table = (1, shape.pos_embed_max_size**2, shape.hidden_size)
    layout = checkpoint_layout({POSITION_TABLE: table, **{spec.name: spec.shape for spec in schema.tensors}})
    shards = config.data.shards
    per_unit = min(config.rounds.shards_per_unit, len(shards)) * sum(shard.size for shard in shards) // len(shards)
    return Forecast(
        parameters=schema.num_elements,
        weights=len(layout.prefix()) + layout.data_bytes(),
        delta=largest_container(schema, codec_config(config)),
        patch=largest_container(schema, patch_config(config).codec),
        shards=sum(shard.size for shard in shards) + config.data.heldout.size,
        shards_per_unit=per_unit,
        units=config.rounds.units,
        planned=config.rounds.planned,
        retain_rounds=retain_rounds,
        snapshot_every=snapshot_every,
        kept_states=config.rounds.staleness_bound + 2,
        averages=config.outer.ema_decay > 0,
        min_window_seconds=config.rounds.min_window_ms / 1000,
    )


def show_bytes(count: int) -> str:
    """Return a size as people read it: "3.2 MiB"."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"
