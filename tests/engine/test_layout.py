"""TokenLayout: roles read from ids, by hand."""

import pytest
import torch

from mmlm import TokenLayout
from mmlm.errors import LayoutError

IMG, START, END = 9, 7, 8
IDS = torch.tensor([[0, 0, 1, IMG, IMG, 2, 3], [1, 7, IMG, 8, 5, IMG, 4]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


def layout(**more):
    return TokenLayout.from_ids(IDS, MASK, image_ids=(IMG,), **more)


def test_roles_by_hand():
    got = layout(wrapper_ids=(START, END))
    assert got.seg.tolist() == [[0, 0, 2, 1, 1, 2, 2], [2, 2, 1, 2, 2, 1, 2]]
    assert got.img.tolist() == [[-1, -1, -1, 0, 0, -1, -1], [-1, -1, 0, -1, -1, 1, -1]]
    assert got.frame.int().tolist() == [[0] * 7, [0, 1, 0, 1, 0, 0, 0]]
    assert got.doc.tolist() == [[-1, -1, 0, 0, 0, 0, 0], [0] * 7]
    assert got.last_image_end().tolist() == [4, 5]
    assert got.last_row().tolist() == [6, 6]
    assert got.has_image().tolist() == [True, True]


def test_neighbours_frame_an_image_but_padding_does_not():
    got = layout(framing="neighbours")
    assert got.frame.int().tolist() == [[0, 0, 1, 0, 0, 1, 0], [0, 1, 0, 1, 1, 0, 1]]


def test_image_ids_under_padding_do_not_count():
    ids = torch.tensor([[IMG, 1, 2]])
    got = TokenLayout.from_ids(ids, torch.tensor([[0, 1, 1]]), image_ids=(IMG,))
    assert not got.has_image().any()
    assert got.last_image_end().tolist() == [-1]


def test_append_adds_answer_positions():
    got = layout().append(2)
    assert got.seg[:, -2:].tolist() == [[3, 3], [3, 3]]
    assert got.img[:, -1].tolist() == [-1, -1]
    assert got.doc[:, -1].tolist() == [0, 0]
    assert got.length == 9


def test_expand_repeats_each_row_in_place():
    got = layout().expand(2)
    assert got.rows == 4
    assert torch.equal(got.seg[0], got.seg[1])
    assert torch.equal(got.seg[2], layout().seg[1])


def test_gather_keeps_positions_in_the_given_order():
    got = layout().gather(torch.tensor([[3, 2], [0, 5]]))
    assert got.seg.tolist() == [[1, 2], [2, 1]]


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS[0], None, "must be"),
        (IDS, MASK[:, :3], "same shape"),
        (IDS, MASK.flip(-1), "padded on the right"),
        (IDS, torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2), "holes"),
    ],
)
def test_bad_prompts_are_refused(ids, mask, message):
    with pytest.raises(LayoutError, match=message) as caught:
        TokenLayout.from_ids(ids, mask, image_ids=(IMG,))
    assert caught.value.advice


def test_rows_of_a_training_may_be_padded_on_the_right():
    ids, mask = IDS, torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0]])
    got = TokenLayout.from_ids(ids, mask, image_ids=(IMG,), right=True)
    assert got.real.tolist() == mask.bool().tolist()
    assert got.last_row().tolist() == [4, 5]
    holes = torch.tensor([[1, 1, 0, 1, 1, 0, 0]] * 2)
    with pytest.raises(LayoutError, match="holes"):
        TokenLayout.from_ids(ids, holes, image_ids=(IMG,), right=True)
