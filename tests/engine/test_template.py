"""Template: the user's words against the chat template, in six styles of template."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerFast

import mmlm
from mmlm.engine.branches.template import Template, known_processor, remember_processor
from mmlm.engine.layout import TokenLayout
from mmlm.errors import LayoutError
from mmlm.inputs import SIMPLE_TEMPLATE, message, prepare

_PARTS = "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
_SYSTEM_TEXT = "{{ m.content[0].text }}"

STYLES = {
    "tiny": "TINY",
    "vicuna": SIMPLE_TEMPLATE,
    # A default system message that a given one replaces, special tokens around every turn.
    "chatml": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are kind.<|im_end|>\n"
        "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n" + _PARTS + "<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # The system message stands inside the first question's frame; the template writes <s> itself.
    "llama2": (
        "<s>{% for m in messages %}{% if m.role == 'system' %}[INST] <<SYS>>\n"
        + _SYSTEM_TEXT
        + "\n<</SYS>>\n\n{% elif m.role == 'user' %}"
        "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'system' %}[INST] {% endif %}"
        + _PARTS
        + " [/INST]{% else %} "
        + _PARTS
        + " </s>{% endif %}{% endfor %}"
    ),
    # No system message at all; refuses one.
    "strict": (
        "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
        "{{ raise_exception('no such role') }}{% endif %}<turn>{{ m.role }}\n" + _PARTS + "<end>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    ),
    # Content must be a string (the image's placeholder is written into it by hand).
    "string": (
        "{% for m in messages %}{{ m.role.upper() + '> ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT> {% endif %}"
    ),
}
QUESTION, ANSWER, NEXT = "is there a dog ? maybe", "no , a cat .", "what colour is it ?"


def processor_of(style: str):
    """A fresh LLaVA processor that writes its prompts in this style."""
    _, processor = tiny.build("llava")
    if STYLES[style] != "TINY":
        processor.chat_template = STYLES[style]
    processor.tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<image>", "<|im_start|>", "<|im_end|>", "<turn>", "<end>"]}
    )
    return processor


def render(processor, style, conversation, **options):
    if style == "string":
        conversation = [
            {
                "role": m["role"],
                "content": "".join(p.get("text", "<image>") for p in m["content"]),
            }
            for m in conversation
        ]
    options = {"add_generation_prompt": True, **options}
    return processor.apply_chat_template(conversation, tokenize=False, **options)


def read(processor, text, *, bos=True):
    """Token ids [1, N] with the image expanded to 16 tokens, and what is readable in them."""
    tokenizer = processor.tokenizer
    ids = tokenizer(text.replace("<image>", "<image>" * 16), add_special_tokens=False)["input_ids"]
    if bos and not text.startswith("<s>"):
        ids = [tokenizer.bos_token_id, *ids]
    ids = torch.tensor([[tokenizer.pad_token_id] * 3 + ids])
    mask = (ids != tokenizer.pad_token_id).long()
    layout = TokenLayout.from_ids(ids, mask, image_ids=(tokenizer.image_token_id,))
    return ids, layout.real & ~layout.visual & ~layout.frame


def spelled(processor, ids, chosen):
    """Text of some positions, blanks left out."""
    return "".join(processor.tokenizer.decode(ids[chosen]).split())


def squeezed(*texts):
    return "".join("".join(texts).split())


@pytest.mark.parametrize("style", STYLES)
def test_words_of_one_question(style):
    processor = processor_of(style)
    ids, readable = read(processor, render(processor, style, [message("user", QUESTION, 1)]))
    words = Template.of(processor).words(ids, readable)
    assert spelled(processor, ids, words) == squeezed(QUESTION)
    empty = render(processor, style, [message("user", "", 1)]).replace("<image>", "")
    rest = spelled(processor, ids, readable & ~words)
    assert rest == squeezed("" if empty.startswith("<s>") else "<s>", empty)


@pytest.mark.parametrize("style", STYLES)
def test_words_of_all_turns_and_no_answers(style):
    processor = processor_of(style)
    talk = [message("user", QUESTION, 1), message("assistant", ANSWER), message("user", NEXT)]
    ids, readable = read(processor, render(processor, style, talk))
    words = Template.of(processor).words(ids, readable)
    assert spelled(processor, ids, words) == squeezed(QUESTION, NEXT)
    assert squeezed(ANSWER) in spelled(processor, ids, readable & ~words)


@pytest.mark.parametrize("style", ["tiny", "chatml", "llama2", "string", "vicuna"])
def test_a_system_message_is_not_the_users(style):
    processor = processor_of(style)
    talk = [message("system", "answer with one word ."), message("user", QUESTION, 1)]
    ids, readable = read(processor, render(processor, style, talk))
    words = Template.of(processor).words(ids, readable)
    assert spelled(processor, ids, words) == squeezed(QUESTION)


@pytest.mark.parametrize("style", ["tiny", "chatml", "strict"])
def test_an_answer_that_was_begun_and_a_prompt_without_generation_prompt(style):
    processor = processor_of(style)
    talk = [message("user", QUESTION, 1)]
    begun = render(processor, style, talk) + "the image shows"
    for text in (begun, render(processor, style, talk, add_generation_prompt=False)):
        ids, readable = read(processor, text)
        words = Template.of(processor).words(ids, readable)
        assert spelled(processor, ids, words) == squeezed(QUESTION)


def test_the_users_words_may_look_like_the_template():
    """The last question ends where the prompt ends, whatever the user wrote."""
    processor = processor_of("tiny")
    odd = "what does assistant: mean ?"
    ids, readable = read(processor, render(processor, "tiny", [message("user", odd, 1)]))
    assert spelled(processor, ids, Template.of(processor).words(ids, readable)) == squeezed(odd)


def test_blanks_between_words_are_words_and_blanks_beside_images_are_not():
    processor = processor_of("vicuna")
    text = render(processor, "vicuna", [message("user", "one\n\n\ntwo", 1)])
    ids, readable = read(processor, text)
    words = Template.of(processor).words(ids, readable)
    columns = words[0].nonzero().flatten().tolist()
    assert columns == list(range(columns[0], columns[-1] + 1))
    assert processor.tokenizer.decode(ids[words]) == "one\n\n\ntwo"
    after_image = int((ids[0] == processor.tokenizer.image_token_id).nonzero()[-1]) + 1
    assert processor.tokenizer.decode(ids[0, after_image]) == "\n"
    assert not words[0, after_image]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_words_of_every_familys_processor(family):
    """Placeholders, frames and tile marks between the turns' frames are never words."""
    model, processor = tiny.shared(family)
    prompts = ["describe the image in detail .", "what is shown here ?"]
    pictures = [[tiny.picture(1), tiny.picture(2, (90, 60))], [tiny.picture(3)]]
    inputs = tiny.inputs(processor, prompts, pictures)
    seen = []

    class Look(mmlm.M3ID):
        def begin(self, prompt):
            seen.append(prompt.source.words())
            return super().begin(prompt)

    with mmlm.attach(model, Look(), processor=processor), torch.no_grad():
        model(**inputs)
    for row, prompt in enumerate(prompts):
        assert spelled(processor, inputs["input_ids"][row], seen[0][row]) == squeezed(prompt)


def test_a_word_level_tokenizer_with_unknown_words():
    """The embedded model: lower case, unknown words are words all the same."""
    _, processor = mmlm.load()
    talk = [message("user", "Is there a ZEPPELIN in the image?", 1)]
    ids = prepare(processor, [talk], [[tiny.picture(1)]])["input_ids"]
    readable = ids != processor.tokenizer.convert_tokens_to_ids("<image>")
    words = Template.of(processor).words(ids, readable)
    assert processor.decode(ids[words]) == "is there a <unk> in the image ?"


def _metaspace():
    """A sentence-piece-like tokenizer: blanks are part of the next word, decoding moves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    lines = [*tiny._SENTENCES, "USER: what ? ASSISTANT: no\n", "abcdefghijklmnopqrstuvwxyz"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<pad>", "<s>", "</s>"], show_progress=False
    )
    core.train_from_iterator(lines * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def test_a_sentence_piece_tokenizer():
    _, processor = tiny.build("llava")
    processor.tokenizer = _metaspace()
    processor.chat_template = SIMPLE_TEMPLATE
    text = processor.apply_chat_template(
        [message("user", "is there a dog ?", 1)], tokenize=False, add_generation_prompt=True
    )
    ids, readable = read(processor, text)
    words = Template.of(processor).words(ids, readable)
    assert spelled(processor, ids, words) == "isthereadog?"


# ---- where an instruction goes ----


def edited(ids, edit):
    start, stop, new = edit
    return torch.cat([ids[0, :start], ids.new_tensor(new), ids[0, stop:]])


@pytest.mark.parametrize("style", ["tiny", "chatml", "llama2", "string", "vicuna"])
@pytest.mark.parametrize("own", [None, "answer with one word ."])
def test_the_instruction_becomes_the_system_message(style, own):
    """The edited ids spell what the template writes with that system message."""
    processor = processor_of(style)
    user = message("user", QUESTION, 1)
    talk = [user] if own is None else [message("system", own), user]
    ids, readable = read(processor, render(processor, style, talk))
    template = Template.of(processor)
    assert template.has_system
    (edit,) = template.system("you are a confused detector .", ids, readable)
    wanted = render(processor, style, [message("system", "you are a confused detector ."), user])
    wanted_ids, _ = read(processor, wanted)
    new = edited(ids, edit)
    assert squeezed(processor.tokenizer.decode(new)) == squeezed(
        processor.tokenizer.decode(wanted_ids[0])
    )
    if style in ("tiny", "chatml"):  # no blank melts into a neighbour: the very same tokens
        assert torch.equal(new, wanted_ids[0])


@pytest.mark.parametrize("style", STYLES)
def test_the_instruction_stands_before_the_last_question(style):
    processor = processor_of(style)
    talk = [message("user", QUESTION, 1), message("assistant", ANSWER), message("user", NEXT)]
    ids, readable = read(processor, render(processor, style, talk))
    (edit,) = Template.of(processor).question("be vague .", ids, readable)
    assert edit[0] == edit[1]
    new = processor.tokenizer.decode(edited(ids, edit))
    assert squeezed("be vague .", NEXT) in squeezed(new)
    assert re.search(r"\.\s+what colour", new)
    assert new.count("vague") == 1


def test_a_template_without_system_message_says_so():
    processor = processor_of("strict")
    template = Template.of(processor)
    assert not template.has_system
    ids, readable = read(processor, render(processor, "strict", [message("user", QUESTION, 1)]))
    with pytest.raises(LayoutError, match="no system message") as caught:
        template.system("x", ids, readable)
    assert "before the question" in caught.value.advice


# ---- errors ----


def test_no_processor():
    with pytest.raises(LayoutError, match="no processor is known") as caught:
        Template.of(None)
    assert "processor=processor" in caught.value.advice


def test_no_chat_template():
    processor = processor_of("tiny")
    processor.chat_template = None
    with pytest.raises(LayoutError, match="has no chat template"):
        Template.of(processor)


def test_a_template_that_hides_the_text():
    processor = processor_of("tiny")
    processor.chat_template = "{{ messages | length }} messages"
    with pytest.raises(LayoutError, match="does not show the text"):
        Template.of(processor)


@pytest.mark.parametrize(
    ("text", "message_part"),
    [
        ("Question: <image> what is this ? Answer:", "does not begin with"),
        ("<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nwhat ?", "it ends with"),
    ],
)
def test_a_prompt_that_another_template_wrote(text, message_part):
    processor = processor_of("chatml")
    ids, readable = read(processor, text)
    with pytest.raises(LayoutError, match=message_part) as caught:
        Template.of(processor).words(ids, readable)
    assert "row 0" in str(caught.value)
    assert "apply_chat_template" in caught.value.advice


# ---- what is remembered ----


def test_the_processor_is_remembered_beside_the_model_as_long_as_it_lives():
    model, processor = tiny.build("llava")
    before = set(vars(model))
    remember_processor(model, processor)
    assert known_processor(model) is processor
    assert set(vars(model)) == before
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_load_remembers_its_processor():
    model, processor = mmlm.load()
    assert known_processor(model) is processor


def test_a_changed_chat_template_is_learned_anew():
    processor = processor_of("tiny")
    first = Template.of(processor)
    assert Template.of(processor) is first
    processor.chat_template = STYLES["chatml"]
    assert Template.of(processor) is not first
