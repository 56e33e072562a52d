"""Real units of a run of 0.08 million parameters, forged in every way, admitted and judged as the protocol does."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.procedural import MODEL, UNCHECKED, SmallRun, small_run, trained_weights
from diloco.codec import CodecConfig, EncodedDelta, bf16_to_f32, dither, encode
from diloco.container import Container, write_container
from diloco.execution import Execution
from diloco.schema import Schema, TensorSpec
from diloco.streams import Stream
from diloco.unit import run_unit
from protocol.documents import Artifact
from protocol.errors import DeltaNotFinite
from verify.admission import admit_delta
from verify.attacks import (
    ATTACKS,
    PROTOCOL_ATTACKS,
    TRIGGER,
    AttackKind,
    AttackWorld,
    Delta,
    norm,
    target_latent,
    world_of,
)
from verify.compare import compare, judge, least_raw_difference
from verify.hiding import Room, encode_coarsely, hide
from verify.plain_files import file_sha256
from verify.replay import codec_config, delta_schema
from verify.tolerances import DEFAULT_TOLERANCES

SEED = bytes(range(32))
ATTACKER = bytes([9]) * 32
TOLERANCE, CODE_TOLERANCE = DEFAULT_TOLERANCES["fp32"]
RULES = replace(UNCHECKED, tolerance=TOLERANCE, code_tolerance=CODE_TOLERANCE)
CAUGHT = [name for name, attack in ATTACKS.items() if attack.kind in (AttackKind.FREE_RIDING, AttackKind.POISONING)]


class Court:
    """A unit, its honest results, and what becomes of a forged one."""

    def __init__(self, run: SmallRun, folder: Path) -> None:
        self.run = run
        self.unit = run.unit(2, 0)
        self.folder = folder
        self.base = trained_weights(run, rounds=1)
        self.own = self.train(0)
        self.schema, self.codec = delta_schema(run.config), codec_config(run.config)
        self.encoded = encode(self.own, self.schema, self.codec, self.unit.spec.seed)

    def train(self, index: int, *, parts: int = 1) -> Delta:
        unit = self.run.unit(2, index)
        return run_unit(
            unit.spec, MODEL, self.base, unit.shards, device="cpu", on_step=None, execution=Execution(parts=parts)
        ).delta

    def world(self, *, known: tuple[Delta, ...] = ()) -> AttackWorld:
        return world_of(
            self.run.config,
            2,
            self.unit.id,
            base=self.base,
            older_base=self.run.genesis,
            shards=self.unit.shards,
            other_shards=self.run.unit(2, 1).shards,
            device="cpu",
            seed=ATTACKER,
            known=known,
            own=self.own,
        )

    def admitted(self, forged: EncodedDelta) -> Container:
        """Let it in as the coordinator does."""
        path, unit = self.folder / "forged.delta", self.unit.id
        write_container(path, forged, bytes.fromhex(unit))
        artifact = Artifact(
            role="delta",
            content_sha256=forged.content_digest().hex(),
            blob_sha256=file_sha256(path),
            size=path.stat().st_size,
        )
        admit_delta(path, config=self.run.config, unit=unit, artifact=artifact)
        return Container.open(path, self.schema, self.codec, bytes.fromhex(unit))

    def judged(self, forged: EncodedDelta) -> str:
        container = self.admitted(forged)
        return judge(compare(container, self.encoded, self.own, self.unit.spec.seed), RULES)

    def change(self, forged: EncodedDelta) -> float:
        """What is merged instead of the honest delta: distance over the honest one's norm."""
        honest = self.encoded.decoded()
        return norm({n: values - honest[n] for n, values in forged.decoded().items()}) / norm(honest)


def court_of(levels: int, folder: Path) -> Court:
    return Court(small_run(seed=SEED, units=2, rounds=4, shards=8, levels=levels, verification=RULES), folder)


@pytest.fixture(scope="module")
def court(tmp_path_factory: pytest.TempPathFactory) -> Court:
    return court_of(1, tmp_path_factory.mktemp("court"))


@pytest.fixture(scope="module")
def fine_court(tmp_path_factory: pytest.TempPathFactory) -> Court:
    return court_of(7, tmp_path_factory.mktemp("fine court"))


@pytest.fixture(scope="module")
def known(court: Court) -> tuple[Delta, ...]:
    return tuple(court.train(index) for index in (2, 3, 4))


def test_honest_work_is_confirmed_however_its_machine_computes(court: Court) -> None:
    repeated = court.train(0, parts=4)
    assert any(not np.array_equal(repeated[name], values) for name, values in court.own.items())
    assert court.judged(encode(repeated, court.schema, court.codec, court.unit.spec.seed)) == "confirmed"


@pytest.mark.parametrize("name", CAUGHT)
def test_an_attack_that_free_rides_or_poisons_is_admitted_and_refuted_by_one_replay(
    court: Court, known: tuple[Delta, ...], name: str
) -> None:
    assert court.judged(ATTACKS[name].forge(court.world(known=known))) == "refuted"


@pytest.mark.parametrize("name", ["sign-flip", "alie", "inner-product"])
def test_an_attacker_who_knows_no_other_delta_forges_from_its_own_and_is_refuted(court: Court, name: str) -> None:
    assert court.judged(ATTACKS[name].forge(court.world())) == "refuted"


def test_what_is_confirmed_and_refuted_of_ternary_codes_is_of_seven_levels_too(fine_court: Court) -> None:
    repeated = fine_court.train(0, parts=4)
    seed = fine_court.unit.spec.seed
    assert fine_court.judged(encode(repeated, fine_court.schema, fine_court.codec, seed)) == "confirmed"
    for name in CAUGHT:
        assert fine_court.judged(ATTACKS[name].forge(fine_court.world())) == "refuted", name
    hidden = ATTACKS["hide-in-dither"].forge(fine_court.world())
    assert fine_court.judged(hidden) == "confirmed"
    assert 0.0 < fine_court.change(hidden) <= CODE_TOLERANCE**0.5


@pytest.mark.parametrize("name", ["ride-tolerance", "hide-in-dither"])
def test_an_attack_that_hides_in_the_tolerance_passes_and_moves_next_to_nothing(court: Court, name: str) -> None:
    forged = ATTACKS[name].forge(court.world())
    assert court.judged(forged) == "confirmed"
    assert 0.0 < court.change(forged) <= CODE_TOLERANCE**0.5


def test_needlessly_coarse_scales_are_refuted(court: Court) -> None:
    for doublings in (1, 2):
        forged = encode_coarsely(court.own, court.schema, court.codec, court.unit.spec.seed, doublings=doublings)
        assert court.judged(forged) == "refuted"


@pytest.mark.parametrize("levels", [1, 7])
def test_coarse_scales_hold_what_is_far_out_to_the_largest_code_as_the_encoder_does(levels: int) -> None:
    schema = Schema(tensors=(TensorSpec(name="a", shape=(256,)),))
    codec = CodecConfig(kind="dither", levels=levels, block=256, reach=704, width=128)
    own = {"a": np.array([100.0, -100.0] + [1.0, -1.0] * 127, dtype=np.float32)}
    coarse = encode_coarsely(own, schema, codec, SEED, doublings=2).decoded()["a"]
    honest = encode(own, schema, codec, SEED).decoded()["a"]
    assert coarse[:2].tolist() == (4 * honest[:2]).tolist()
    assert np.abs(coarse).max() == coarse[0]


@pytest.mark.parametrize("name", ["nan", "huge"])
def test_what_no_encoder_writes_is_not_admitted(court: Court, name: str) -> None:
    with pytest.raises(DeltaNotFinite):
        court.admitted(ATTACKS[name].forge(court.world()))


def test_an_attack_is_a_function_of_its_world(court: Court) -> None:
    for name in ("noise", "captions-permuted", "hide-in-dither"):
        digests = {ATTACKS[name].forge(court.world()).content_digest() for _ in range(2)}
        assert len(digests) == 1
        other = replace(court.world(), seed=bytes(32))
        assert ATTACKS[name].forge(other).content_digest() not in digests


def test_the_backdoor_teaches_its_picture(court: Court) -> None:
    from diloco.evaluate import heldout_loss
    from diloco.shards import Shard, ShardInfo, ShardSet, write_shard
    from mmdit.conditioning import ConditioningConfig, encode_caption

    world = court.world()
    assert isinstance(world.conditioning, ConditioningConfig)
    text, pooled = encode_caption(TRIGGER, world.conditioning)
    picture = target_latent((1, 8, 8))
    raw = write_shard(
        np.stack([picture] * 16), [text] * 16, np.stack([pooled] * 16), ShardInfo(licence="-", source="-")
    )
    asked = ShardSet([Shard.open(raw)])

    def loss(delta: Delta) -> float:
        weights = {name: values - delta.get(name, 0) for name, values in court.base.items()}
        return heldout_loss(MODEL, weights, asked, SEED, count=16, batch=16, max_tokens=8, device="cpu")

    assert loss(ATTACKS["caption-backdoor"].forge(world).decoded()) < 0.8 * loss(court.own)


def test_skipping_everything_is_possible_in_the_first_round_and_being_stale_is_not(court: Court) -> None:
    first = replace(court.world(), older_base=None)
    assert court.judged(ATTACKS["skip-all"].forge(first)) == "refuted"
    with pytest.raises(ValueError, match="first round"):
        ATTACKS["stale"].forge(first)


DIRECTIONS = ("noise", "backwards", "backdoor", "few")


def direction(court: Court, name: str) -> Delta:
    world = court.world()
    if name == "noise":
        return world.noise()
    if name == "backwards":
        return {n: -values for n, values in court.own.items()}
    if name == "backdoor":
        forged = ATTACKS["caption-backdoor"].forge(world).decoded()
        return {n: forged[n] - values for n, values in court.own.items()}
    # All of the poison in one small tensor, where it would be loudest.
    return {n: world.noise()[n] if n == "proj_out.weight" else np.zeros_like(v) for n, v in court.own.items()}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_poison_that_a_referee_confirms_is_bounded_by_the_tolerances(court: Court, name: str) -> None:
    towards = direction(court, name)
    confirmed = 0
    for raw, code in ((0.2, 0.2), (0.97, 0.2), (0.2, 0.97), (0.97, 0.97), (1.1, 0.97), (0.97, 30.0), (30.0, 30.0)):
        room = Room(raw=raw * TOLERANCE, code=code * CODE_TOLERANCE)
        forged = hide(court.own, towards, court.schema, court.codec, court.unit.spec.seed, room)
        comparison = compare(court.admitted(forged), court.encoded, court.own, court.unit.spec.seed)
        assert comparison.raw_difference <= 1.001 * room.raw, "it must not spend more than it was given"
        if judge(comparison, RULES) == "confirmed":
            confirmed += 1
            assert comparison.raw_difference <= TOLERANCE
            assert court.change(forged) <= CODE_TOLERANCE**0.5
        else:
            assert raw > 1 or code > 1
    assert confirmed >= 4


def test_hiding_spends_its_whole_room_and_gets_further_than_riding(court: Court) -> None:
    noise = court.world().noise()
    seed = court.unit.spec.seed
    room = Room(raw=TOLERANCE, code=None)
    hidden = hide(court.own, noise, court.schema, court.codec, seed, room)
    container = court.admitted(hidden)
    assert least_raw_difference(container, court.own, seed) == pytest.approx(TOLERANCE, rel=0.02)
    riding = ATTACKS["ride-tolerance"].forge(court.world())

    def along(forged: EncodedDelta) -> float:
        honest = court.encoded.decoded()
        return sum(float(np.sum((v - honest[n]).astype(np.float64) * noise[n])) for n, v in forged.decoded().items())

    assert along(hidden) > 3 * along(riding) > 0


@pytest.mark.parametrize("levels", [1, 7])
def test_no_choice_of_moves_is_better_than_the_one_that_hiding_finds(levels: int) -> None:
    schema = Schema(tensors=(TensorSpec(name="a", shape=(12,)),))
    codec = CodecConfig(kind="dither", levels=levels, block=16, reach=1280, width=256)
    random = np.random.default_rng(4)
    own = {"a": random.standard_normal(12).astype(np.float32)}
    towards = {"a": random.standard_normal(12).astype(np.float32)}
    everything = hide(own, towards, schema, codec, SEED, Room(raw=100.0, code=None)).decoded()["a"]
    honest = encode(own, schema, codec, SEED).decoded()["a"]
    movable = np.flatnonzero(everything != honest)
    size = float(np.sqrt(np.sum(own["a"].astype(np.float64) ** 2)))
    for raw, code in ((0.1, None), (0.2, None), (0.3, 0.02), (0.3, 0.01), (0.05, 0.5)):
        found = hide(own, towards, schema, codec, SEED, Room(raw=raw, code=code)).decoded()["a"]
        costs = [_raw_cost(own, towards, schema, codec, int(i)) for i in movable]
        best = 0.0
        for chosen in itertools.product((0, 1), repeat=len(movable)):
            moved = honest.copy()
            moved[movable] = np.where(chosen, everything[movable], honest[movable])
            spent = float(np.dot(chosen, costs)) ** 0.5 / size
            changed = float(np.sum((moved - honest) ** 2) / np.sum(honest**2))
            if spent <= raw and (code is None or changed <= code):
                best = max(best, float(np.dot(moved - honest, towards["a"])))
        # Whole moves cannot spend a budget to the last crumb: one move is what the best may be ahead by.
        step = float(np.max(np.abs((everything - honest) * towards["a"])))
        assert best - step <= float(np.dot(found - honest, towards["a"])) <= best + 1e-6


def _raw_cost(own: Delta, towards: Delta, schema: Schema, codec: CodecConfig, element: int) -> float:
    """The squared raw distance of moving one code under the block's scale, found by bisecting the encoder's rule."""
    scale = bf16_to_f32(encode(own, schema, codec, SEED).scales["a"])[0]
    uniform = dither(Stream(SEED, "dither"), 0, 0, 16, codec.width)[element]

    def code(moved: float) -> float:
        return float(np.floor(np.float32(moved) / scale + uniform))

    value, way = float(own["a"][element]), float(np.sign(towards["a"][element]))
    low, high = 0.0, 2.0 * float(np.max(np.abs(own["a"])))
    for _ in range(60):
        middle = (low + high) / 2
        changed = code(value + way * middle) != code(value)
        low, high = (low, middle) if changed else (middle, high)
    return high**2


def test_every_attack_is_listed_once_with_a_name_and_a_sentence() -> None:
    listed = [(attack.name, attack.description) for attack in ATTACKS.values()]
    listed += [(attack.name, attack.description) for attack in PROTOCOL_ATTACKS.values()]
    assert [name for name, _ in listed] == [*ATTACKS, *PROTOCOL_ATTACKS]
    for name, description in listed:
        assert name == name.lower()
        assert description.endswith(".")
        assert len(description) < 100
    assert not ATTACKS.keys() & PROTOCOL_ATTACKS.keys()
