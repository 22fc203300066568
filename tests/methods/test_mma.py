"""MMA: the rule against the authors' masks and loops, and what follows from it in models."""

import logging

import mma_cases as cases
import pytest
import tiny
import torch
from golden import golden
from mma_cases import allowed, by_loops, layout, masks_of

from mmlm import MMA, attach
from mmlm.engine.layout import ANSWER, PAD, PROMPT, VISUAL, TokenLayout
from mmlm.engine.masks.turns import ROLES, encoded

AUTHORS = MMA(scope="first", prompt_end="marker")
MARKER, PADDING = 32001, 32000


# ---- the rule ------------------------------------------------------------------------------------


def test_one_question_by_hand():
    """system, two visual tokens, a question of two, a header of two, an answer of two."""
    roles = layout(["pvvppppaa"], behind=[[0, 0, 0, 0, 0, 0, 1, 0, 0]])
    found = allowed(MMA(), roles)[0]
    assert ["".join("x" if c else "." for c in row) for row in found] == [
        "x........",
        "xxxxxxx..".replace("xxxxxxx", "xx.xxxx"),
        "xxxxxxx..",
        "xxxx.....",
        "xxxxx....",
        "xxxxxx...",
        "xxxxxxx..",
        "xxxxxxxx.",
        "xxxxxxxxx",
    ]
    marker = allowed(MMA(prompt_end="marker"), roles)[0]
    assert "".join("x" if c else "." for c in marker[2]) == "xxxxxx..."
    assert (found ^ marker).nonzero().tolist() == [[1, 6], [2, 6]]


#: Two turns with a picture each, a row that is padded, and two packed documents.
ROWS = {
    "turns": layout(
        ["pvvppaapvppa", "...vvpppaapp"],
        turn=[[0] * 7 + [1] * 5, [0] * 10 + [1] * 2],
        behind=[[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]],
    ),
    "documents": layout(
        ["vpvppavvppaa"],
        doc=[[0] * 6 + [1] * 6],
        behind=[[0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]],
    ),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("scope", ["turn", "first", "all_prompts"])
@pytest.mark.parametrize("marker", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_rule_equals_the_formulas_by_loops(rows, scope, marker, symmetric):
    roles = ROWS[rows]
    method = MMA(scope=scope, prompt_end="marker" if marker else "header", symmetric=symmetric)
    found = allowed(method, roles)
    expected = by_loops(roles, scope, marker=marker, symmetric=symmetric)
    real = roles.real[:, :, None]
    assert torch.equal(found & real, expected & real)
    keys = (by_loops(roles, scope, marker=marker) & real).clone()
    index = torch.arange(roles.length)
    ahead = (keys & (index[None, None] > index[None, :, None])).any(1)
    assert torch.equal(method.opened_keys(roles), ahead)


def test_parameters_are_checked():
    for name, value in (("scope", "turns"), ("prompt_end", "end"), ("symmetric", 1)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            MMA(**{name: value})
    assert MMA().neutral() == MMA(scope="none")
    assert MMA().turns == "known"
    assert AUTHORS.turns == "needed"
    assert MMA(scope="none").turns == "unread"


# ---- acceptance 1: the authors' masks ------------------------------------------------------------


def _raw(data, name):
    """The layout of a raw case: everything behind the rectangle is an answer."""
    n, image, text, end, *_ = data[f"{name}_args"].tolist()
    real = torch.from_numpy(data[f"{name}_attention_mask"]).bool()
    index = torch.arange(n)
    seg = torch.full((n,), ANSWER)
    seg[index < image] = PROMPT
    seg[(index >= image) & (index < text)] = VISUAL
    seg[(index >= text) & (index < end)] = PROMPT
    return layout([torch.where(real, seg, PAD).tolist()])


def _expanded(data, name):
    """The layout of a batch, from its ids and its first marker; what is learned is an answer."""
    rows = torch.from_numpy(data[f"{name}_layout"])
    learns = f"{name}_labels" in data
    seg, behind = torch.full_like(rows, PROMPT), torch.zeros_like(rows)
    for row, ids in zip(range(len(rows)), rows, strict=True):
        markers = (ids == MARKER).nonzero()[:, 0]
        pictures = (ids <= -100_000).nonzero()[:, 0]
        if len(markers):
            (seg if learns else behind)[row, markers[0] + 1 :] = ANSWER if learns else 1
        elif len(pictures):  # a caption: the whole text is said
            seg[row, pictures[-1] + 1 :] = ANSWER
    seg[rows <= -100_000] = VISUAL
    seg[rows == PADDING] = PAD
    return layout(seg.tolist(), behind=(behind * (seg == PROMPT)).tolist())


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("mma/mma_mask*.npz"))
def test_acceptance_1_masks_equal_the_authors(path):
    import numpy as np

    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    raw = sorted(
        key[: -len("_mask")]
        for key in data
        if key.startswith("raw") and key.endswith("_mask") and "attention" not in key
    )
    batches = sorted(key[: -len("_mask4d")] for key in data if key.endswith("_mask4d"))
    assert len(raw) > 3
    assert len(batches) > 3
    opened_cells = 0
    for name in raw + batches:
        roles = _raw(data, name) if name in raw else _expanded(data, name)
        theirs = data[f"{name}_mask"][None] if name in raw else data[f"{name}_mask4d"][:, 0]
        theirs = torch.from_numpy(np.asarray(theirs)).bool()
        mine = allowed(AUTHORS, roles)
        valid = roles.real & theirs.any(-1)
        assert torch.equal(mine[valid], theirs[valid]), name
        opened_cells += int(mine.triu(1).sum())
        if name in batches:
            q, k, v = (torch.from_numpy(data[f"{name}_{x}"]) for x in "qkv")
            scores = q @ k.mT * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~mine[:, None], torch.finfo(torch.float32).min)
            out = (scores.softmax(-1) @ v).transpose(1, 2)
            expected = torch.from_numpy(data[f"{name}_attn_out"]).transpose(1, 2)
            torch.testing.assert_close(out[valid], expected[valid], atol=1e-6, rtol=1e-5)
    assert opened_cells > 50
    # A decoding step of theirs sees everything, which is what no mask at all means.
    assert bool((data["grow_out_cache"] == 1).all())


# ---- acceptance 2 to 8, 12 to 14 -----------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_acceptance_2_no_image_keeps_the_fast_path_bit_for_bit(family):
    model, processor = tiny.shared(family)
    for prompts in (cases.PROMPTS, cases.PROMPTS[:1]):
        text = tiny.inputs(processor, prompts, [[] for _ in prompts])
        with torch.no_grad(), masks_of(model) as masks:
            plain = model(**text).logits
            with attach(model, MMA(), processor=processor):
                assert torch.equal(model(**text).logits, plain)
        options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
        tokens = model.generate(**text, **options)
        with attach(model, MMA(), processor=processor):
            assert torch.equal(model.generate(**text, **options), tokens)
        if family == "gemma3":  # windows: the library always makes masks
            continue
        assert (masks[1] is None) == (masks[0] is None)
        assert masks[0] is None or len(prompts) > 1


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "internvl"])
def test_acceptance_3_number_of_opened_cells(family):
    """Two turns with pictures, the second with two: each sees the text of its turn behind it."""
    model, processor = tiny.shared(family)
    messages = [
        cases.user("what is shown here ?", 1),
        cases.assistant("a cat ."),
        cases.user("is there a dog in the picture ?", 2),
    ]
    inputs = cases.talk(processor, messages, [tiny.picture(n) for n in range(3)])
    with torch.no_grad(), masks_of(model) as masks, attach(model, MMA(), processor=processor):
        model(**inputs)
        roles = model._mmlm_session.layout
    found = masks[0][:, 0]
    ids, n = inputs["input_ids"][0], inputs["input_ids"].shape[1]
    seen = cases.visual(model, inputs)[0]
    answer = _where(processor, ids, "a cat .")
    expected = 0
    for i in seen.nonzero()[:, 0].tolist():
        first_turn = i < answer[0]
        ends = answer[0] if first_turn else n
        expected += sum(not bool(seen[j]) for j in range(i + 1, ends))
    assert int(found.triu(1).sum()) == expected
    assert expected > 0
    assert int(roles.turn.max()) == 1
    assert (roles.seg[0] == ANSWER).nonzero()[:, 0].tolist() == answer


def _where(processor, ids, words):
    """Columns of some words, which stand in the ids once."""
    pieces = [processor.tokenizer.decode([i]) for i in ids.tolist()]
    text = "".join(pieces)
    assert text.count(words) == 1
    start, found, at = text.index(words), [], 0
    for column, piece in enumerate(pieces):
        if at < start + len(words) and at + len(piece) > start:
            found.append(column)
        at += len(piece)
    return found


def test_acceptance_4_text_before_the_image_is_causal_in_every_layer():
    model, processor = tiny.shared("llava")
    inputs = cases.padded_pair(processor)
    before = cases.visual(model, inputs).long().cumsum(-1) == 0
    before &= inputs["attention_mask"].bool()
    assert bool(before[1].any())
    where = {**inputs, "position_ids": cases.places(inputs)}
    plain = cases.states(model, where)
    with torch.no_grad():
        logits = model(**where).logits
        with attach(model, MMA(), processor=processor):
            edited = cases.states(model, where)
            assert torch.equal(model(**where).logits[before], logits[before])
    assert torch.equal(edited[:, before], plain[:, before])
    after = cases.visual(model, inputs)
    assert not torch.allclose(edited[1:, after], plain[1:, after], atol=1e-4)


def _with_answer(processor, question, answer):
    inputs = cases.talk(processor, [cases.user(question, 1)], [tiny.picture(1)])
    tail = torch.tensor([processor.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]])
    ids = torch.cat([inputs["input_ids"], tail], 1)
    said = torch.zeros(ids.shape, dtype=torch.bool)
    said[:, inputs["input_ids"].shape[1] :] = True
    roles = encoded(torch.zeros_like(ids), said)
    mask = torch.ones_like(ids)
    return {**inputs, "input_ids": ids, "attention_mask": mask, ROLES: roles, "use_cache": False}


def test_acceptance_5_answers_leak_nowhere_and_questions_reach_the_image():
    model, processor = tiny.shared("llava")
    first = _with_answer(processor, "is there a dog ?", "a cat sits")
    other = {**first, "input_ids": first["input_ids"].clone()}
    said = first[ROLES][0] == 1
    other["input_ids"][0, said] = first["input_ids"][0, said].flip(0) + 1
    image = cases.visual(model, first)[0]
    asked = first["input_ids"].clone()
    place = int(image.nonzero()[-1]) + 2
    assert not bool(said[place])
    asked[0, place] += 1
    with attach(model, MMA(), processor=processor):
        one, two = cases.states(model, first), cases.states(model, other)
        three = cases.states(model, {**first, "input_ids": asked})
    assert torch.equal(one[:, 0, ~said], two[:, 0, ~said])
    assert not torch.allclose(one[:, 0, said], two[:, 0, said], atol=1e-3)
    assert torch.equal(one[0, 0, image], three[0, 0, image])
    for layer in range(1, len(one)):
        assert ((one[layer, 0, image] - three[layer, 0, image]).abs().amax(-1) > 1e-6).all()


def test_acceptance_6_image_tokens_stay_causal_among_themselves():
    model, processor = tiny.shared("llava")
    inputs = cases.talk(processor, [cases.user("is there a dog ?", 1)], [tiny.picture(1)])
    places = cases.visual(model, inputs)[0].nonzero()[:, 0].tolist()
    t = places[len(places) // 2]
    outputs, moved = [], []

    def shift(module, args, kwargs):
        if moved:
            embeds = kwargs["inputs_embeds"].clone()
            embeds[0, t] += 1
            return args, {**kwargs, "inputs_embeds": embeds}
        return None

    decoder = model.get_decoder()
    handles = [
        decoder.register_forward_pre_hook(shift, with_kwargs=True),
        decoder.layers[0].self_attn.register_forward_hook(
            lambda m, a, out: outputs.append(out[0][0])
        ),
    ]
    with torch.no_grad(), attach(model, MMA(), processor=processor):
        model(**inputs)
        moved.append(True)
        model(**inputs)
    for handle in handles:
        handle.remove()
    one, two = outputs
    earlier = [p for p in places if p < t]
    assert earlier
    assert torch.equal(one[earlier], two[earlier])
    later = [p for p in places if p >= t]
    assert ((one[later] - two[later]).abs().amax(-1) > 1e-6).all()


def test_acceptance_7_cached_decoding_equals_decoding_without_a_cache():
    model, processor = tiny.shared("llava")
    prompts = [*cases.PROMPTS, "the quick brown fox ?"]
    inputs = tiny.inputs(processor, prompts, [[tiny.picture(1)], [tiny.picture(2)], []])
    n = inputs["input_ids"].shape[1]
    with attach(model, MMA(), processor=processor), torch.no_grad():
        cached = model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for _ in range(16):
            said = torch.arange(ids.shape[1]).expand_as(ids) >= n
            whole = {**inputs, "input_ids": ids, "attention_mask": mask, "use_cache": False}
            whole["position_ids"] = cases.places(whole)
            whole[ROLES] = encoded(torch.zeros_like(ids), said)
            token = model(**whole).logits[:, -1].argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
    assert torch.equal(cached, ids)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "idefics3", "gemma3"])
def test_acceptance_8_a_padded_row_equals_the_row_alone(family):
    model, processor = tiny.shared(family)
    both = cases.padded_pair(processor)
    options = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    with attach(model, MMA(), processor=processor), torch.no_grad():
        together = model.generate(**both, **options, do_sample=False).logits
        for row in range(2):
            alone = tiny.inputs(processor, cases.PROMPTS[row : row + 1], [[tiny.picture(row + 1)]])
            single = model.generate(**alone, **options, do_sample=False).logits
            for a, b in zip(together, single, strict=True):
                torch.testing.assert_close(a[row : row + 1], b, atol=1e-5, rtol=1e-5)
                break  # greedy tokens after a tie may differ


def test_acceptance_11_static_cache_and_beams():
    model, processor = tiny.shared("qwen2_5_vl")
    inputs = cases.padded_pair(processor)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    static = {"cache_implementation": "static", "disable_compile": True}
    with attach(model, MMA(), processor=processor):
        tokens = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, **static), tokens)
        beams = model.generate(**inputs, **options, num_beams=3)
        assert torch.equal(model.generate(**inputs, **options, **static, num_beams=3), beams)
    assert not torch.equal(model.generate(**inputs, **options), tokens)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_acceptance_12_two_images_in_one_turn(family):
    """V1 T1 V2 T2: V1 sees T1 and T2, and nothing of V2; V2 sees T2."""
    model, processor = tiny.shared(family)
    content = [
        {"type": "image"}, {"type": "text", "text": "what is shown here ?"},
        {"type": "image"}, {"type": "text", "text": "is there a dog ?"},
    ]  # fmt: skip
    inputs = cases.talk(
        processor, [{"role": "user", "content": content}], [tiny.picture(1), tiny.picture(2)]
    )
    with torch.no_grad(), masks_of(model) as masks, attach(model, MMA(), processor=processor):
        model(**inputs)
    found, seen = masks[0][0, 0], cases.visual(model, inputs)[0]
    gap = _where(processor, inputs["input_ids"][0], "what is shown here ?")
    for i in seen.nonzero()[:, 0].tolist():
        ahead = torch.arange(len(seen)) > i
        assert torch.equal(found[i] & ahead, ~seen & ahead)
    one = seen.nonzero()[:, 0]
    assert (one < gap[0]).any()
    assert (one > gap[-1]).any()


@torch.no_grad()
def test_acceptance_13_a_later_turn_leaves_earlier_keys_and_values_as_they_are():
    model, processor = tiny.shared("llava")
    first = cases.talk(processor, [cases.user("what is shown here ?", 1)], [tiny.picture(1)])
    second = cases.talk(processor, [cases.user("is there a dog ?", 1)], [tiny.picture(2)])
    n, m = first["input_ids"].shape[1], second["input_ids"].shape[1]
    with attach(model, MMA(), processor=processor):
        cache = model(**first, use_cache=True).past_key_values
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with masks_of(model) as masks:
            model(
                **{**second, "attention_mask": torch.ones(1, n + m, dtype=torch.long)},
                past_key_values=cache,
            )
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :n], keys)
        assert torch.equal(layer.values[:, :, :n], values)
    seen = cases.visual(model, second)[0]
    ahead = masks[0][0, 0, :, n:].triu(1)
    assert torch.equal(ahead, (seen[:, None] & ~seen[None]).triu(1))


def test_acceptance_14_no_parameters():
    from mmlm import build_in

    model, processor = tiny.build("llava")
    names = [(n, p.shape) for n, p in model.named_parameters()]
    build_in(model, MMA(), processor=processor)
    assert [(n, p.shape) for n, p in model.named_parameters()] == names


# ---- turns of prompts ----------------------------------------------------------------------------


def test_without_a_processor_a_prompt_is_one_turn():
    model, processor = tiny.shared("llava")
    messages = [cases.user("what is it ?", 1), cases.assistant("a cat ."), cases.user("a dog ?")]
    inputs = cases.talk(processor, messages, [tiny.picture(1)])
    with torch.no_grad(), masks_of(model) as masks:
        with attach(model, MMA()):
            model(**inputs)
        with attach(model, MMA(), processor=processor):
            model(**inputs)
    one, told = (int(mask.triu(1).sum()) for mask in masks)
    seen = cases.visual(model, inputs)[0]
    last = int(seen.nonzero()[-1])
    assert one == int(seen.sum()) * (len(seen) - 1 - last)
    assert 0 < told < one


def test_a_prompt_of_another_template_is_one_turn_and_says_so_once():
    model, processor = tiny.build("llava")
    inputs = cases.talk(processor, [cases.user("what is it ?", 1)], [tiny.picture(1)])
    strange = {**inputs, "input_ids": inputs["input_ids"].clone()}
    strange["input_ids"][0, 0] = processor.tokenizer("cat", add_special_tokens=False)["input_ids"][
        0
    ]
    with attach(model, MMA(), processor=processor), torch.no_grad():
        with pytest.warns(UserWarning, match="one turn.* not written by the chat template"):
            model(**strange)
        model(**strange)
    with attach(model, AUTHORS, processor=processor), torch.no_grad():
        with pytest.raises(ValueError, match="not written by the chat template"):
            model(**strange)


def test_the_marker_needs_a_processor_and_ends_the_rectangle():
    model, processor = tiny.shared("llava")
    inputs = cases.talk(processor, [cases.user("what is it ?", 1)], [tiny.picture(1)])
    with attach(model, AUTHORS), torch.no_grad(), pytest.raises(ValueError, match="no processor"):
        model(**inputs)
    with torch.no_grad(), masks_of(model) as masks:
        with attach(model, AUTHORS, processor=processor):
            model(**inputs)
    header = processor.tokenizer("assistant:", add_special_tokens=False)["input_ids"]
    n = inputs["input_ids"].shape[1]
    marker = n - len(header)
    assert len(header) > 1
    last = int(cases.visual(model, inputs)[0].nonzero()[-1])
    assert masks[0][0, 0, last].nonzero()[:, 0].tolist() == list(range(marker + 1))


def test_a_causal_model_is_remarked_on_once(caplog):
    model, processor = tiny.build("llava")
    inputs = cases.padded_pair(processor)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            with attach(model, MMA(), processor=processor):
                model(**inputs)
    assert sum("untested ablation" in r.message for r in caplog.records) == 1
    from mmlm import build_in

    caplog.clear()
    trained, processor = tiny.build("llava")
    build_in(trained, MMA(), processor=processor)
    with torch.no_grad():
        trained(**inputs)
    assert not caplog.records


def test_videos_are_visual_too():
    """Ids of videos are visual ids; the rule knows no difference."""
    roles = TokenLayout.from_ids(torch.tensor([[5, 8, 8, 6, 9, 7]]), None, image_ids=(8, 9))
    found = allowed(MMA(), roles)[0]
    assert found[1].tolist() == [True, True, False, True, False, True]
    assert found[4].tolist() == [True] * 6
