import pytest

from diloco.schema import Schema, TensorSpec, schema_of
from mmdit.presets import PRESETS
from tests.diloco.examples import TINY


def test_a_models_schema_names_its_parameters_and_not_the_position_table() -> None:
    schema = schema_of(TINY)
    assert "pos_embed.proj.weight" in schema.names
    assert "pos_embed.pos_embed" not in schema.names


def test_the_schema_of_a_two_billion_parameter_model_costs_no_memory() -> None:
    assert schema_of(PRESETS["d24"]).num_elements > 2_000_000_000


def test_the_digest_depends_on_names_and_shapes() -> None:
    def digest(name: str, shape: tuple[int, ...]) -> bytes:
        return Schema(tensors=(TensorSpec(name=name, shape=shape),)).digest

    assert len({digest("a", (2, 3)), digest("b", (2, 3)), digest("a", (3, 2)), digest("a", (6,))}) == 4


@pytest.mark.parametrize("names", [["b", "a"], ["a", "a"]])
def test_tensors_out_of_order_or_twice_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="sorted by name, each name once"):
        Schema(tensors=tuple(TensorSpec(name=name, shape=(1,)) for name in names))


@pytest.mark.parametrize("name", ["", "__metadata__", "weight\n", "gewicht\u00e9"])
def test_names_that_a_header_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        TensorSpec(name=name, shape=(1,))


def test_empty_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="every extent must be at least 1"):
        TensorSpec(name="a", shape=(3, 0))
