import pytest
import torch

from mmdit.precision import PRECISIONS, Precision, narrowed
from mmdit.transformer import MMDiT
from tests.mmdit.shapes import SMALL


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_weights_come_out_in_the_precision_that_was_asked_for_and_near_what_they_were(precision: Precision) -> None:
    torch.manual_seed(1)
    state = MMDiT(SMALL).state_dict()
    found = narrowed(state, precision)
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        coarse = precision == "fp8" and tensor.ndim == 2
        expected = PRECISIONS["bf16"] if precision == "fp8" and not coarse else PRECISIONS[precision]
        assert tensor.dtype == expected, name
        assert torch.allclose(tensor.float(), state[name], rtol=2**-4 if coarse else 2**-8, atol=2**-9)


@pytest.mark.parametrize(("precision", "value"), [("fp16", 7e4), ("fp8", 500.0), ("bf16", float("nan"))])
def test_a_weight_that_does_not_fit_is_named(precision: Precision, value: float) -> None:
    with pytest.raises(ValueError, match=r"^proj holds"):
        narrowed({"proj": torch.full((2, 2), value)}, precision)
