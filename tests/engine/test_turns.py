"""Turns and answers: read off the chat template, and handed over by a collator."""

import pytest
import tiny
import torch

from mmlm import TokenLayout
from mmlm.engine.branches.template import Template
from mmlm.engine.layout import ANSWER
from mmlm.engine.masks.turns import Handed, encoded, of_template
from mmlm.inputs import use_chat_template

CHATML = (
    "{% for m in messages %}<|s|>{{ m['role'] }}\n"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|e|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"
)


@pytest.fixture
def chatml():
    _, processor = tiny.build("llava")
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|s|>", "<|e|>"]})
    processor.chat_template = CHATML
    return processor


def told(processor, text, *, needed=False):
    """A prompt's tokens with their roles: answers, turns, and what is behind markers."""
    ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    plain = TokenLayout.from_ids(ids, None, image_ids=(-1,))
    roles = of_template(plain, ids, processor, needed=needed, strange=pytest.fail)
    pieces = [processor.tokenizer.decode([i]) for i in ids[0].tolist()]

    def words(where):
        return "".join(p for p, w in zip(pieces, where.tolist(), strict=True) if w)

    return {
        "answers": words(roles.seg[0] == ANSWER),
        "turns": [words(roles.turn[0] == t) for t in range(int(roles.turn.max()) + 1)],
        "behind": words(roles.behind[0]),
    }


TALK = "<|s|>user\nwhat is it ?<|e|>\n<|s|>assistant\na cat .<|e|>\n<|s|>user\na dog ?<|e|>\n"


def test_a_template_with_closing_tokens_and_line_ends_in_its_headers(chatml):
    """The end token is the answer's, the line end behind the header the template's."""
    found = told(chatml, TALK + "<|s|>assistant\n", needed=True)
    assert found["answers"] == "a cat .<|e|>"
    assert found["turns"] == [
        "<|s|>user\nwhat is it ?<|e|>\n<|s|>assistant\na cat .<|e|>",
        "\n<|s|>user\na dog ?<|e|>\n<|s|>assistant\n",
    ]
    assert found["behind"] == "assistant\nassistant\n"


def test_an_answer_that_has_begun_is_closed_too(chatml):
    found = told(chatml, TALK + "<|s|>assistant\nthe dog")
    assert found["answers"] == "a cat .<|e|>the dog"


def test_blanks_before_an_answer_belong_to_it_where_the_header_ends_without():
    _, processor = tiny.build("llava")
    found = told(processor, "user: what is it ? assistant: yes . user: a dog ? assistant:")
    assert found["answers"] == " yes ."
    assert found["turns"] == [
        "user: what is it ? assistant: yes .", " user: a dog ? assistant:"
    ]  # fmt: skip


def test_the_simple_template_of_llava():
    _, processor = tiny.build("llava")
    use_chat_template(processor, "simple")
    text = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "what is it ?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a cat ."}]},
            {"role": "user", "content": [{"type": "text", "text": "a dog ?"}]},
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    found = told(processor, text)
    assert found["answers"].strip() == "a cat .</s>"
    assert found["turns"][1].strip().startswith("USER")


def test_a_prompt_of_another_template_is_told_to_the_caller(chatml):
    ids = torch.tensor([[40, 41, 42]])
    plain = TokenLayout.from_ids(ids, None, image_ids=(-1,))
    reasons = []
    roles = of_template(plain, ids, chatml, needed=False, strange=reasons.append)
    assert not roles.turn.any()
    assert "not written by the chat template" in str(reasons[0])
    with pytest.raises(ValueError, match="not written by the chat template"):
        of_template(plain, ids, chatml, needed=True, strange=pytest.fail)
    with pytest.raises(ValueError, match="Turns cannot be read off embeddings"):
        of_template(plain, None, chatml, needed=True, strange=pytest.fail)


def test_a_template_without_a_header_of_its_own_has_no_marker():
    _, processor = tiny.build("llava")
    processor.chat_template = "{% for m in messages %}{{ m['content'][0]['text'] }} ; {% endfor %}"
    template = Template(processor)
    ids = processor.tokenizer("a dog ? ;", add_special_tokens=False)["input_ids"]
    with pytest.raises(ValueError, match="no header of the assistant"):
        template.turns(ids, [True] * len(ids), 0, header=True)


def test_what_is_handed_over_comes_out_again():
    turn = torch.tensor([[0, 0, 0, 1, 1, 1]])
    said, behind, learned = (
        torch.tensor([x], dtype=torch.bool)
        for x in ([0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1])
    )
    roles = encoded(turn, said, behind=behind, learned=learned)
    plain = TokenLayout.from_ids(torch.full((1, 6), 5), None, image_ids=(9,))
    handed = Handed(roles)
    layout = handed.told(plain)
    assert torch.equal(layout.turn.long(), turn)
    assert torch.equal(layout.seg == ANSWER, said)
    assert torch.equal(layout.behind, behind)
    assert torch.equal(handed.supervised(plain), learned)
    labels = torch.tensor([[-100, -100, 5, -100, -100, -100]])
    both = Handed(roles, labels).supervised(plain)
    assert both.tolist() == [[False, False, True, False, False, True]]
    assert Handed().supervised(plain) is None
    assert Handed().told(plain) is plain
