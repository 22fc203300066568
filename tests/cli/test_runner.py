"""The runner: order, batches, seeds, errors of single records, neutral decoding."""

import dataclasses

import pytest
import torch
from PIL import Image
from tiny import build, picture, shared

import mmlm
from mmlm.errors import InputError, LayoutError, MmlmError
from mmlm.runner import (
    GenerateSettings,
    Request,
    Turn,
    fingerprint,
    generate_all,
    generate_batches,
    generation_config,
)

SAMPLED = GenerateSettings(max_new_tokens=6, batch_size=4, do_sample=True, temperature=0.9, seed=3)
GREEDY = GenerateSettings(max_new_tokens=6, batch_size=4)


def requests(count=9):
    return [
        Request(f"q{n}", (picture(n % 3),), "what is this ? " * (1 + n % 3)) for n in range(count)
    ]


@pytest.fixture(scope="module")
def tiny():
    return shared("llava")


def test_order_and_content(tiny):
    seen = []
    results = list(generate_all(*tiny, requests(), settings=GREEDY, on_result=seen.append))
    assert [result.id for result in results] == [f"q{n}" for n in range(9)]
    assert seen == results
    first = results[0]
    assert first.prompt == "what is this ? "
    assert first.templated == "user: <image>what is this ?  assistant:"
    assert 1 <= first.n_tokens <= 6
    assert first.text == first.text.strip()
    assert first.error is None


def test_batches_do_not_change_greedy_answers(tiny):
    one = dataclasses.replace(GREEDY, batch_size=1)
    assert list(generate_all(*tiny, requests(), settings=GREEDY)) == list(
        generate_all(*tiny, requests(), settings=one)
    )


def test_equals_plain_generate_of_the_library(tiny):
    model, processor = tiny
    request = requests(1)[0]
    [result] = generate_all(model, processor, [request], settings=GREEDY)
    inputs = processor(text=[result.templated], images=[request.images[0]], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() == result.text
    assert result.n_tokens == len(answer)


def test_defaults_of_the_checkpoint_do_not_matter(tiny):
    model, processor = build("llava")
    plain = list(generate_all(*tiny, requests(3), settings=GREEDY))
    sampled = list(generate_all(*tiny, requests(3), settings=SAMPLED))
    for name, value in {
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.5,
        "top_k": 2,
        "min_p": 0.3,
        "typical_p": 0.4,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "num_beams": 3,
        "max_length": 7,
    }.items():
        setattr(model.generation_config, name, value)
    assert list(generate_all(model, processor, requests(3), settings=GREEDY)) == plain
    assert list(generate_all(model, processor, requests(3), settings=SAMPLED)) == sampled


@pytest.mark.parametrize("name", ["min_length", "min_new_tokens"])
def test_a_least_length_of_the_checkpoint_does_not_matter(name):
    model, processor = build("llava")
    request = requests(1)[0]
    [long] = generate_all(model, processor, [request], settings=GREEDY)
    inputs = processor(text=[long.templated], images=[request.images[0]], return_tensors="pt")
    first = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [first]  # the model ends at once
    setattr(model.generation_config, name, 100)
    [short] = generate_all(model, processor, [request], settings=GREEDY)
    assert (long.n_tokens, short.n_tokens) == (6, 1)


def test_sampling_depends_on_seed_and_ids_only(tiny):
    whole = list(generate_all(*tiny, requests(), settings=SAMPLED))
    torch.rand(17)  # somebody else draws
    assert list(generate_all(*tiny, requests(), settings=SAMPLED)) == whole
    other = dataclasses.replace(SAMPLED, seed=4)
    assert [r.text for r in generate_all(*tiny, requests(), settings=other)] != [
        r.text for r in whole
    ]


def test_every_batch_draws_its_own_numbers(tiny):
    same = [Request(name, (picture(),), "what is this ?") for name in "abc"]
    one = dataclasses.replace(SAMPLED, batch_size=1)
    assert len({result.text for result in generate_all(*tiny, same, settings=one)}) == 3


def test_the_state_of_torch_is_restored(tiny):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    list(generate_all(*tiny, requests(2), settings=SAMPLED))
    assert torch.rand(1) == expected


@pytest.mark.parametrize("n_done", [0, 1, 4, 6, 8, 9])
def test_what_is_done_does_not_change_the_rest(tiny, n_done):
    whole = list(generate_all(*tiny, requests(), settings=SAMPLED))
    done = {f"q{n}" for n in range(n_done)}
    batches = list(generate_batches(*tiny, requests(), (), SAMPLED, done=done))
    rest = sorted((result for batch in batches for result in batch), key=lambda result: result.id)
    assert rest == whole[n_done:]
    assert all(batches)


def test_a_method_is_attached_and_removed(tiny):
    model, processor = tiny
    plain = list(generate_all(model, processor, requests(), settings=GREEDY))
    changed = list(generate_all(model, processor, requests(), [mmlm.VHR(alpha=4.0)], GREEDY))
    assert [r.text for r in plain] != [r.text for r in changed]
    assert list(generate_all(model, processor, requests(), settings=GREEDY)) == plain


def test_bad_pictures_leave_their_batch(tiny, tmp_path):
    (tmp_path / "bad.png").write_text("text")
    asked = requests(4)
    asked[1] = Request("q1", (tmp_path / "bad.png",), "what ?")
    asked[2] = Request("q2", (picture(), tmp_path / "none.png"), "what ?")
    results = list(generate_all(*tiny, asked, settings=GREEDY))
    assert [result.id for result in results] == ["q0", "q1", "q2", "q3"]
    assert "no picture in a known format" in results[1].error
    assert "no such file" in results[2].error
    assert (results[1].text, results[1].n_tokens) == ("", 0)
    assert results[0].error is None
    assert results[3].error is None
    good = list(generate_all(*tiny, [asked[0], asked[3]], settings=GREEDY))
    assert [good[0].text, good[1].text] == [results[0].text, results[3].text]


def test_a_row_that_the_processor_refuses():
    """Qwen2.5-VL's processor refuses a whole batch because of one picture's shape."""
    asked = requests(3)
    asked[1] = Request("q1", (Image.new("RGB", (1, 300)),), "what ?")
    results = list(generate_all(*shared("qwen2_5_vl"), asked, settings=GREEDY))
    assert "aspect ratio" in results[1].error
    assert [result.error for result in results[::2]] == [None, None]


def test_a_row_that_the_layout_refuses(tiny, monkeypatch):
    model, processor = tiny
    original = model.generate

    def generate(**inputs):
        if len(inputs["input_ids"]) > 1 or inputs["pixel_values"].mean() > 1.5:
            raise LayoutError("what is this row?")
        return original(**inputs)

    monkeypatch.setattr(model, "generate", generate)
    asked = requests(3)
    asked[2] = Request("q2", (Image.new("RGB", (8, 8), "white"),), "what ?")
    results = list(generate_all(model, processor, asked, settings=GREEDY))
    assert [result.error for result in results] == [None, None, "what is this row?"]


def test_out_of_memory_is_explained(tiny, monkeypatch):
    def generate(**_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(tiny[0], "generate", generate)
    with pytest.raises(MmlmError, match="4 requests at once") as caught:
        list(generate_all(*tiny, requests(), settings=GREEDY))
    assert "batch_size" in caught.value.advice


def test_no_picture_and_two(tiny):
    asked = [
        Request("none", (), "hello"),
        Request("two", (picture(1), picture(2)), "which ?"),
        Request("swapped", (picture(2), picture(1)), "which ?"),
    ]
    none, two, swapped = generate_all(*tiny, asked, settings=GREEDY)
    assert "<image>" not in none.templated
    assert two.templated.count("<image>") == 2
    assert {none.error, two.error, swapped.error} == {None}


FURTHER = ("which color ?", "what is shown here ?")


def conversations(count=5):
    return [
        Request(f"c{n}", (picture(n % 3),), "what is this ?", FURTHER[: n % 3])
        for n in range(count)
    ]


def test_a_conversation_feeds_its_answers_back(tiny):
    [result] = generate_all(*tiny, [conversations(3)[2]], settings=GREEDY)
    first, second, third = result.turns
    assert [turn.prompt for turn in result.turns] == ["what is this ?", *FURTHER]
    assert (result.text, result.prompt) == (first.text, first.prompt)
    assert result.n_tokens == sum(turn.n_tokens for turn in result.turns)
    assert result.templated == (
        f"user: <image>what is this ? assistant: {first.text} user: {FURTHER[0]} "
        f"assistant: {second.text} user: {FURTHER[1]} assistant:"
    )
    # Asked alone, with the history written out, the model says the same.
    model, processor = tiny
    inputs = processor(text=[result.templated], images=[picture(2)], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answer = tokens[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() == third.text


def test_the_first_turn_is_the_question_alone(tiny):
    asked = [Request("c", (picture(1),), "what is this ?")]
    [alone] = generate_all(*tiny, asked, settings=GREEDY)
    [talk] = generate_all(
        *tiny, [dataclasses.replace(asked[0], follow_ups=FURTHER)], settings=GREEDY
    )
    assert alone.turns == ()
    assert talk.turns[0] == Turn("what is this ?", alone.text, alone.n_tokens)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_batches_do_not_change_conversations(tiny, batch_size):
    one, more = (dataclasses.replace(GREEDY, batch_size=size) for size in (1, batch_size))
    results = list(generate_all(*tiny, conversations(), settings=more))
    assert results == list(generate_all(*tiny, conversations(), settings=one))
    assert [len(result.turns) for result in results] == [0, 2, 3, 0, 2]


def test_every_turn_draws_its_own_numbers(tiny):
    same = ("what is this ?",) * 3
    asked = [Request("c", (picture(),), same[0], same[1:])]
    settings = dataclasses.replace(SAMPLED, temperature=30.0)
    [result] = generate_all(*tiny, asked, settings=settings)
    assert len({turn.text for turn in result.turns}) == 3
    assert [result] == list(generate_all(*tiny, asked, settings=settings))


def test_a_failing_turn_fails_its_conversation_only(tiny, monkeypatch):
    model, processor = tiny
    original = model.generate

    def generate(**inputs):
        words = processor.batch_decode(inputs["input_ids"])
        if any("which color" in text and text.count("what") == 1 for text in words):
            raise LayoutError("no more of this")
        return original(**inputs)

    monkeypatch.setattr(model, "generate", generate)
    asked = conversations(3)
    asked[2] = Request("c2", (picture(2),), "hello ?", FURTHER[1:])
    results = list(generate_all(model, processor, asked, settings=GREEDY))
    assert [result.error for result in results] == [None, "no more of this", None]
    assert (results[1].text, results[1].n_tokens, results[1].turns) == ("", 0, ())
    assert len(results[2].turns) == 2


def test_the_same_id_twice(tiny):
    with pytest.raises(InputError, match="'q0' is given more than once"):
        list(generate_all(*tiny, requests(1) * 2))


def test_the_end_token_counts_and_the_padding_does_not(tiny, monkeypatch):
    model, processor = tiny
    original = model.generate

    def generate(**inputs):
        tokens = original(**inputs)
        tokens[0, -4:] = torch.tensor([7, 3, 1, 1])  # word, end, padding, padding
        return tokens

    monkeypatch.setattr(model, "generate", generate)
    results = list(generate_all(model, processor, requests(2), settings=GREEDY))
    assert results[1].n_tokens == 4  # the longer question is the first row


def test_no_bar_without_progress(tiny, capfd):
    list(generate_all(*tiny, requests(2), settings=GREEDY))
    assert capfd.readouterr() == ("", "")
    list(generate_all(*tiny, requests(2), settings=GREEDY, progress=True))
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_beams": 0}, "num_beams"),
        ({"batch_size": -1}, "batch_size"),
        ({"seed": -1}, "seed must not be negative"),
        ({"do_sample": True, "temperature": 0.0}, "temperature must be positive"),
        ({"do_sample": True, "temperature": float("nan")}, "temperature"),
        ({"do_sample": True, "temperature": float("inf")}, "temperature"),
        ({"do_sample": True, "top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"do_sample": True, "top_p": float("nan")}, "top_p"),
        ({"temperature": 0.5}, "do_sample=true only"),
    ],
)
def test_settings_out_of_range(changes, words):
    with pytest.raises(ValueError, match=words):
        GenerateSettings(**changes)


def test_generation_config_draws_no_warning(tiny, caplog):
    generation_config(tiny[0], GREEDY).validate()
    generation_config(tiny[0], SAMPLED).validate()
    assert caplog.text == ""


def test_fingerprint_follows_the_weights(tiny):
    model, _ = build("llava")
    assert fingerprint(model) == fingerprint(tiny[0])
    assert fingerprint(build("llava", seed=1)[0]) != fingerprint(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    assert fingerprint(model) != fingerprint(tiny[0])
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] -= 1
        model.get_output_embeddings().weight[3, 5] += 1  # and not by its first numbers alone
    assert fingerprint(model) != fingerprint(tiny[0])
