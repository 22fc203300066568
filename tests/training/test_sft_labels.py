"""What is learned of a conversation, compared with spans written by hand.

`marked` writes a document as text: learned runs in [[ ]], repeated tokens as `token*n`.
"""

import itertools

import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from mmlm.errors import InputError
from mmlm.inputs import SIMPLE_TEMPLATE, prepare
from mmlm.model.checkpoint import load
from tests.training.sft_rows import row, text
from training.sft.documents import IGNORED
from training.sft.encoding import Encoder
from training.sft.rows import Conversation

TURNS = (("what ?", "a dog "), ("and ?", "no"))


def marked(tokenizer, document):
    names = [
        (tokenizer.decode([token]), label != IGNORED)
        for token, label in zip(document.ids.tolist(), document.labels.tolist(), strict=True)
    ]
    for (_, learned), token, label in zip(names, document.ids, document.labels, strict=True):
        assert not learned or token == label
    parts = []
    for learned, run in itertools.groupby(names, key=lambda pair: pair[1]):
        repeated = [(name, len(list(group))) for (name, _), group in itertools.groupby(run)]
        words = "".join(f"{name}*{n}" if n > 3 else name * n for name, n in repeated)
        parts.append(f"[[{words}]]" if learned else words)
    return "".join(parts)


def encoded(processor, conversation, pictures=(), end_token="eos"):
    [document], _ = Encoder(processor, end_token)([conversation], [list(pictures)])
    return marked(processor.tokenizer, document)


_TWO_TURNS = {
    "llava": "<image>*16",
    # 52 features: the whole picture, and its upper and lower half with a line end each row.
    "llava_next": "<image>*52",
    "llava_onevision": "<image>*52",
    "qwen2_5_vl": "<|vision_start|><|image_pad|>*8<|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|>*8<|vision_end|>",
    "internvl": "<img><IMG_CONTEXT>*12</img>",
    "idefics3": "<fake_token_around_image><row_1_col_1><image>*4<fake_token_around_image>"
    "<row_1_col_2><image>*4\n<fake_token_around_image><row_2_col_1><image>*4"
    "<fake_token_around_image><row_2_col_2><image>*4\n\n<fake_token_around_image><global-img>"
    "<image>*4<fake_token_around_image>",
    "gemma3": "\n\n<start_of_image><image_soft_token>*4<end_of_image>\n\n",
}
_TWO_TURNS["smolvlm"] = _TWO_TURNS["idefics3"]


@pytest.mark.parametrize("family", sorted(set(tiny.ALL) - {"paligemma"}))
def test_two_turns_about_a_picture(family):
    _, processor = tiny.shared(family)
    got = encoded(processor, row(1, *TURNS), [tiny.picture(0, (100, 60))])
    assert got == (
        f"user: {_TWO_TURNS[family]}what ? assistant:[[ a dog</s>]]  "
        "user: and ? assistant:[[ no</s>]] "
    )


def test_paligemma_learns_its_suffix():
    _, processor = tiny.shared("paligemma")
    got = encoded(processor, row(1, TURNS[0]), [tiny.picture(0)])
    assert got == "user: <image>*16<s>what ? assistant:\n[[a dog</s>]]"


def test_paligemma_refuses_what_its_prefix_would_give_away():
    _, processor = tiny.shared("paligemma")
    with pytest.raises(InputError, match=r"rows.jsonl:r: row 'r' has 1 pictures and 2 answers"):
        encoded(processor, row(1, *TURNS), [tiny.picture(0)])
    with pytest.raises(InputError, match="has 0 pictures and 1 answers"):
        encoded(processor, row(0, TURNS[0]))


@pytest.mark.parametrize("family", tiny.ALL)
def test_what_is_learned_goes_on_from_the_prompt_of_inference(family):
    _, processor = tiny.shared(family)
    turns = TURNS[:1] if family == "paligemma" else TURNS
    conversation = row(1, *turns)
    pictures = [tiny.picture(0, (100, 60))]
    [document], _ = Encoder(processor, "eos")([conversation], [pictures])
    prompt = prepare(processor, [list(conversation.messages[:1])], [pictures])["input_ids"][0]
    assert document.ids[: len(prompt)].tolist() == prompt.tolist()
    assert (document.labels[: len(prompt)] == IGNORED).all()
    assert document.labels[len(prompt)] != IGNORED


def test_several_pictures_stand_where_the_message_has_them():
    _, processor = tiny.build("llava")
    segments = [text("one"), {"type": "image"}, text("two"), {"type": "image"}, text("?")]
    conversation = Conversation(
        "r",
        ("a", "b"),
        (
            {"role": "user", "content": segments},
            {"role": "assistant", "content": [text("yes")]},
            {"role": "user", "content": [{"type": "image"}, text("now ?")]},
            {"role": "assistant", "content": [text("no")]},
        ),
        "f:1",
    )
    three = Conversation("r", ("a", "b", "c"), conversation.messages, "f:1")
    pictures = [tiny.picture(n) for n in range(3)]
    want = (
        "user: one<image>*16two<image>*16? assistant:[[ yes</s>]] "
        "user: <image>*16now ? assistant:[[ no</s>]] "
    )
    assert encoded(processor, three, pictures) == want
    # LLaVA's own template would print both pictures first.
    processor.chat_template = HUB_LLAVA
    got = encoded(processor, three, pictures)
    assert got.startswith("USER: one<image>*16two<image>*16? ASSISTANT: [[yes</s>]] USER: <image>")
    with pytest.raises(InputError, match="f:1: row 'r' has 2 pictures, and its text 3 times"):
        encoded(processor, conversation, pictures[:2])


HUB_LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = CHATML.replace(
    "{{ c['text'] }}",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ c['text'] }}{% endgeneration %}"
    "{% else %}{{ c['text'] }}{% endif %}",
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] | trim }}{% endif %}{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ ' ' if m['role'] == 'assistant' }}{{ c['text'] }}{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SPECIALS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<end_of_utterance>",
)  # fmt: skip

_PICTURE = "<image>*16"
TEMPLATES = {
    "simple": (
        SIMPLE_TEMPLATE,
        f"USER: {_PICTURE}\nwhat ? ASSISTANT:[[ a dog </s>]]USER: and ? ASSISTANT:[[ no</s>]]",
    ),
    "chatml": (
        CHATML,
        f"<|im_start|>user\n{_PICTURE}what ?<|im_end|>\n<|im_start|>assistant\n[[a dog <|im_end|>]]"
        "\n<|im_start|>user\nand ?<|im_end|>\n<|im_start|>assistant\n[[no<|im_end|>]]\n",
    ),
    "llama3": (
        LLAMA3,
        f"<s><|start_header_id|>user<|end_header_id|>\n\n{_PICTURE}what ?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[a dog<|eot_id|>]]"
        "<|start_header_id|>user<|end_header_id|>\n\nand ?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[[no<|eot_id|>]]",
    ),
    "gemma": (
        GEMMA,
        f"<s><start_of_turn>user\n{_PICTURE}what ?<end_of_turn>\n<start_of_turn>model\n"
        "[[a dog<end_of_turn>]]\n<start_of_turn>user\nand ?<end_of_turn>\n<start_of_turn>model\n"
        "[[no<end_of_turn>]]\n",
    ),
    "idefics": (
        IDEFICS,
        f"<|im_start|>User:{_PICTURE}what ?<end_of_utterance>\nAssistant:"
        "[[ a dog <end_of_utterance>]]\nUser:and ?<end_of_utterance>\nAssistant:"
        "[[ no<end_of_utterance>]]\n",
    ),
}
TEMPLATES["chatml_marked"] = (CHATML_MARKED, TEMPLATES["chatml"][1])


def _processor(template):
    _, processor = tiny.build("llava")
    processor.tokenizer.add_tokens(list(SPECIALS), special_tokens=True)
    processor.chat_template = template
    return processor


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_templates_that_write_an_end_token(name):
    template, want = TEMPLATES[name]
    got = encoded(_processor(template), row(1, *TURNS), [tiny.picture(0)], "template")
    assert got == want


def test_a_system_message_is_never_learned():
    conversation = row(0, ("what ?", "a dog"))
    system = {"role": "system", "content": [text("be brief .")]}
    conversation = Conversation("r", (), (system, *conversation.messages), "f:1")
    got = encoded(_processor(CHATML), conversation, (), "template")
    assert got == (
        "<|im_start|>system\nbe brief .<|im_end|>\n<|im_start|>user\nwhat ?<|im_end|>\n"
        "<|im_start|>assistant\n[[a dog<|im_end|>]]\n"
    )


def test_the_embedded_model_learns_its_answers():
    _, processor = load("embedded")
    got = encoded(processor, row(0, ("is there a dog ?", "yes .")), (), "template")
    assert got == "<bos>user:isthereadog?assistant:[[yes.<eos>]]"  # every word is a token


def test_a_template_without_an_end_token_is_refused_or_given_one():
    processor = _processor(HUB_LLAVA)
    pictures = [tiny.picture(0)]
    with pytest.raises(InputError, match=r"rows.jsonl:r: .* writes no end token"):
        encoded(processor, row(1, *TURNS), pictures, "template")
    # The token " a" begins at the blank before the template's mark: it is the answer's first.
    assert encoded(processor, row(1, *TURNS), pictures, "eos") == (
        f"USER: {_PICTURE}\nwhat ? ASSISTANT:[[ a dog</s>]]  USER: and ? ASSISTANT:[[ no</s>]] "
    )
    assert encoded(processor, row(1, *TURNS), pictures, "none") == (
        f"USER: {_PICTURE}\nwhat ? ASSISTANT:[[ a dog]]  USER: and ? ASSISTANT:[[ no]] "
    )


UNSTABLE = {
    # An end token behind the last answer only; earlier answers shortened; a prompt that is not
    # what the finished turn begins with.
    "end": "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}"
    "{% if loop.last %}</s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "shortened": "{% for m in messages %}{{ m['role'] }}: "
    "{{ m['content'][0]['text'] if loop.last or m['role'] == 'user' else '...' }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "prompt": "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}assistant: <think>{% endif %}",
}


@pytest.mark.parametrize("name", sorted(UNSTABLE))
def test_a_template_that_does_not_only_append_is_refused(name):
    with pytest.raises(InputError, match=r"rows.jsonl:r: The chat template is not prefix-stable"):
        encoded(_processor(UNSTABLE[name]), row(0, *TURNS), (), "template")


def test_a_template_that_changes_or_hides_an_answer_is_refused():
    changing = CHATML.replace("{{ c['text'] }}", "{{ c['text'] | upper }}")
    with pytest.raises(InputError, match="changes an answer: 'no' became 'NO"):
        encoded(_processor(changing), row(0, *TURNS), (), "template")
    once = CHATML_MARKED.replace("'assistant' %}{% gen", "'tool' %}{% gen")
    with pytest.raises(InputError, match="marks 0 answers in a conversation of 2"):
        encoded(_processor(once), row(0, *TURNS), (), "template")
    with pytest.raises(InputError, match="refuses the conversation: no such role"):
        encoded(_processor("{{ raise_exception('no such role') }}"), row(0, *TURNS))


@pytest.mark.parametrize("answer", ["s", "</", "naïve 🦊 café", "user: no", "|im_end|"])
def test_answers_that_look_like_the_template(answer):
    got = encoded(_processor(CHATML), row(0, ("what ?", answer), ("s", "a")), (), "template")
    before, after = (
        "<|im_start|>user\nwhat ?<|im_end|>\n<|im_start|>assistant\n",
        ("\n<|im_start|>user\ns<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n"),
    )
    assert got.startswith(before + "[[")
    assert got.endswith("<|im_end|>]]" + after)
    if answer.isascii():  # others are several tokens a letter
        assert got == f"{before}[[{answer}<|im_end|>]]{after}"
    else:
        [document], _ = Encoder(_processor(CHATML))([row(0, ("what ?", answer))], [[]])
        kept = document.labels[document.labels != IGNORED]
        assert _processor(CHATML).tokenizer.decode(kept) == answer + "<|im_end|>"


def test_a_token_that_reaches_into_an_answer_counts_as_answer():
    # Here the prompt's last letters and the answer's first ones are one token.
    tokenizer = _processor(CHATML).tokenizer
    word = max(filter(str.isalpha, filter(str.isascii, tokenizer.get_vocab())), key=len)
    assert len(word) >= 3
    begun, rest = word[:1], word[1:]
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}BEGUN{% generation %}"
        "{{ m['content'][0]['text'] }}</s>{% endgeneration %}{% else %}"
        "{{ m['content'][0]['text'] }}{% endif %}{% endfor %}"
    ).replace("BEGUN", begun)
    got = encoded(_processor(template), row(0, ("?", f"{rest} ?")), (), "template")
    assert got == f"?[[{word} ?</s>]]"


@pytest.mark.parametrize(("template", "start"), [(CHATML, "<s><|im_start|>"), (LLAMA3, "<s><|st")])
def test_bos_stands_once(template, start):
    processor = _processor(template)
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    got = encoded(processor, row(1, *TURNS), [tiny.picture(0)], "template")
    assert got.startswith(start)
    assert got.count("<s>") == 1
    processor.chat_template = "<s><s>" + CHATML
    with pytest.raises(InputError, match=r"rows.jsonl:r: the row begins with two '<s>'"):
        encoded(processor, row(0, *TURNS), (), "template")


def test_tokenizers_that_cannot_be_exact_are_refused():
    processor = _processor(CHATML)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 3)]
    )
    with pytest.raises(InputError, match="puts an end token of its own"):
        Encoder(processor)

    class Slow:
        tokenizer = type("Slow", (), {"is_fast": False})()

    with pytest.raises(InputError, match="does not say which characters"):
        Encoder(Slow())


def test_an_image_token_among_the_words_is_refused_with_both_counts():
    with pytest.raises(InputError, match="has 1 pictures, and its text 2 times '<image>'"):
        encoded(_processor(CHATML), row(1, ("an <image> ?", "a")), [tiny.picture(0)], "template")


@pytest.mark.parametrize("family", tiny.ALL)
def test_lengths_are_known_without_pixels(family):
    _, processor = tiny.shared(family)
    encoder = Encoder(processor, "eos")
    for n, sizes in enumerate([((100, 60),), ((64, 64), (40, 90)), ()]):
        if family == "paligemma" and not sizes:
            continue
        turns = TURNS[:1] if family == "paligemma" else TURNS
        conversation = row(len(sizes), *turns)
        pictures = [tiny.picture(n, size) for size in sizes]
        [document], _ = encoder([conversation], [pictures])
        assert encoder.count(conversation, sizes) == len(document.ids)
