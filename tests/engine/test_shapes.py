"""The recorder of shapes notices attention matrices, and nothing else."""

import pytest
import tiny
import torch
from shapes import assert_no_square, record_shapes


@pytest.mark.parametrize(("implementation", "square"), [("sdpa", False), ("eager", True)])
def test_attention_matrices_are_seen(implementation, square):
    model, processor = tiny.build("llava")
    model.set_attn_implementation(implementation)
    inputs = tiny.inputs(processor, ["what is shown here ? " * 50], [[tiny.picture(1)]])
    n = inputs["input_ids"].shape[1]
    assert n > 400  # more than any width of the model, the vocabulary included
    with torch.no_grad(), record_shapes() as shapes:
        model(**inputs)
    if square:
        with pytest.raises(AssertionError, match="x"):
            assert_no_square(shapes, n)
    else:
        assert_no_square(shapes, n)


def test_masks_may_be_allowed():
    with record_shapes() as shapes:
        torch.ones(1, 1, 9, 9, dtype=torch.bool)
    assert_no_square(shapes, 9, masks=True)
    with pytest.raises(AssertionError, match="9 x 9"):
        assert_no_square(shapes, 9)
    with pytest.raises(AssertionError, match="nothing was recorded"):
        assert_no_square({}, 9)
