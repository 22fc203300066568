"""HeadDivergence by hand, against two plain passes, and what VHR would choose by it."""

from __future__ import annotations

import pytest
import tiny
import torch

import mmlm
from decoding.vhr import select_heads
from mmlm import HeadDivergence, attach, measured
from mmlm.errors import UnsupportedModel

PROMPTS = ["describe the image in detail .", "is there a dog ?"]
PICTURES = [[tiny.picture(1)], []]


def heads_of(model, inputs):
    """Outputs of all heads at the last position, [layers, B, H, d], by hooks of our own."""
    anatomy, found = mmlm.Anatomy(model), []
    handles = [
        anatomy.o_proj(layer).register_forward_pre_hook(
            lambda _, args: found.append(anatomy.split_heads(args[0][:, -1]).float())
        )
        for layer in range(anatomy.n_layers)
    ]
    with torch.inference_mode():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def record_of(model, inputs, *methods):
    with attach(model, *methods, HeadDivergence()):
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return [row["head_divergence"] for row in measured(model)]


def test_divergence_is_the_distance_of_two_plain_passes():
    """In LLaVA the prompt without its image is the prompt without its image tokens."""
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    with_image = heads_of(model, inputs)[:, 0]
    text = ~torch.isin(inputs["input_ids"], torch.tensor(mmlm.Anatomy(model).image_ids))
    ids = inputs["input_ids"][text][None]
    without = heads_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, 0]
    (record,) = record_of(model, inputs)
    distance = (with_image - without).norm(dim=-1)
    torch.testing.assert_close(torch.tensor(record["vhd"]), distance, atol=1e-5, rtol=1e-4)
    size = with_image.norm(dim=-1) + without.norm(dim=-1)
    torch.testing.assert_close(
        torch.tensor(record["relative"]), distance / size, atol=1e-5, rtol=1e-3
    )
    active = without.square().sum(-1)
    torch.testing.assert_close(
        torch.tensor(record["text_activation"]), active, atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layer_and_head_of_rows_with_a_picture(family):
    model, processor = tiny.shared(family)
    pictures = [[tiny.picture(1)], [tiny.picture(2)]]
    records = record_of(model, tiny.inputs(processor, PROMPTS, pictures))
    for record in records:
        vhd = torch.tensor(record["vhd"])
        assert vhd.shape == (4, mmlm.Anatomy(model).n_heads)
        assert bool((vhd >= 0).all())
        assert float(vhd.max()) > 0
        assert float(torch.tensor(record["relative"]).max()) <= 1


def test_rows_without_a_picture_have_none():
    model, processor = tiny.shared("llava")
    seen, unseen = record_of(model, tiny.inputs(processor, PROMPTS, PICTURES))
    assert len(seen["vhd"]) == 4
    assert unseen["vhd"] == unseen["relative"] == unseen["text_activation"] == []


def test_vhr_chooses_by_the_same_numbers():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], PICTURES[:1])
    (record,) = record_of(model, inputs)
    chosen = select_heads(torch.tensor(record["vhd"])[1][None])[0]
    heads = ((1, tuple(chosen.nonzero()[:, 0].tolist())),)
    with attach(model, mmlm.VHR(layers=(1,), outliers=False)), torch.inference_mode():
        by_itself = model(**inputs).logits
    with attach(model, mmlm.VHR(heads_by_layer=heads)), torch.inference_mode():
        by_record = model(**inputs).logits
    assert torch.equal(by_itself, by_record)


@pytest.mark.parametrize("wrong", [(-1,), (), (1, 1)])
def test_wrong_layers_are_refused(wrong):
    with pytest.raises(ValueError, match="layers"):
        HeadDivergence(layers=wrong)


def test_methods_that_are_built_in_and_know_one_prompt_only_refuse_it():
    model, _ = tiny.build("llava")
    mmlm.build_in(model, mmlm.DARA(layers=(0,), images=2))
    with (
        pytest.raises(UnsupportedModel, match=r"DARA.* is built in"),
        attach(model, HeadDivergence()),
    ):
        pass
