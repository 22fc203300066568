"""TokenLayout on what the families' own processors write: frames, images, positions."""

import pytest
import tiny
import torch

from mmlm import Anatomy, TokenLayout
from mmlm.engine.vision.sizes import tell_images_apart
from mmlm.errors import LayoutError


def read(family, prompts, pictures):
    """Inputs of a batch, its layout, and the tokenizer."""
    model, processor = tiny.shared(family)
    anatomy = Anatomy(model)
    inputs = tiny.inputs(processor, prompts, pictures)
    layout = TokenLayout.from_ids(
        inputs["input_ids"],
        inputs["attention_mask"],
        image_ids=anatomy.image_ids,
        wrapper_ids=anatomy.wrapper_ids,
        framing=anatomy.family.framing,
    )
    return inputs, tell_images_apart(anatomy, layout, inputs), processor.tokenizer


def words(inputs, keep, tokenizer):
    return [
        tokenizer.decode(row[own].tolist())
        for row, own in zip(inputs["input_ids"], keep, strict=True)
    ]


@pytest.mark.parametrize("family", tiny.ALL)
def test_what_is_neither_image_nor_frame_is_the_text_alone(family):
    """Deleting visual and frame positions leaves what the template writes for text alone."""
    pictures = [[tiny.picture(1)], [tiny.picture(2, (90, 60)), tiny.picture(3)]]
    inputs, layout, tokenizer = read(family, ["what is it ?", "which is a dog ?"], pictures)
    left = words(inputs, layout.real & ~layout.visual & ~layout.frame, tokenizer)
    expected = ["user: what is it ? assistant:", "user: which is a dog ? assistant:"]
    # Gemma's blank lines are text to the layout; PaliGemma adds a start and a line break.
    bare = [" ".join(text.replace("<s>", "").split()) for text in left]
    assert bare == expected


@pytest.mark.parametrize("family", tiny.ALL)
def test_each_picture_is_one_image(family):
    """Also where pictures stand side by side, and where a picture is many tiles."""
    pictures = [[tiny.picture(1)], [tiny.picture(2, (90, 60)), tiny.picture(3), tiny.picture(4)]]
    _, layout, _ = read(family, ["what is it ?", "which is a dog ?"], pictures)
    assert layout.img.amax(-1).tolist() == [0, 2]
    assert torch.equal(layout.img >= 0, layout.visual)
    for row in layout.img:
        found = row[row >= 0]
        assert bool((found[1:] >= found[:-1]).all())


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "paligemma"])
def test_sizes_of_pictures_side_by_side(family):
    """Each of two adjacent pictures takes as many positions as it takes alone."""
    a, b = tiny.picture(1, (90, 60)), tiny.picture(2)
    _, both, _ = read(family, ["hi"], [[a, b]])
    counts = both.img[both.img >= 0].bincount().tolist()
    if family == "llava_onevision":  # cuts pictures into tiles only where one is alone
        assert counts == [17, 17]
        return
    alone = [int(read(family, ["hi"], [[p]])[1].visual.sum()) for p in (a, b)]
    assert counts == alone


def test_an_image_without_tiles_and_one_with_tiles():
    """Idefics3: one tile and the whole, or several and the whole; both are one image each."""
    model, processor = tiny.build("idefics3")
    processor.image_processor.do_image_splitting = False
    inputs = tiny.inputs(processor, ["hi"], [[tiny.picture(1), tiny.picture(2)]])
    anatomy = Anatomy(model)
    layout = TokenLayout.from_ids(
        inputs["input_ids"], None, image_ids=anatomy.image_ids, framing="tiles"
    )
    assert layout.img[layout.img >= 0].bincount().tolist() == [4, 4]
    names = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][layout.frame].tolist())
    assert names == ["<fake_token_around_image>", "<global-img>", "<fake_token_around_image>"] * 2


def test_frames_of_a_tiled_image_by_name():
    inputs, layout, tokenizer = read("smolvlm", ["hi"], [[tiny.picture(1)]])
    names = tokenizer.convert_ids_to_tokens(inputs["input_ids"][layout.frame].tolist())
    mark, line = (
        "<fake_token_around_image>",
        tokenizer.convert_ids_to_tokens(tokenizer("\n")["input_ids"])[-1],
    )
    expected = [mark, "<row_1_col_1>", mark, "<row_1_col_2>", line]
    expected += [mark, "<row_2_col_1>", mark, "<row_2_col_2>", line, line]
    assert names == [*expected, mark, "<global-img>", mark]
    assert int(layout.visual.sum()) == 5 * 4


def test_tiles_without_a_closing_mark_do_not_swallow_the_question():
    ids = torch.tensor([[5, 7, 8, 9, 9, 1, 2, 3]])
    layout = TokenLayout.from_ids(ids, None, image_ids=(9,), framing="tiles")
    assert layout.frame.int().tolist() == [[0, 1, 1, 0, 0, 0, 0, 0]]


def test_sizes_that_do_not_add_up_are_refused():
    ids = torch.tensor([[9, 9, 1]])
    layout = TokenLayout.from_ids(ids, None, image_ids=(9,))
    with pytest.raises(LayoutError, match="take 3 positions, but the prompts hold 2"):
        layout.with_images(torch.tensor([3]))


def test_rows_without_images_among_rows_with():
    ids = torch.tensor([[9, 9, 1], [1, 1, 1], [9, 9, 9]])
    layout = TokenLayout.from_ids(ids, None, image_ids=(9,)).with_images(torch.tensor([2, 1, 2]))
    assert layout.img.tolist() == [[0, 0, -1], [-1, -1, -1], [0, 1, 1]]
