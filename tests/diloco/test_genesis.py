import dataclasses

import numpy as np

from diloco.genesis import initial_state
from diloco.schema import schema_of
from tests.diloco.examples import OTHER_SEED, SEED, TINY


def test_the_first_weights_follow_from_the_seed() -> None:
    one, again, other = (initial_state(TINY, seed) for seed in (SEED, SEED, OTHER_SEED))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["context_embedder.weight"], other["context_embedder.weight"])


def test_the_first_weights_are_the_schemas_tensors_and_the_position_table() -> None:
    state = initial_state(TINY, SEED)
    assert sorted(state) == sorted([*schema_of(TINY).names, "pos_embed.pos_embed"])
    assert all(values.dtype == np.float32 for values in state.values())


def test_a_tensors_first_weights_do_not_depend_on_the_rest_of_the_model() -> None:
    deeper = initial_state(dataclasses.replace(TINY, num_layers=3), SEED)
    name = "transformer_blocks.0.ff.net.0.proj.weight"
    assert np.array_equal(initial_state(TINY, SEED)[name], deeper[name])
