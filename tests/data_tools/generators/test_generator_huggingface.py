"""The prefix-cached generator against the naive loop, family by family, and what may go wrong."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mmlm
from data_tools.generators import GeneratorError, Sample, SentenceRequest
from data_tools.generators import tree as tree_module
from data_tools.generators.drawing import Stops, Uniforms, draw
from data_tools.generators.huggingface import HFGenerator
from data_tools.generators.naive import NaiveGenerator
from data_tools.generators.prompts import CaptionPrompts
from data_tools.generators.sampling import Caption, draw_sentences
from data_tools.pictures import Picture
from mmlm.engine.families import FAMILIES
from mmlm.errors import UnsupportedModel

SIZES = ((64, 64), (112, 56), (40, 90))
QUESTIONS = ("What is this?", "What is in the picture, and where is it?", "Is it a cat?")
MAX_NEW = 16


def picture(number, size=(64, 64)):
    return Picture(str(number), Path(f"{number}.png"), tiny.picture(number, size), f"hash{number}")


def requests(contexts, step=0):
    return [
        SentenceRequest(picture(i, SIZES[i]), QUESTIONS[i], context, 1000 * step + i)
        for i, context in enumerate(contexts)
    ]


def longer(context, samples):
    """The next context: the first sentence, or one of another length for every picture."""
    said = [sample.text for sample in samples if sample.text]
    new = said[0] if said else "There is a dog on the left."
    return f"{context} {new}".strip()


class Passes:
    """Counts the positions that go through a decoder, and the pictures through a tower."""

    def __init__(self, model):
        self.positions = []
        model.get_decoder().register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.positions.append(tuple(kwargs["inputs_embeds"].shape[:2]))


# ---- the same samples as the naive loop ----------------------------------------------------------


@pytest.mark.parametrize("family", tiny.ALL)
def test_three_steps_equal_the_naive_loop(family):
    model, processor = tiny.shared(family)
    cached = HFGenerator(model, processor, max_new_tokens=MAX_NEW)
    alone = HFGenerator(model, processor, max_new_tokens=MAX_NEW, pictures_at_once=1)
    forgetful = HFGenerator(model, processor, max_new_tokens=MAX_NEW, keep=False)
    naive = NaiveGenerator(model, processor, max_new_tokens=MAX_NEW)
    contexts, texts = ["", "A cat.", ""], set()
    for step in range(3):
        asked = requests(contexts, step)
        samples = cached.sample_sentences(asked, 5, 1.0)
        assert samples == naive.sample_sentences(asked, 5, 1.0)
        assert samples == alone.sample_sentences(asked, 5, 1.0)
        assert samples == forgetful.sample_sentences(asked, 5, 1.0)
        texts |= {sample.text for row in samples for sample in row}
        contexts = [longer(*pair) for pair in zip(contexts, samples, strict=True)]
    assert len(texts) > 3


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_eager_attention_gives_the_same(family):
    model, processor = tiny.build(family)
    contexts = ["", "A cat.", "Two dogs, and a man."]
    expected = NaiveGenerator(model, processor, max_new_tokens=MAX_NEW).sample_sentences(
        requests(contexts), 4, 1.0
    )
    model.set_attn_implementation("eager")
    generator = HFGenerator(model, processor, max_new_tokens=MAX_NEW)
    assert generator.sample_sentences(requests(contexts), 4, 1.0) == expected


def test_the_embedded_model_gives_sentences():
    model, processor = mmlm.load("embedded")
    cached, naive = HFGenerator(model, processor), NaiveGenerator(model, processor)
    context = ""
    for step in range(3):
        asked = [SentenceRequest(picture(3, (80, 80)), "describe the image .", context, step)]
        [samples] = cached.sample_sentences(asked, 5, 0.7)
        assert [samples] == naive.sample_sentences(asked, 5, 0.7)
        assert all(s.finished or s.text.endswith(".") for s in samples)
        context = longer(context, samples)


def test_a_picture_is_read_once_and_a_step_reads_the_new_sentence_only():
    model, processor = tiny.build("llava")
    generator = HFGenerator(model, processor, max_new_tokens=4)
    generator.sample_sentences(requests(["A cat.", "", ""]), 3, 1.0)
    seen = Passes(model)
    generator.sample_sentences(requests(["A cat. A dog.", "", ""]), 3, 1.0)
    first, *steps = seen.positions
    new = len(processor.tokenizer(" A dog.")["input_ids"])
    assert first == (1, new)
    assert all(rows <= 3 and width <= 3 for rows, width in steps)


def test_samples_that_begin_alike_are_read_once():
    model, processor = tiny.build("llava")
    seen = Passes(model)
    generator = HFGenerator(model, processor, max_new_tokens=6)
    generator.sample_sentences(requests(["", "", ""])[:1], 20, 1e-4)  # all samples are equal
    assert [shape for shape in seen.positions[1:] if shape != (1, 1)] == []


def test_a_context_that_changes_is_cut_back():
    model, processor = tiny.shared("llava")
    cached = HFGenerator(model, processor, max_new_tokens=MAX_NEW)
    for context in ("A cat is on the mat.", "A cat is here.", "A cat", "", "A"):
        asked = requests([context, "", ""])
        fresh = HFGenerator(model, processor, max_new_tokens=MAX_NEW)
        got = cached.sample_sentences(asked, 4, 1.0)
        assert got == fresh.sample_sentences(asked, 4, 1.0)


def test_what_was_read_is_used_up_to_its_fixed_beginning():
    nothing = torch.zeros(1)
    kept = tree_module.Kept((1, 2, 3, 4, 5), [], nothing, shift=0, n_fixed=3, axes=0)
    assert kept.common((1, 2, 3, 9)) == 3
    assert kept.can_become((1, 2, 3, 4, 5))
    assert kept.can_become((1, 2, 3, 9))
    assert kept.can_become((1, 2, 3, 4))  # its last token is read again: its logits are wanted
    assert not kept.can_become((1, 2, 3))
    assert not kept.can_become((1, 2, 9, 4, 5))


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_a_long_sentence_beside_a_short_one(family):
    """Rows read equally many tokens, but none reads its picture (or a two-way question) again."""
    model, processor = tiny.shared(family)
    cached = HFGenerator(model, processor, max_new_tokens=4)
    cached.sample_sentences(requests(["", "", ""]), 3, 1.0)
    for words in (6, 60):
        asked = requests(["A cat.", "A dog.", "a cat and " * words])
        fresh = HFGenerator(model, processor, max_new_tokens=4, keep=False)
        assert cached.sample_sentences(asked, 3, 1.0) == fresh.sample_sentences(asked, 3, 1.0)
        held = [entry.kept.logits for entry in cached._entries.values()]
        jobs = [HFGenerator(model, processor) for _ in asked]
        for one, request, logits in zip(jobs, asked, held, strict=True):
            one.sample_sentences([request], 1, 1.0)
            [alone] = one._entries.values()
            torch.testing.assert_close(logits, alone.kept.logits, atol=1e-4, rtol=1e-4)
        cached.sample_sentences(requests(["", "", ""]), 3, 1.0)


def test_a_caption_that_is_done_leaves_the_batch_and_the_others_do_not_notice():
    model, processor = tiny.shared("llava")
    generator = HFGenerator(model, processor)
    asked = requests(["", "A man and a dog and a cat.", ""])
    generator.sample_sentences(asked, 1, 1.0)
    kept = [entry.kept for entry in generator._entries.values()]
    stops = Stops(frozenset(), frozenset())

    def drawn(rows, limits):
        captions = [
            Caption(kept[i], Uniforms(i, 4), limits[i], [[] for _ in range(4)]) for i in rows
        ]
        with torch.inference_mode():
            draw_sentences(model, captions, 1.0, stops, torch.tensor([4]))
        return [caption.samples for caption in captions]

    limits = [2, 3, 12]
    assert drawn([1, 0, 2], limits) == [drawn([i], limits)[0] for i in (1, 0, 2)]
    assert [len(ids) for ids in drawn([2], limits)[0]] == [12] * 4


def test_samples_depend_on_the_seed_of_the_request_only():
    model, processor = tiny.shared("llava")
    generator = HFGenerator(model, processor, max_new_tokens=MAX_NEW)
    asked = requests(["", "A cat.", "A dog. A man."])
    whole = generator.sample_sentences(asked, 4, 1.0)
    torch.manual_seed(5)
    for order in itertools.permutations(range(3)):
        again = generator.sample_sentences([asked[i] for i in order], 4, 1.0)
        assert again == [whole[i] for i in order]
    other = [SentenceRequest(r.picture, r.question, r.context, r.seed + 77) for r in asked]
    assert generator.sample_sentences(other, 4, 1.0) != whole
    # Samples come in the order drawn, and a shorter limit only cuts them.
    shorter = HFGenerator(model, processor, max_new_tokens=MAX_NEW // 2)
    for row, cut in zip(whole, shorter.sample_sentences(asked, 4, 1.0), strict=True):
        assert all(b in (a, Sample("", finished=False)) for a, b in zip(row, cut, strict=True))


def test_forget_frees_what_is_kept():
    model, processor = tiny.shared("llava")
    generator = HFGenerator(model, processor, max_new_tokens=2)
    asked = requests(["", "", ""])
    before = generator.sample_sentences(asked, 2, 1.0)
    assert len(generator._entries) == 3
    generator.forget([asked[0].picture, asked[2].picture])
    assert [key[0] for key in generator._entries] == ["1"]
    assert generator.sample_sentences(asked, 2, 1.0) == before


# ---- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("context", ["", "A cat.", "A  cat\n!", "<image>", "<s> </s>"])
def test_ids_without_the_picture_are_those_of_a_fresh_prompt(family, context):
    _, processor = tiny.shared(family)
    prompts, image = CaptionPrompts(processor), tiny.picture(0)
    first = prompts.inputs(image, QUESTIONS[1], "Two dogs.")["input_ids"][0].tolist()
    stem = prompts.stem(first, QUESTIONS[1], "Two dogs.")
    known = family != "gemma3"  # whose processor writes blank lines behind the picture
    assert (stem is not None) == known
    ids = prompts.ids(stem, QUESTIONS[1], context) if known else None
    if known and "<" not in context:
        assert ids is not None
    if ids is not None:
        made = prompts.inputs(image, QUESTIONS[1], context)["input_ids"][0].tolist()
        assert list(ids) == made


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_what_cannot_be_read_without_the_rest(family):
    model, processor = tiny.shared(family)
    prompts, image = CaptionPrompts(processor), tiny.picture(0)
    question = prompts.inputs(image, QUESTIONS[0], "")["input_ids"][0]
    whole = prompts.inputs(image, QUESTIONS[0], "A cat.")
    placeholder = model.config.image_token_id
    fixed = prompts.n_fixed(whole, torch.tensor([placeholder]))
    if family == "paligemma":  # the question attends to itself in both directions
        assert fixed == len(question)
    else:
        assert question[fixed - 1] == placeholder
        assert placeholder not in question[fixed:]


def test_the_context_is_an_open_turn_with_one_begin_token_and_no_end():
    model, processor = mmlm.load("embedded")
    ids = CaptionPrompts(processor).inputs(
        tiny.picture(0), "describe the image .", "there is a cat ."
    )["input_ids"][0]
    words = processor.tokenizer.convert_ids_to_tokens(ids)
    assert words.count("<bos>") == 1
    assert "<eos>" not in words
    assert words[-7:] == ["assistant", ":", "there", "is", "a", "cat", "."]
    assert model.config.image_token_id in ids


def _template(answer):
    return (
        "{% for m in messages %}{% if m['role'] == 'user' %}U: <image> q\n{% else %}"
        + answer
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )


@pytest.mark.parametrize(
    ("template", "joiner"),
    [
        (_template("A: {{ m['content'][0]['text'] }}</s>"), " "),
        (_template("A:{{ m['content'][0]['text'] }}</s>"), ""),
        (_template("A:\n{{ m['content'][0]['text'] }}</s>"), "\n"),
        (_template("{{ m['content'][0]['text'] }} (said)"), " "),  # cannot be asked
        (_template("").replace("A:", "A:\n"), ""),  # neither, and it ends with white space
    ],
)
def test_the_template_says_what_stands_before_an_answer(template, joiner):
    _, processor = tiny.build("llava")
    processor.chat_template = template
    assert CaptionPrompts(processor).joiner("?") == joiner


# ---- where sentences end -----------------------------------------------------------------------

WORDS = (
    ".",
    "!",
    "?",
    ".\n",
    ".\n\n",
    "end.",
    "3.",
    "1.5",
    "...",
    "a",
    ",",
    ". a",
    "</s>",
    "\n",
    "<unk>",
)


def _stops():
    model, processor = tiny.build("llava")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.Fuse()
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>"
    )
    model.generation_config.eos_token_id = WORDS.index("</s>")
    return Stops.of(model, processor), processor.tokenizer


def test_tokens_that_end_a_sentence():
    stops, _ = _stops()
    ends = {WORDS[i] for i in stops.sentence}
    assert ends == {".", "!", "?", ".\n", ".\n\n", "end.", "..."}
    assert stops.caption == {WORDS.index("</s>")}


def test_samples_are_cut_at_their_end():
    stops, tokenizer = _stops()
    at = WORDS.index
    assert stops.sample(tokenizer, [at("a"), at(".\n\n")]) == Sample("a.", finished=False)
    assert stops.sample(tokenizer, [at("</s>")]) == Sample("", finished=True)
    assert stops.sample(tokenizer, [at("a"), at("</s>")]) == Sample("a", finished=True)
    # The limit came before an end: no sentence, and the caption is not over.
    assert stops.sample(tokenizer, [at("a"), at("a")]) == Sample("", finished=False)


# ---- drawing -------------------------------------------------------------------------------------


def test_a_token_is_the_one_whose_share_holds_the_number():
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    numbers = torch.tensor([[0.0, 0.49, 0.51, 0.76], [0.0, 0.1, 0.9, 0.999999]])
    none = torch.tensor([], dtype=torch.long)
    assert draw(shares.log(), numbers, 1.0, none).tolist() == [[0, 0, 1, 2], [1, 1, 1, 1]]
    # Without the first token the others share its part.
    assert draw(shares[:1].log(), numbers[:1], 1.0, torch.tensor([0])).tolist() == [[1, 1, 2, 2]]
    # Temperature 1/2 squares the shares: 4/6, 1/6, 1/6.
    assert draw(shares[:1].log(), numbers[:1], 0.5, none).tolist() == [[0, 0, 0, 1]]


def test_drawn_tokens_have_the_frequencies_of_the_distribution():
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    numbers = np.stack([Uniforms(3, 500).at(step) for step in range(40)]).reshape(1, -1)
    none = torch.tensor([], dtype=torch.long)
    tokens = draw(logits, torch.from_numpy(numbers), 0.7, none)
    found = torch.bincount(tokens[0], minlength=7) / tokens.numel()
    torch.testing.assert_close(found, (logits / 0.7).softmax(-1)[0], atol=0.015, rtol=0)


def test_numbers_come_in_the_order_of_tokens():
    straight = [Uniforms(9, 3).at(step) for step in range(40)]
    one = Uniforms(9, 3)
    one.at(39)
    assert all((one.at(step) == straight[step]).all() for step in range(40))
    assert (Uniforms(2**63 + 1, 3).at(0) != straight[0]).any()


# ---- what may go wrong: one request, never the others -------------------------------------------


def test_failure_a_picture_that_the_processor_refuses():
    model, processor = tiny.shared("qwen2_5_vl")
    generator = HFGenerator(model, processor, max_new_tokens=4)
    asked = requests(["", "", ""])
    strip = Picture("strip", Path("strip.png"), Image.new("RGB", (1, 1000)), "strip")
    asked[1] = SentenceRequest(strip, "What?", "", 1)
    first, bad, last = generator.sample_sentences(asked, 2, 1.0)
    assert isinstance(bad, GeneratorError)
    assert "'strip' was refused" in str(bad)
    assert [first] == generator.sample_sentences(asked[:1], 2, 1.0)
    assert len(last) == 2


def test_failure_a_prompt_that_fills_the_context():
    model, processor = tiny.shared("llava")
    asked = requests(["", "", "a cat. " * 600])
    for generator in (HFGenerator(model, processor), NaiveGenerator(model, processor)):
        first, second, bad = generator.sample_sentences(asked[:0] + asked, 1, 1.0)
        assert isinstance(bad, GeneratorError)
        assert "context 1024" in str(bad)
        assert len(first) == len(second) == 1


def test_a_sentence_ends_with_the_models_context(monkeypatch):
    model, processor = tiny.build("llava")
    prompt = CaptionPrompts(processor).inputs(tiny.picture(0), QUESTIONS[0], "")["input_ids"]
    model.config.get_text_config().max_position_embeddings = prompt.shape[1] + 3
    seen = Passes(model)
    generator = HFGenerator(model, processor)
    generator.sample_sentences(requests([""] * 3)[:1], 4, 5.0)
    assert len(seen.positions) == 1 + 2  # the third token is drawn and needs no pass


def _memory_for(monkeypatch, rows):
    """A device whose memory holds so many captions."""
    real = tree_module.Rows.__init__

    def limited(self, model, kept, *args, **kwargs):
        if len(kept) > rows:
            raise torch.OutOfMemoryError("pretended")
        real(self, model, kept, *args, **kwargs)

    monkeypatch.setattr(tree_module.Rows, "__init__", limited)


def test_failure_out_of_memory_halves_the_batch(monkeypatch):
    model, processor = tiny.shared("llava")
    asked = requests(["", "A cat.", "A dog."])
    expected = HFGenerator(model, processor, max_new_tokens=4).sample_sentences(asked, 3, 1.0)
    _memory_for(monkeypatch, 1)
    generator = HFGenerator(model, processor, max_new_tokens=4)
    assert generator.sample_sentences(asked, 3, 1.0) == expected


def test_failure_out_of_memory_with_one_picture_concerns_it_alone(monkeypatch):
    model, processor = tiny.shared("llava")
    generator = HFGenerator(model, processor, max_new_tokens=4)
    real = tree_module.prefill

    def limited(model, inputs, n_fixed):
        if inputs["input_ids"].shape[1] > 100:
            raise torch.OutOfMemoryError("pretended")
        return real(model, inputs, n_fixed)

    monkeypatch.setattr(tree_module, "prefill", limited)
    first, bad, last = generator.sample_sentences(requests(["", "a cat " * 60, ""]), 3, 1.0)
    assert "out of memory with picture '1' alone" in str(bad)
    assert len(first) == len(last) == 3


@pytest.mark.parametrize(
    ("values", "name"),
    [({"max_new_tokens": 0}, "max_new_tokens"), ({"pictures_at_once": 0}, "pictures_at_once")],
)
def test_failure_wrong_numbers_are_named(values, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        HFGenerator(*tiny.shared("llava"), **values)


@pytest.mark.parametrize(("n", "temperature"), [(0, 1.0), (2, 0.0), (2, float("nan"))])
def test_failure_wrong_sampling_is_refused(n, temperature):
    for made in (HFGenerator, NaiveGenerator):
        with pytest.raises(ValueError, match="must be"):
            made(*tiny.shared("llava")).sample_sentences([], n, temperature)


def test_failure_attention_that_takes_no_mask():
    model, processor = tiny.build("llava")
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match="silently stay causal"):
        HFGenerator(model, processor)


def test_failure_an_unknown_family_that_reads_otherwise_in_two_parts(monkeypatch):
    model, processor = tiny.shared("llava")
    monkeypatch.delitem(FAMILIES, "llava")
    expected = HFGenerator(model, processor, max_new_tokens=4, keep=False)
    honest = HFGenerator(model, processor, max_new_tokens=4)
    for asked in (requests(["", "", ""]), requests(["A cat.", "", ""])):
        assert honest.sample_sentences(asked, 2, 1.0) == expected.sample_sentences(asked, 2, 1.0)
    other = HFGenerator(model, processor, max_new_tokens=4)
    other.sample_sentences(requests(["", "", ""]), 2, 1.0)
    read = tree_module.extend

    def otherwise(model, kept, prompts):
        return [replace(one, logits=one.logits + 0.01) for one in read(model, kept, prompts)]

    monkeypatch.setattr(tree_module, "extend", otherwise)
    honest.sample_sentences(requests(["A cat. A dog.", "", ""]), 2, 1.0)  # was checked before
    with pytest.raises(UnsupportedModel, match="in one part than in two"):
        other.sample_sentences(requests(["A cat.", "", ""]), 2, 1.0)


# ---- methods -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["VHR(alpha=3.0)", "VCD(alpha=1.0)"])
def test_methods_see_fresh_prompts(method):
    model, processor = tiny.shared("llava")
    methods = [mmlm.parse_method(method)]
    generator = HFGenerator(model, processor, max_new_tokens=8, methods=methods)
    naive = NaiveGenerator(model, processor, max_new_tokens=8, methods=methods)
    plain = HFGenerator(model, processor, max_new_tokens=8)
    contexts = ["", "A cat.", ""]
    for step in range(2):
        asked = requests(contexts, step)
        samples = generator.sample_sentences(asked, 4, 1.0)
        assert samples == naive.sample_sentences(asked, 4, 1.0)
        assert samples != plain.sample_sentences(asked, 4, 1.0)
        contexts = [longer(*pair) for pair in zip(contexts, samples, strict=True)]
    generator.forget([asked[0].picture])
    assert generator.facts["methods"] == [methods[0].text]


def test_facts_name_what_determines_the_samples():
    model, processor = tiny.build("llava")
    one = HFGenerator(model, processor, max_new_tokens=8)
    facts = dict(one.facts)
    assert facts == HFGenerator(model, processor, max_new_tokens=8, pictures_at_once=3).facts
    assert facts == NaiveGenerator(model, processor, max_new_tokens=8).facts
    assert facts["max_new_tokens"] == 8
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    processor.chat_template = processor.chat_template + " "
    changed = {name for name, value in one.facts.items() if value != facts[name]}
    assert changed == {"weights", "template", "processor"} or changed == {"weights", "template"}
