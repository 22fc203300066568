"""TextDominance: the spec's acceptance list by number, no change of any output, edited rows."""

from __future__ import annotations

import inspect
import math

import checks
import pytest
import tiny
import torch
from shapes import record_shapes

import mmlm
from benchmarks.text_dominance.records import Masses
from decoding.pai import PAI
from decoding.var import VAR
from decoding.vhr import VHR
from mmlm import TextDominance, TokenLayout, attach, measured, parse_method
from mmlm.engine.layout import ANSWER
from mmlm.engine.stages import measured_layers, stage_layers
from mmlm.errors import IncompatibleMethods
from mmlm.probes.dominance import key_marks, masses

NEW = 6
PROMPTS = [
    "describe the image in detail .",
    "is there a dog in the picture ?",
    "what is shown here ? a cat sits on a red couch .",
]
#: The last one takes more placeholders where a model cuts pictures into tiles.
PICTURES = [[tiny.picture(1)], [tiny.picture(2)], [tiny.picture(3, (90, 60))]]
VAR_STRONG = VAR(
    move_fraction=0.9,
    min_nonsink_ratio=0.0,
    min_visual_mass=0.0,
    tau=0.9,
    sink_dims=(2, 7),
    include_last_layer=True,
)


def run(model, inputs, *methods, tokens=None, processor=None, **options):
    """New tokens and records of a run in which every row has its full length."""
    with attach(model, *methods, processor=processor):
        ids = model.generate(
            **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
        )
        found = [row["text_dominance"] for row in measured(model, tokens)]
    return ids, found


def batch(processor, rows=slice(None)):
    return tiny.inputs(processor, PROMPTS[rows], PICTURES[rows])


def close(a, b, tolerance=1e-6):
    """Two records are equal, numbers to a relative tolerance."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        expected = b[name]
        if isinstance(value, list) and isinstance(value[0], float):
            assert value == pytest.approx(expected, rel=tolerance, abs=tolerance), name
        else:
            assert value == expected, name


def eager_sums(model, inputs, ids, methods=()):
    """Sums over generated queries from whole eager matrices, by loops: [layers][row][group]."""
    implementation = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with attach(model, *methods):
            output = model.generate(
                **inputs,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                output_attentions=True,
                return_dict_in_generate=True,
            )
    finally:
        model.set_attn_implementation(implementation)
    assert torch.equal(output.sequences, ids)
    anatomy = mmlm.Anatomy(model)
    visual = torch.isin(inputs["input_ids"], torch.tensor(anatomy.image_ids))
    real = inputs["attention_mask"].bool()
    n = real.shape[1]
    found = []
    for layer in range(anatomy.n_layers):
        rows = [step[layer][:, :, -1].mean(1)[:, :n] for step in output.attentions[1:]]
        a = torch.stack(rows).sum(0)
        found.append([((a * (real & ~visual)).sum(-1)), (a * visual).sum(-1)])
    return found


# ---- acceptance tests by number ----


@pytest.mark.parametrize(("n_text", "n_visual"), [(1, 1), (7, 576), (150, 29)])
def test_acceptance_1_uniform_attention_is_balanced(n_text, n_visual):
    layer = Masses(n_text / 1000, n_visual / 1000, n_text, n_visual)
    assert layer.mdi == pytest.approx(1)
    assert layer.aei_text == pytest.approx(1)
    assert layer.aei_image == pytest.approx(1)


def test_acceptance_1_all_mass_on_text_has_no_mdi():
    layer = Masses(text=3.0, visual=0.0, n_text=10, n_visual=90)
    assert layer.mdi is None
    assert layer.aei_text == pytest.approx(1 / 0.1)
    assert layer.aei_image == 0


def test_acceptance_1_uniform_rows_through_the_probes_own_sums():
    marks = torch.zeros(1, 12, 4)
    marks[0, 1:4, 0] = marks[0, 4:12, 1] = 1  # three text keys, eight visual ones, one padding
    a = torch.full((1, 5, 1, 14), 1 / 14)
    text, visual, *_ = masses(a, None, marks).mean(1)[0].tolist()
    layer = Masses(text, visual, 3, 8)
    assert layer.mdi == pytest.approx(1)
    assert text == pytest.approx(3 / 14)


@pytest.mark.parametrize("seed", range(20))
def test_acceptance_2_mdi_is_the_quotient_of_both_efficiencies(seed):
    generator = torch.Generator().manual_seed(seed)
    text, visual = torch.rand(2, generator=generator).tolist()
    n_text, n_visual = torch.randint(1, 600, (2,), generator=generator).tolist()
    layer = Masses(text, visual, n_text, n_visual)
    assert layer.mdi == pytest.approx(layer.aei_text / layer.aei_image, rel=1e-6)
    t = n_text / (n_text + n_visual)
    assert layer.mdi == pytest.approx(layer.aei_text * (1 - t) / (1 - t * layer.aei_text), rel=1e-5)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_acceptance_3_rows_equal_those_of_eager_attention(family):
    model, processor = tiny.shared(family)
    assert mmlm.Anatomy(model).n_kv_heads < mmlm.Anatomy(model).n_heads  # grouped queries
    inputs = batch(processor)
    assert not bool(inputs["attention_mask"].all())  # padded on the left
    ids, found = run(model, inputs, TextDominance(layers=(0, 1, 2, 3)))
    for layer, (text, visual) in enumerate(eager_sums(model, inputs, ids)):
        for row, record in enumerate(found):
            assert record["text"][layer] == pytest.approx(text[row].item(), rel=1e-5, abs=1e-6)
            assert record["visual"][layer] == pytest.approx(visual[row].item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen2_5_vl"])
def test_acceptance_3_and_4_a_padded_batch_equals_single_runs(family):
    model, processor = tiny.shared(family)
    ids, together = run(model, batch(processor), TextDominance())
    for row in range(3):
        alone, found = run(model, batch(processor, slice(row, row + 1)), TextDominance())
        assert torch.equal(alone[0, -NEW:], ids[row, -NEW:])
        close(found[0], together[row], 2e-6)


def test_acceptance_4_what_a_row_does_after_its_end_does_not_count():
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    _, long = run(model, inputs, TextDominance(), tokens=[NEW, 4, 1])
    assert [record["queries"] for record in long] == [5, 3, 1]
    assert [r["queries_from"] for r in long] == ["generated", "generated", "last prompt row"]
    with attach(model, TextDominance()):
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        short = [row["text_dominance"] for row in measured(model)]
    close(long[1], short[1])
    with attach(model, TextDominance()):
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        close(measured(model)[2]["text_dominance"], long[2])


# ---- nothing is changed ----


@pytest.mark.parametrize("family", tiny.ALL)
def test_no_logit_is_changed_in_any_family(family):
    model, processor = tiny.shared(family)
    inputs = batch(processor)
    with torch.no_grad():
        plain = model(**inputs).logits
    expected = model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    before = {name: sorted(vars(m)) for name, m in model.named_modules()}
    with attach(model, TextDominance()), torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)
        given = model.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        assert len(measured(model)) == 3
    assert torch.equal(given.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(given.scores, expected.scores, strict=True))
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_any_attention_and_any_cache_give_the_same_record(implementation, cache):
    model, processor = tiny.build("llava")
    inputs = batch(processor)
    _, expected = run(model, inputs, TextDominance())
    model.set_attn_implementation(implementation)
    _, found = run(model, inputs, TextDominance(), **cache)
    for a, b in zip(found, expected, strict=True):
        close(a, b, 1e-5)


#: What every method must keep, without what a probe must not do: change logits, run under beams.
CHANGING = (checks.changes_logits, checks.image_free_row_is_unchanged)
KEPT = [
    check
    for check in checks.CHECKS
    if "num_beams" not in inspect.getsource(check) and check not in CHANGING
]


@pytest.mark.parametrize("check", KEPT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_keeps_the_contract_of_methods(check, family):
    check(TextDominance(), family)


def test_enough_of_the_contract_applies():
    assert len(KEPT) >= 8
    assert checks.leaves_no_trace in KEPT


def test_no_square_matrix_is_made():
    model, processor = tiny.shared("llava")
    inputs = batch(processor, slice(0, 1))
    n = inputs["input_ids"].shape[1]
    heads = mmlm.Anatomy(model).n_heads
    with record_shapes() as seen:
        run(model, inputs, TextDominance())
    shapes = {shape for _, shape, _ in seen}
    assert (1, heads, 1, n) in shapes  # the row of a prompt's last position
    assert not [s for s in shapes if s[-2:] == (n, n) and heads in s[:-2]]


# ---- what is measured ----


def test_groups_of_keys_by_hand():
    ids = torch.tensor([[0, 0, 5, 90, 90, 91, 6, 7, 8], [5, 6, 7, 8, 6, 7, 8, 6, 7]])
    real = torch.ones_like(ids)
    real[0, :2] = 0
    layout = TokenLayout.from_ids(ids, real, image_ids=(90,), wrapper_ids=(91,))
    layout.seg[0, -1] = ANSWER
    text, visual, instruction, first = key_marks(layout).bool().unbind(-1)
    assert text[0].nonzero().flatten().tolist() == [2, 5, 6, 7]
    assert visual[0].nonzero().flatten().tolist() == [3, 4]
    assert instruction[0].nonzero().flatten().tolist() == [6, 7]
    assert first[0].nonzero().flatten().tolist() == [2]
    assert text[1].all()
    assert not visual[1].any()
    assert not instruction[1].any()  # without an image there is nothing behind it
    assert first[1].nonzero().flatten().tolist() == [0]


def test_the_parts_of_a_record_fit_together():
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    anatomy = mmlm.Anatomy(model)
    _, found = run(model, inputs, TextDominance())
    visual = torch.isin(inputs["input_ids"], torch.tensor(anatomy.image_ids)).sum(-1)
    for row, record in enumerate(found):
        assert record["layers"] == list(measured_layers(anatomy.n_layers))
        assert record["n_layers"] == anatomy.n_layers
        assert record["n_visual"] == visual[row]
        assert record["n_text"] + record["n_visual"] == inputs["attention_mask"][row].sum()
        assert 0 < record["n_instruction"] < record["n_text"]
        for i in range(len(record["layers"])):
            assert record["text"][i] + record["visual"][i] < record["queries"]
            assert record["instruction"][i] <= record["text"][i]
            assert 0 < record["first_token"][i] <= record["text"][i]
        assert record["first"] == "text"


def test_a_first_token_that_is_visual_is_named():
    model, processor = tiny.shared("paligemma")
    _, found = run(model, batch(processor), TextDominance())
    ids = batch(processor)["input_ids"]
    visual = torch.isin(ids, torch.tensor(mmlm.Anatomy(model).image_ids))
    first = batch(processor)["attention_mask"].argmax(-1)
    for row, record in enumerate(found):
        assert record["first"] == ("visual" if visual[row, first[row]] else "text")


def test_a_prompt_without_a_picture_has_no_visual_key():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:2], [[tiny.picture(1)], []])
    _, found = run(model, inputs, TextDominance())
    assert found[0]["n_visual"] > 0
    assert found[1]["n_visual"] == found[1]["n_instruction"] == 0
    assert set(found[1]["visual"]) == {0.0}


@pytest.mark.parametrize("method", [PAI(gamma=1.0), VAR_STRONG], ids=["PAI", "VAR"])
@pytest.mark.parametrize("order", [1, -1])
def test_it_sees_the_rows_behind_the_edits_of_other_methods(method, order):
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    probe = TextDominance(layers=(0, 1, 2, 3))
    _, plain = run(model, inputs, probe)
    with attach(model, method, processor=processor):
        expected = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    ids, found = run(model, inputs, *(probe, method)[::order], processor=processor)
    assert torch.equal(ids, expected)
    assert plain != found
    # Eager kernels return edited weights: the reference sees what the model used.
    for layer, (text, visual) in enumerate(eager_sums(model, inputs, ids, (method,))):
        for row, record in enumerate(found):
            assert record["text"][layer] == pytest.approx(text[row].item(), rel=1e-5, abs=1e-6)
            assert record["visual"][layer] == pytest.approx(visual[row].item(), rel=1e-5, abs=1e-6)


def test_auxiliary_rows_are_not_measured():
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    ids, found = run(model, inputs, VHR(), TextDominance(), processor=processor)
    with attach(model, VHR(), processor=processor):
        plain = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert torch.equal(ids, plain)
    assert len(found) == 3


@torch.no_grad()
def test_a_given_answer_is_measured_as_if_it_were_generated():
    model, processor = tiny.shared("llava")
    inputs = batch(processor)
    n = inputs["input_ids"].shape[1]
    ids, expected = run(model, inputs, TextDominance())
    anatomy = mmlm.Anatomy(model)
    prompt = TokenLayout.from_ids(
        inputs["input_ids"], inputs["attention_mask"], image_ids=anatomy.image_ids
    )
    fed = NEW - 1  # the last token is never fed back
    mask = inputs["attention_mask"]
    whole = {
        **inputs,
        "input_ids": ids[:, : n + fed],
        "attention_mask": torch.cat([mask, mask.new_ones(3, fed)], dim=1),
    }
    with attach(model, TextDominance(queries="answer"), layout=prompt.append(fed)):
        model(**whole)
        found = [row["text_dominance"] for row in measured(model)]
    for a, b in zip(found, expected, strict=True):
        assert a["queries_from"] == "answer"
        close(a | {"queries_from": "generated"}, b, 1e-5)


def test_a_second_turn_on_a_kept_cache_adds_no_query():
    model, processor = tiny.shared("llava")
    inputs = batch(processor, slice(0, 1))
    with attach(model, TextDominance()), torch.no_grad():
        output = model(**inputs, use_cache=True)
        length = inputs["input_ids"].shape[1]
        for new in (1, 3, 1):  # an answer's token, another question, an answer's token
            length += new
            output = model(
                input_ids=torch.full((1, new), 40),
                attention_mask=torch.ones(1, length),
                past_key_values=output.past_key_values,
                use_cache=True,
            )
        assert measured(model)[0]["text_dominance"]["queries"] == 2


def test_records_outlive_generate_until_the_next_prompt_begins():
    model, processor = tiny.shared("llava")
    with attach(model, TextDominance()):
        assert measured(model) == []
        model.generate(**batch(processor), max_new_tokens=3, do_sample=False)
        assert len(measured(model)) == 3
        model.generate(**batch(processor, slice(0, 1)), max_new_tokens=3, do_sample=False)
        assert len(measured(model)) == 1


# ---- stages ----


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (32, ((0, 1), (15, 16), (30, 31))),
        (8, ((0, 1), (3, 4), (6, 7))),
        (7, ((0, 1), (2, 3), (5, 6))),
        (4, ((0, 1), (1, 2), (2, 3))),
        (2, ((0, 1), (0, 1), (0, 1))),
        (1, ((0,), (0,), (0,))),
    ],
)
def test_stages(n, expected):
    assert tuple(stage_layers(n).values()) == expected
    assert measured_layers(n) == tuple(sorted({x for pair in expected for x in pair}))


# ---- text form and errors ----


def test_text_form_and_neutral():
    probe = TextDominance(layers=[3, 1])
    assert probe.layers == (1, 3)
    assert parse_method(repr(probe)) == probe
    assert probe.neutral() == probe
    assert "TextDominance" not in mmlm.method_names()  # it is no method against hallucination


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ()}, "layers must be a non-empty list"),
        ({"layers": (0, 0)}, "layers must be different"),
        ({"layers": (-1,)}, "layers must be different and >= 0"),
        ({"layers": (math.nan,)}, "layers must be a non-empty list of integers"),
        ({"queries": "prompt"}, "queries must be one of 'generated', 'answer'"),
    ],
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        TextDominance(**arguments)


def test_error_layer_that_the_model_lacks():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(ValueError, match="layer 9 does not exist"),
        attach(model, TextDominance(layers=(0, 9))),
    ):
        pass


def test_error_beam_search():
    model, processor = tiny.shared("llava")
    with (
        attach(model, TextDominance()),
        pytest.raises(IncompatibleMethods, match="cannot run with beam search"),
    ):
        model.generate(**batch(processor), max_new_tokens=2, num_beams=2)


def test_error_two_of_them():
    model, _ = tiny.shared("llava")
    with (
        pytest.raises(IncompatibleMethods, match="both measure text_dominance"),
        attach(model, TextDominance(), TextDominance(layers=(0,))),
    ):
        pass


def test_error_measured_outside_or_with_wrong_numbers():
    model, processor = tiny.shared("llava")
    with pytest.raises(ValueError, match="inside the block"):
        measured(model)
    with attach(model, TextDominance()):
        model.generate(**batch(processor), max_new_tokens=2, do_sample=False)
        with pytest.raises(ValueError, match="2 numbers of tokens for 3 rows"):
            measured(model, [2, 2])
    with attach(model, VHR()):
        model.generate(**batch(processor), max_new_tokens=2, do_sample=False)
        assert measured(model, [2, 2, 2]) == []


def test_a_method_that_measures_nothing_says_so():
    with pytest.raises(NotImplementedError, match="VHR measures nothing"):
        VHR().record(None, None)


@torch.no_grad()
def test_a_given_answer_without_a_picture_has_empty_sums():
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, PROMPTS[:1], [[]])
    layout = TokenLayout.from_ids(
        inputs["input_ids"], inputs["attention_mask"], image_ids=mmlm.Anatomy(model).image_ids
    )
    with attach(model, TextDominance(queries="answer"), layout=layout):
        model(**inputs)
        record = measured(model)[0]["text_dominance"]
    assert record["queries"] == record["n_visual"] == 0
    assert set(record["text"]) == {0.0}
