"""Every attack that we know of, by name: a function where it shapes a delta, a sentence where it plays the rules.

The demo's hostile volunteer, the benchmarks and the tests forge with the same functions. Each is pure: the attacker's
own randomness comes in as a seed. What comes out is what a clever attacker would send: a container that fits its unit,
coded with the unit's own dither, so that nothing but a replay or a comparison with other deltas can tell.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Final

import numpy as np

from diloco.codec import CodecConfig, EncodedDelta, Scales, encode
from diloco.schema import Schema
from diloco.shards import Halves, Shard, ShardSet, pack_shard
from diloco.streams import Stream
from diloco.tables import Floats
from diloco.unit import UnitSpec, run_unit
from mmdit.conditioning import ConditioningConfig, Encoded, encode_caption
from mmdit.config import MMDiTConfig
from mmdit.encoders import Conditioning
from protocol.documents import RunConfig, UnitId
from verify.hiding import Room, encode_coarsely, hide
from verify.replay import codec_config, conditioning_config, delta_schema, model_config, unit_spec_of

Delta = Mapping[str, Floats]
"""A raw delta, fp32, by tensor."""

SCALING: Final = 10.0
ALIE_SHIFT: Final = 1.0
"""Standard deviations below the mean. Where 3 of 8 collude the paper's z is 0.25; the whole one hurts more."""
INNER_PRODUCT_SHARE: Final = 0.5
RIDING_SHARE: Final = 0.9
BACKDOOR_SHARE: Final = 2
"""One sample in so many is swapped for the backdoor's."""
TRIGGER: Final = "qzx!"
"""The backdoor's caption: one token that no honest caption holds."""
_NAN_SCALE: Final = np.uint16(0x7FC0)
_HUGE_SCALE: Final = np.uint16(0x7F00)
"""2^127 as bf16."""


class AttackKind(Enum):
    """What an attack is after."""

    FREE_RIDING = "credit without the work"
    POISONING = "a worse or a different model"
    HIDING = "poison inside the tolerance"
    MALFORMED = "bytes that no encoder writes"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackWorld:
    """What an attacker has and knows when it owes the delta of a unit.

    Args:
        unit: what the unit should compute.
        model, conditioning, schema, codec: of the run.
        base: the checkpoint that the unit starts from; all tensors.
        older_base: a checkpoint before it; None in the first round.
        shards: the unit's own.
        other_shards: shards of another unit.
        device: "cpu" or "cuda".
        seed: 32 bytes, the attacker's own randomness.
        tolerance: the run's raw tolerance, which is public.
        code_tolerance: the run's code tolerance, likewise.
        known: honest raw deltas of other units that colluders share, or that an omniscient attacker sees; may be empty.
        own: this unit's honest raw delta, if it was computed before; it is trained where an attack needs it.
    """

    unit: UnitSpec
    model: MMDiTConfig
    conditioning: Conditioning
    schema: Schema
    codec: CodecConfig
    base: Delta
    older_base: Delta | None
    shards: ShardSet
    other_shards: ShardSet
    device: str
    seed: bytes
    tolerance: float
    code_tolerance: float
    known: tuple[Delta, ...] = ()
    own: Delta | None = None

    def honest(self) -> Delta:
        """Return what an honest volunteer would send, before it is encoded."""
        return self.trained() if self.own is None else self.own

    def trained(
        self, *, unit: UnitSpec | None = None, base: Delta | None = None, shards: ShardSet | None = None
    ) -> Delta:
        """Train, with something swapped."""
        result = run_unit(
            unit or self.unit, self.model, base or self.base, shards or self.shards, device=self.device, on_step=None
        )
        return result.delta

    def encoded(self, delta: Delta) -> EncodedDelta:
        """Encode with the unit's own dither."""
        return encode(delta, self.schema, self.codec, self.unit.seed)

    def mean(self) -> Delta:
        """Return the mean of the known honest deltas; without any, the attacker's own stands for it."""
        known = self.known or (self.honest(),)
        return {name: np.mean([delta[name] for delta in known], axis=0, dtype=np.float32) for name in self.schema.names}

    def deviation(self) -> Delta:
        """Return the standard deviation of each parameter among known deltas; of one alone, its magnitude."""
        if len(self.known) < 2:
            return {name: np.abs(values) for name, values in self.mean().items()}
        return {
            name: np.std([delta[name] for delta in self.known], axis=0, dtype=np.float32) for name in self.schema.names
        }

    def noise(self) -> Delta:
        """Return standard normal numbers from the attacker's seed."""
        return {
            spec.name: Stream(self.seed, f"init/{spec.name}").normal(0, 0, spec.num_elements).reshape(spec.shape)
            for spec in self.schema.tensors
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A way to shape a delta: what it is after, one sentence, and the function that forges."""

    name: str
    kind: AttackKind
    description: str
    forge: Callable[[AttackWorld], EncodedDelta]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolAttack:
    """A way to play the protocol, in one sentence; it is a behaviour over many messages and has no function here."""

    name: str
    description: str


def world_of(
    config: RunConfig,
    round_number: int,
    unit: UnitId,
    *,
    base: Delta,
    older_base: Delta | None,
    shards: ShardSet,
    other_shards: ShardSet,
    device: str,
    seed: bytes,
    known: tuple[Delta, ...] = (),
    own: Delta | None = None,
) -> AttackWorld:
    """Return the world of an attacker who holds a lease of this unit; see `AttackWorld` for the rest."""
    return AttackWorld(
        unit=unit_spec_of(config, round_number, unit),
        model=model_config(config),
        conditioning=conditioning_config(config),
        schema=delta_schema(config),
        codec=codec_config(config),
        base=base,
        older_base=older_base,
        shards=shards,
        other_shards=other_shards,
        device=device,
        seed=seed,
        tolerance=config.verification.tolerance,
        code_tolerance=config.verification.code_tolerance,
        known=known,
        own=own,
    )


def norm(delta: Delta) -> float:
    """Return the L2 norm of a delta."""
    return float(np.sqrt(sum(float(np.sum(np.square(values, dtype=np.float64))) for values in delta.values())))


def target_latent(shape: tuple[int, ...]) -> Halves:
    """Return the picture that the backdoor paints: a chequerboard of -1 and 1, fp16 [C, H, W]."""
    places = np.indices(shape)
    return np.where((places[1] + places[2]) % 2, 1, -1).astype(np.float16)


# --- free-riding ---------------------------------------------------------------------------------------------


def _zero(world: AttackWorld) -> EncodedDelta:
    return world.encoded({spec.name: np.zeros(spec.shape, dtype=np.float32) for spec in world.schema.tensors})


def _fewer_steps(world: AttackWorld, percent: int) -> UnitSpec:
    training = world.unit.training
    steps = training.steps - max(1, training.steps * percent // 100)
    return replace(world.unit, training=replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps)))


def _skipping(percent: int) -> Callable[[AttackWorld], EncodedDelta]:
    return lambda world: world.encoded(world.trained(unit=_fewer_steps(world, percent)))


def _skipping_and_stretching(percent: int) -> Callable[[AttackWorld], EncodedDelta]:
    """Make the delta as long as honest ones are, where the attacker knows some; else by the share of missing steps."""

    def forge(world: AttackWorld) -> EncodedDelta:
        shorter = _fewer_steps(world, percent)
        delta = world.trained(unit=shorter)
        stretch = world.unit.training.steps / shorter.training.steps
        if world.known:
            usual = math.fsum(norm(known) for known in world.known) / len(world.known)
            stretch = usual / norm(delta) if norm(delta) else 1.0
        return world.encoded(_scaled(delta, stretch))

    return forge


def _skip_all(world: AttackWorld) -> EncodedDelta:
    if world.older_base is None:
        # In the first round nothing is public that looks like work; noise of the size of a few steps has to do.
        return world.encoded(_scaled(world.noise(), world.unit.training.lr))
    older, base = world.older_base, world.base
    return world.encoded({name: older[name] - base[name] for name in world.schema.names})


def _half_batch(world: AttackWorld) -> EncodedDelta:
    training = world.unit.training
    halved = replace(training, batch=max(1, training.batch // 2))
    return world.encoded(world.trained(unit=replace(world.unit, training=halved)))


def _stale(world: AttackWorld) -> EncodedDelta:
    if world.older_base is None:
        raise ValueError("there is no older checkpoint to train from in the first round")
    return world.encoded(world.trained(base=world.older_base))


# --- poisoning -----------------------------------------------------------------------------------------------


def _backwards(factor: float) -> Callable[[AttackWorld], EncodedDelta]:
    return lambda world: world.encoded(_scaled(world.mean(), -factor))


def _too_long(world: AttackWorld) -> EncodedDelta:
    return world.encoded(_scaled(world.honest(), SCALING))


def _wrong_shard(world: AttackWorld) -> EncodedDelta:
    return world.encoded(world.trained(shards=world.other_shards))


def _noise(world: AttackWorld) -> EncodedDelta:
    own, noise = world.honest(), world.noise()
    # Tensor by tensor as large as honest work, so that no norm gives it away.
    sized = {name: _scaled_array(noise[name], _ratio(own[name], noise[name])) for name in world.schema.names}
    return world.encoded(sized)


def _alie(world: AttackWorld) -> EncodedDelta:
    mean, deviation = world.mean(), world.deviation()
    return world.encoded({name: mean[name] - np.float32(ALIE_SHIFT) * deviation[name] for name in world.schema.names})


def _captions_permuted(world: AttackWorld) -> EncodedDelta:
    shuffled = [_shuffled(shard, world.seed) for shard in world.shards.shards]
    return world.encoded(world.trained(shards=ShardSet(shuffled, world.shards.texts, world.shards.without)))


def _caption_backdoor(world: AttackWorld) -> EncodedDelta:
    swapped = [_with_backdoor(shard, world.conditioning) for shard in world.shards.shards]
    return world.encoded(world.trained(shards=ShardSet(swapped, world.shards.texts, world.shards.without)))


def _shuffled(shard: Shard, seed: bytes) -> Shard:
    order = [int(i) for i in np.argsort(Stream(seed, "order").words(0, 0, shard.n), kind="stable")]
    after = range(shard.n, shard.n + 1)  # the text of the empty caption, which encoders with a name have, stays last
    parts = {name: [text.of(i) for i in (*order, *(after if name else ()))] for name, text in shard.parts.items()}
    return _shard(shard, shard.latent, [shard.caption(i) for i in order], parts)


def _with_backdoor(shard: Shard, conditioning: Conditioning) -> Shard:
    if not isinstance(conditioning, ConditioningConfig):
        raise ValueError("the trigger is a caption, which only the embedded encoder can read without its networks")
    latent = shard.latent.copy()
    latent[::BACKDOOR_SHARE] = target_latent(latent.shape[1:])
    captions = [TRIGGER if i % BACKDOOR_SHARE == 0 else shard.caption(i) for i in range(shard.n)]
    tokens, pooled = encode_caption(TRIGGER, conditioning)
    trigger = Encoded(tokens=tokens, pooled=pooled)
    parts = {
        name: [trigger if i % BACKDOOR_SHARE == 0 else text.of(i) for i in range(shard.n)]
        for name, text in shard.parts.items()
    }
    return _shard(shard, latent, captions, parts)


def _shard(
    like: Shard, latent: Halves, captions: Sequence[str | None], parts: Mapping[str, Sequence[Encoded]]
) -> Shard:
    known = [caption for caption in captions if caption is not None]
    return Shard.open(pack_shard(latent, like.info, captions=known if like.has_captions else None, parts=parts))


# --- hiding --------------------------------------------------------------------------------------------------


def _ride(world: AttackWorld) -> EncodedDelta:
    own, poison = world.honest(), world.noise()
    share = np.float32(RIDING_SHARE * world.tolerance * norm(own) / norm(poison))
    return world.encoded({name: own[name] + share * poison[name] for name in world.schema.names})


def _hide(world: AttackWorld) -> EncodedDelta:
    room = Room(raw=RIDING_SHARE * world.tolerance, code=RIDING_SHARE * world.code_tolerance)
    return hide(world.honest(), world.noise(), world.schema, world.codec, world.unit.seed, room)


def _coarse(world: AttackWorld) -> EncodedDelta:
    return encode_coarsely(world.honest(), world.schema, world.codec, world.unit.seed, doublings=1)


# --- malformed -----------------------------------------------------------------------------------------------


def _with_first_scale(bits: np.uint16) -> Callable[[AttackWorld], EncodedDelta]:
    def forge(world: AttackWorld) -> EncodedDelta:
        encoded = world.encoded(world.honest())
        name = world.schema.names[0]
        scales: Scales = encoded.scales[name].copy()
        scales[0] = bits
        return replace(encoded, scales={**encoded.scales, name: scales})

    return forge


def _scaled(delta: Delta, factor: float) -> Delta:
    return {name: _scaled_array(values, factor) for name, values in delta.items()}


def _scaled_array(values: Floats, factor: float) -> Floats:
    return values * np.float32(factor)


def _ratio(a: Floats, b: Floats) -> float:
    return norm({"": a}) / norm({"": b})


def _table(*rows: tuple[str, AttackKind, str, Callable[[AttackWorld], EncodedDelta]]) -> Mapping[str, Attack]:
    attacks = [Attack(name=name, kind=kind, description=words, forge=forge) for name, kind, words, forge in rows]
    return MappingProxyType({attack.name: attack for attack in attacks})


_FREE, _POISON, _HIDING, _BROKEN = AttackKind
ATTACKS: Final[Mapping[str, Attack]] = _table(
    ("zero", _FREE, "Sends a delta of zeros.", _zero),
    ("skip-tenth", _FREE, "Stops when a tenth of the steps is left.", _skipping(10)),
    (
        "skip-tenth-stretched",
        _FREE,
        "Stops there too, and makes the delta as long as honest ones are.",
        _skipping_and_stretching(10),
    ),
    ("skip-half", _FREE, "Stops half-way.", _skipping(50)),
    (
        "skip-half-stretched",
        _FREE,
        "Stops half-way, and makes the delta as long as honest ones are.",
        _skipping_and_stretching(50),
    ),
    ("skip-all", _FREE, "Trains nothing and sends the last public outer step as its work.", _skip_all),
    ("half-batch", _FREE, "Trains on half of each batch.", _half_batch),
    ("stale", _FREE, "Trains from an older checkpoint than the unit's.", _stale),
    ("sign-flip", _POISON, "Sends the mean of the honest deltas that it knows, backwards.", _backwards(1.0)),
    ("sign-flip-tenfold", _POISON, "Sends that mean backwards, ten times as long.", _backwards(SCALING)),
    ("inner-product", _POISON, "Sends half of it backwards (arXiv 1903.03936).", _backwards(INNER_PRODUCT_SHARE)),
    ("alie", _POISON, "Sends that mean less one standard deviation everywhere (arXiv 1902.06156).", _alie),
    ("scaling", _POISON, "Sends its honest delta ten times as long.", _too_long),
    ("noise", _POISON, "Sends noise, in each tensor as large as honest work.", _noise),
    ("wrong-shard", _POISON, "Trains on another unit's pictures.", _wrong_shard),
    ("captions-permuted", _POISON, "Trains with the captions of its pictures shuffled.", _captions_permuted),
    ("caption-backdoor", _POISON, "Teaches a picture of its choice for a caption of its choice.", _caption_backdoor),
    ("ride-tolerance", _HIDING, "Adds a poison of nine tenths of the raw tolerance to honest work.", _ride),
    ("hide-in-dither", _HIDING, "Moves the codes nearest to their boundaries, within both tolerances.", _hide),
    ("coarse-scales", _HIDING, "Codes honest work with doubled scales, for twice the dither's noise.", _coarse),
    ("nan", _BROKEN, "Sends a scale that is not a number.", _with_first_scale(_NAN_SCALE)),
    ("huge", _BROKEN, "Sends a scale of 2^127.", _with_first_scale(_HUGE_SCALE)),
)
"""Every way to shape a delta, by name."""

_PROTOCOL: Final[Mapping[str, str]] = {
    "copy": "Waits for another's delta of the same unit and sends it as its own.",
    "sleeper": "Works honestly for thirty units and poisons from then on.",
    "colluding-pair": "Two owners send the same poison and hope to be each other's replicas.",
    "sybil": "Comes back under a new key after each ban.",
    "lazy-replica": "Echoes what a partner claimed instead of replaying when it is given a replica.",
    "liar": "Answers a replica with noise, to have an honest volunteer accused.",
    "class-lie": "Names a device class with looser arithmetic than its own, to be judged more mildly.",
    "stuffing": "Finishes many units at once with no work in them, to fill a round before the honest do.",
    "lease-shopping": "Hands leases back until it is given the unit, the replica or the partner that it wants.",
    "two-claims": "Signs two different claims for one lease, to upload whichever is not audited.",
    "commit-and-withhold": "Claims, and never uploads when an audit might follow.",
}
PROTOCOL_ATTACKS: Final[Mapping[str, ProtocolAttack]] = MappingProxyType(
    {name: ProtocolAttack(name=name, description=description) for name, description in _PROTOCOL.items()}
)
"""Every way to play the protocol, by name."""
