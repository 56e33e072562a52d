from dataclasses import replace

import numpy as np
import pytest

from diloco import NUMERICS
from diloco.checkpoint import TensorFile
from diloco.codec import CodecConfig
from diloco.container import Container
from diloco.schema import schema_of
from protocol import layout
from protocol.assignment import unit_samples, unit_seed
from protocol.documents import RunConfig, UnitId
from protocol.errors import NumericsMismatch, PayloadInvalid
from tests.verify.examples import CONDITIONING, MODEL, SPACE, PublishedRun, lease_of, run_config, shards_of
from verify.plain_files import file_sha256
from verify.replay import (
    check_numerics,
    codec_config,
    conditioning_config,
    delta_schema,
    model_config,
    outer_config,
    replay_unit,
    space_of,
    training_spec,
    unit_spec,
    unit_spec_of,
)

CONFIG = run_config("9e" * 32)


def test_a_run_config_becomes_what_the_model_and_the_merge_compute_with() -> None:
    assert model_config(CONFIG) == MODEL
    assert conditioning_config(CONFIG) == CONDITIONING
    assert space_of(CONFIG) == SPACE
    assert delta_schema(CONFIG).digest == schema_of(MODEL).digest
    assert codec_config(CONFIG) == CodecConfig(kind="dither", levels=1, block=256, reach=704, width=128)
    assert (outer_config(CONFIG).lr, outer_config(CONFIG).momentum) == (0.7, 0.9)


def test_every_number_of_the_inner_loop_reaches_the_unit() -> None:
    spec = training_spec(CONFIG)
    training = CONFIG.training
    same = set(training.__dataclass_fields__) - {"lr_final_share", "short_steps", "short_share"}
    assert {name: getattr(spec, name) for name in same} == {name: getattr(training, name) for name in same}
    assert spec.max_tokens == 4


def test_a_short_unit_has_fewer_steps_and_warms_up_for_the_same_share_of_them() -> None:
    training = replace(CONFIG.training, steps=12, warmup_steps=6, short_steps=5, short_share=1 << 24)
    spec = unit_spec_of(replace(CONFIG, training=training), 1, UnitId("ab" * 32))
    assert (spec.training.steps, spec.training.warmup_steps) == (5, 2)
    long = unit_spec_of(replace(CONFIG, training=replace(training, short_share=0)), 1, UnitId("ab" * 32))
    assert (long.training.steps, long.training.warmup_steps) == (12, 6)


def test_a_units_seed_and_learning_rate_follow_from_its_id_and_round() -> None:
    lease = lease_of(CONFIG, 2, 1, "ba" * 32)
    spec = unit_spec(CONFIG, lease)
    assert spec.seed == bytes.fromhex(unit_seed(UnitId(lease.unit)))
    assert spec.lr_scale == 0.5
    assert spec == unit_spec_of(CONFIG, 2, UnitId(lease.unit))
    assert unit_spec(CONFIG, replace(lease, seed="00" * 32)) == spec, "a hand-picked seed must have no effect"


def _build_everything(config: RunConfig) -> None:
    for build in (model_config, conditioning_config, space_of, codec_config, outer_config, training_spec):
        build(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(CONFIG, model={**CONFIG.model, "num_layers": 0}), "model: num_layers is 0"),
        (replace(CONFIG, model={}), "model: this config.json is for None"),
        (replace(CONFIG, conditioning={"kind": "byte-patch"}), "conditioning:"),
        (replace(CONFIG, conditioning={**CONFIG.conditioning, "token_dim": 53}), "conditioning: token_dim 53"),
        (replace(CONFIG, space={**CONFIG.space, "kind": "latent"}), "space: space kind is 'latent'"),
        (replace(CONFIG, space={**CONFIG.space, "scale": 0}), "space: scale is 0"),
        (replace(CONFIG, codec=replace(CONFIG.codec, block=100)), "codec: codec block is 100"),
        (replace(CONFIG, outer=replace(CONFIG.outer, momentum=1.0)), "outer: outer momentum is 1.0"),
        (replace(CONFIG, training=replace(CONFIG.training, lr=-1.0)), "training: lr is -1.0"),
        (replace(CONFIG, training=replace(CONFIG.training, warmup_steps=7)), "training: warmup_steps is 7"),
    ],
)
def test_a_signed_config_that_this_version_cannot_compute_with_is_refused_by_name(
    config: RunConfig, named: str
) -> None:
    with pytest.raises(PayloadInvalid) as caught:
        _build_everything(config)
    assert f"RunConfig: {named}" in str(caught.value)


@pytest.mark.parametrize(("numerics", "advice"), [(NUMERICS - 1, "an older"), (NUMERICS + 1, "a newer")])
def test_other_numerics_are_refused_with_what_to_install(numerics: int, advice: str) -> None:
    other = replace(CONFIG, numerics=numerics)
    with pytest.raises(NumericsMismatch, match=f"install {advice} Commonweight"):
        check_numerics(other)
    lease = lease_of(CONFIG, 1, 0, "ba" * 32)
    with pytest.raises(NumericsMismatch):
        replay_unit(other, lease, {}, shards_of(lease), "cpu")


def test_a_replayed_unit_is_the_published_delta(published: PublishedRun) -> None:
    weights = published.checkpoint(1) / layout.WEIGHTS
    lease = lease_of(published.config, 2, 1, file_sha256(weights))
    result, encoded = replay_unit(published.config, lease, TensorFile.open(weights).load(), shards_of(lease), "cpu")
    assert result.samples == unit_samples(published.config, UnitId(lease.unit))
    (entry,) = (entry for entry in published.manifest(2).merged if entry.unit == lease.unit)
    path = published.public / layout.delta_path(entry.blob_sha256)
    merged = Container.open(
        path, delta_schema(published.config), codec_config(published.config), bytes.fromhex(lease.unit)
    )
    decoded = encoded.decoded()
    difference = sum(float(np.sum((decoded[name] - merged.tensor(name)) ** 2)) for name in decoded)
    size = sum(float(np.sum(merged.tensor(name) ** 2)) for name in decoded)
    assert size > 0
    assert difference < 0.01 * size


def test_another_units_delta_is_far_from_it(published: PublishedRun) -> None:
    weights = published.checkpoint(1) / layout.WEIGHTS
    base = TensorFile.open(weights).load()
    decoded = []
    for index in (0, 1):
        lease = lease_of(published.config, 2, index, file_sha256(weights))
        decoded.append(replay_unit(published.config, lease, base, shards_of(lease), "cpu")[1].decoded())
    difference = sum(float(np.sum((decoded[0][name] - decoded[1][name]) ** 2)) for name in decoded[0])
    size = sum(float(np.sum(decoded[1][name] ** 2)) for name in decoded[1])
    assert difference > 0.1 * size
