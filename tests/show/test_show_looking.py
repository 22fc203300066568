"""Look: words and their maps, over the right part of the right picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

import mmlm
from mmlm.errors import InputError, UnsupportedModel
from mmlm.inputs import message, prepare
from mmlm.runner import GenerateSettings
from mmlm.show import looking
from mmlm.show.truth import draw_scene
from mmlm.show.words import words
from mmlm.streaming import AnswerStream

SHORT = GenerateSettings(max_new_tokens=6)


def streamed(model, processor, pictures, *methods, prompt="describe the image .", settings=SHORT):
    inputs = prepare(processor, [[message("user", prompt, len(pictures))]], [pictures])
    with AnswerStream(model, processor, inputs, methods, settings) as stream:
        for _ in stream:
            pass
    return stream


@pytest.fixture(scope="module")
def embedded():
    return mmlm.load("embedded")


@pytest.fixture(scope="module")
def answered(embedded):
    drawn = draw_scene(index=3)
    settings = GenerateSettings(max_new_tokens=60)
    stream = streamed(*embedded, [drawn.image], mmlm.AttentionMap(), settings=settings)
    return drawn, stream, looking.of_stream(stream, [drawn.image])


def test_words_have_maps(answered):
    _, stream, look = answered
    assert look.text == stream.text
    assert look.maps[0].shape == (stream.n_tokens, 10, 10)
    assert look.layers == tuple(range(len(look.layers)))
    np.testing.assert_allclose(look.maps[0].sum((1, 2)), look.shares[:, 0], rtol=1e-5)
    np.testing.assert_allclose(look.layer_shares.mean(0), look.shares, rtol=1e-5)
    for number, (start, end) in enumerate(words(look.text)[:5]):
        assert look.tokens_of(start, end) == (number,)  # a word-level vocabulary
        np.testing.assert_array_equal(look.of_span(start, end), look.maps[0][number])
        assert look.share_of_span(start, end) == pytest.approx(float(look.shares[number, 0]))
    several = look.of_span(0, words(look.text)[2][1])
    np.testing.assert_allclose(several, look.maps[0][:3].mean(0), rtol=1e-6)
    np.testing.assert_allclose(look.overall(), look.maps[0].mean(0))


def test_objects_that_are_there_were_looked_at(embedded):
    """What is drawn gets more attention per area when its name is written than the rest."""
    gains = []
    for index in range(12):
        drawn = draw_scene(index=index)
        settings = GenerateSettings(max_new_tokens=60)
        stream = streamed(*embedded, [drawn.image], mmlm.AttentionMap(), settings=settings)
        look = looking.of_stream(stream, [drawn.image])
        for name in drawn.known.objects:
            start = look.text.find(f" {name}") + 1
            if start:
                area = drawn_area(drawn, name, look.maps[0].shape[1:])
                seen = look.of_span(start, start + len(name))
                gains.append(float((seen * area).sum() / seen.sum() / area.mean()))
    assert len(gains) >= 8
    assert np.median(gains) > 1.5


def drawn_area(drawn, name, shape):
    """Which part of each cell shows an object: [rows, columns] in [0, 1]."""
    from data_tools.world import NAMES

    mask = np.zeros((80, 80))
    for one in drawn.scene.instances:
        if NAMES[one.category] == name:
            mask[one.y : one.y + one.height, one.x : one.x + one.width] = 1
    return mask.reshape(shape[0], 80 // shape[0], shape[1], 80 // shape[1]).mean((1, 3))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_has_maps_of_whole_pictures(family):
    model, processor = tiny.shared(family)
    picture = tiny.picture(2, (96, 64))
    stream = streamed(model, processor, [picture], mmlm.AttentionMap())
    look = looking.of_stream(stream, [picture])
    tokens, rows, columns = look.maps[0].shape
    assert tokens == stream.n_tokens == len(look.spans)
    assert rows >= 2
    assert columns >= 2
    assert (look.maps[0].sum((1, 2)) <= look.shares[:, 0] + 1e-5).all()
    assert look.maps[0].sum() > 0.5 * look.shares.sum()


def test_each_of_several_pictures_has_its_own(embedded):
    model, processor = tiny.shared("qwen2_5_vl")
    pictures = [tiny.picture(1, (96, 64)), tiny.picture(2, (64, 160))]
    look = looking.of_stream(streamed(model, processor, pictures, mmlm.AttentionMap()), pictures)
    assert [map_.shape[1:] for map_ in look.maps] == [(2, 3), (6, 2)]
    for image in range(2):
        np.testing.assert_allclose(look.maps[image].sum((1, 2)), look.shares[:, image], rtol=1e-4)


def test_pictures_that_a_model_prepares_otherwise_together_are_refused():
    model, processor = tiny.shared("llava_onevision")
    pictures = [tiny.picture(1, (112, 112)), tiny.picture(2, (112, 112))]
    stream = streamed(model, processor, pictures, mmlm.AttentionMap())
    with pytest.raises(UnsupportedModel, match="alone takes") as caught:
        looking.of_stream(stream, pictures)
    assert "one picture at a time" in caught.value.advice


def test_streams_carry_what_was_measured(answered):
    _, stream, _ = answered
    assert set(stream.records) == {"attention_map"}
    assert len(stream.token_ids) == stream.n_tokens
    assert all(isinstance(token, int) for token in stream.token_ids)


def test_streams_without_a_probe_have_no_map(embedded):
    picture = draw_scene().image
    stream = streamed(*embedded, [picture])
    assert stream.records == {}
    with pytest.raises(InputError, match="measured no attention") as caught:
        looking.of_stream(stream, [picture])
    assert "AttentionMap" in caught.value.advice


def test_stopped_answers_have_maps_of_what_was_written(embedded):
    picture = draw_scene().image
    inputs = prepare(embedded[1], [[message("user", "describe the image .", 1)]], [[picture]])
    with AnswerStream(*embedded, inputs, [mmlm.AttentionMap()]) as stream:
        next(stream)
        stream.stop()
        for _ in stream:
            pass
    look = looking.of_stream(stream, [picture])
    assert len(look.maps[0]) == stream.n_tokens


def test_what_does_not_belong_together_is_refused(answered):
    drawn, stream, look = answered
    record = stream.records["attention_map"]
    with pytest.raises(InputError, match="2 pictures"):
        looking.of_stream(stream, [drawn.image, drawn.image])
    with pytest.raises(InputError, match="tokens were given"):
        looking.look(stream.model, stream.processor, [drawn.image], [1, 2], record)
    with pytest.raises(InputError, match="No token wrote"):
        look.of_span(len(look.text), len(look.text) + 3)
    with pytest.raises(InputError, match="no picture 1"):
        look.of_span(0, 3, image=1)


def test_json_holds_everything(answered):
    _, _, look = answered
    read = json.loads(json.dumps(look.as_json()))
    assert read["text"] == look.text
    np.testing.assert_allclose(read["maps"][0], look.maps[0], rtol=1e-3)
    assert len(read["spans"]) == len(look.maps[0])


# ---- spans ----


class Pieces:
    """A processor that knows how to decode: bytes, or pieces with a sign for their blanks."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids, skip_special_tokens):
        kept = b"".join(self.pieces[i] for i in ids if self.pieces[i] != b"</s>")
        return kept.decode("utf-8", errors="replace")


def spans_of(*pieces):
    pieces = [p if isinstance(p, bytes) else p.encode() for p in pieces]
    text, spans = looking.token_spans(Pieces(pieces), range(len(pieces)))
    return text, [text[a:b] for a, b in spans]


def test_spans_leave_blanks_out():
    assert spans_of(" a", " red", " dog", ".", "</s>") == (
        "a red dog.",
        ["a", "red", "dog", ".", ""],
    )


def test_spans_of_characters_of_several_tokens():
    snow = "☃".encode()
    text, parts = spans_of("a ", snow[:1], snow[1:2], snow[2:], " man")
    assert text == "a ☃ man"
    assert parts == ["a", "☃", "☃", "☃", "man"]


def test_spans_of_blank_tokens_and_none():
    assert spans_of("\n", "a", "\n\n", "b", "\n") == ("a\n\nb", ["", "a", "", "b", ""])
    assert spans_of() == ("", [])
    assert spans_of("</s>") == ("", [""])
