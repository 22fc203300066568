"""How the picture that is meant is named, and what a chat template makes of it."""

import random

import pytest
from tiny import build

from data_tools.mia.prompts import CENTRE_PHRASES, segments
from data_tools.mia.records import ALLOWED
from data_tools.world import CAPTION_QUESTIONS, existence_question, vocabulary
from mmlm.errors import InputError
from mmlm.inputs import prepare, render

IMAGES_FIRST = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""What LLaVA-1.5's template does: all pictures of a message before all of its text."""


def prompt(format, n_images, target, question="What is it?", style="paper", seed=0):
    return segments(format, n_images, target, question, random.Random(seed), style)


def written(parts):
    return "".join("<image>" if one["type"] == "image" else one["text"] for one in parts)


def test_sequence_of_the_paper():
    assert written(prompt("sequence", 3, 2)) == (
        "Image1:<image>\nImage2:<image>\nImage3:<image>\nIn Image2, what is it?"
    )


def test_grid_and_centre_of_the_paper():
    assert prompt("grid", 4, 3) == [
        {"type": "image"},
        {"type": "text", "text": "In Image3, what is it?"},
    ]
    image, text = prompt("pip", 2, 2)
    assert image == {"type": "image"}
    phrase, _, question = text["text"].partition(", ")
    assert phrase in CENTRE_PHRASES
    assert question == "what is it?"


def test_phrases_are_as_many_as_the_authors_and_all_are_drawn():
    assert len(set(CENTRE_PHRASES)) == 93
    known = (
        "For the image in the center",
        "Regarding the central picture",
        "As for the subplot in the middle",
    )
    assert set(known) < set(CENTRE_PHRASES)
    drawn = {prompt("pip", 2, 2, seed=n)[1]["text"].split(",")[0] for n in range(2000)}
    assert drawn == set(CENTRE_PHRASES)


@pytest.mark.parametrize("n_images", ALLOWED["sequence"])
def test_acceptance_7_the_text_before_every_picture_names_it(n_images):
    for target in range(1, n_images + 1):
        parts = prompt("sequence", n_images, target)
        assert [one["type"] for one in parts] == [*["text", "image"] * n_images, "text"]
        for number in range(1, n_images + 1):
            assert parts[2 * number - 2]["text"].endswith(f"Image{number}:")
            assert parts[2 * number - 1] == {"type": "image"}
        assert parts[-1]["text"].startswith(f"\nIn Image{target}, ")


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_acceptance_8_templates_that_put_pictures_first_keep_the_order(family):
    _, processor = build(family)
    token = processor.image_token
    processor.chat_template = IMAGES_FIRST.replace("<image>", token)
    content = prompt("sequence", 2, 1)
    text = render(processor, [{"role": "user", "content": content}])
    expected = f"Image1:{token}\nImage2:{token}\nIn Image1, what is it?"
    assert text == f"USER: {expected} ASSISTANT:"
    # A picture before all text is the template's own business.
    text = render(processor, [{"role": "user", "content": prompt("grid", 2, 1)}])
    assert text == f"USER: {token}\nIn Image1, what is it? ASSISTANT:"


def test_acceptance_8_the_processor_expands_the_pictures_where_they_are():
    from tiny import picture

    _, processor = build("llava")
    processor.chat_template = IMAGES_FIRST
    conversation = [{"role": "user", "content": prompt("sequence", 3, 2)}]
    inputs = prepare(processor, [conversation], [[picture(n) for n in range(3)]])
    shown = (inputs["input_ids"][0] == processor.image_token_id).int()
    runs = (shown[1:] > shown[:-1]).sum()
    assert runs == 3  # three blocks with text between them, not one
    assert len(inputs["pixel_values"]) == 3


def test_templates_that_keep_the_order_are_left_alone():
    _, processor = build("qwen2_5_vl")
    content = prompt("sequence", 2, 1)
    text = render(processor, [{"role": "user", "content": content}])
    first, second = text.index("Image1:"), text.index("Image2:")
    assert text.index("<|vision_start|>", first) < second
    assert text.count("<|image_pad|>") == text.count("<|vision_start|>") == 2


def test_a_moved_picture_without_a_known_token_is_refused():
    _, processor = build("llava")
    processor.chat_template = IMAGES_FIRST
    processor.image_token = None
    with pytest.raises(InputError, match="moves the pictures"):
        render(processor, [{"role": "user", "content": prompt("sequence", 2, 1)}])


def test_the_world_s_prompts_use_only_its_words():
    known = set(vocabulary())
    questions = [*CAPTION_QUESTIONS, existence_question("dog")]
    cases = [("sequence", n) for n in (2, 3)]
    cases += [("grid", n) for n in ALLOWED["grid"]] + [("pip", 2)]
    for format, n_images in cases:
        names = set()
        for target in range(1, n_images + 1):
            parts = prompt(format, n_images, target, questions[0], "world")
            names.add(written(parts))
            for question in questions:
                for part in prompt(format, n_images, target, question, "world"):
                    assert set(part.get("text", "").split()) <= known
        assert len(names) == (1 if format == "pip" else n_images)  # no two tiles are called alike


def test_the_world_cannot_count_beyond_three():
    with pytest.raises(ValueError, match="count to 3, got 4"):
        prompt("sequence", 4, 1, style="world")
    with pytest.raises(ValueError, match="count to 3, got 4"):
        prompt("sequence", 3, 4, style="world")
    with pytest.raises(ValueError, match="no name for a tile that is not there"):
        prompt("grid", 4, 5, style="world")


def test_a_number_that_the_format_does_not_have():
    with pytest.raises(ValueError, match="sequence is made of 2, 3, 4, 5"):
        prompt("sequence", 6, 1)
