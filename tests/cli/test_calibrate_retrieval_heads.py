"""``mmlm calibrate heads --kind text``: needles, answers that repeat them, files of texts."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch

import mmlm
from mmlm.cli import main
from mmlm.cli.calibrate.head_maps import needles
from mmlm.cli.calibrate.questions import QuestionOptions
from mmlm.engine.head_maps import HeadMap
from mmlm.errors import InputError
from mmlm.head_measures import Needle, retrieval_heads, rouge_1_recall
from mmlm.head_measures.runs import inputs_of
from mmlm.head_measures.text import _needle_span, first_line

COMMAND = ("calibrate", "heads")


def test_error_no_run_counts():
    model, processor = mmlm.load("embedded")
    samples = list(needles(QuestionOptions(count=2)))
    with pytest.warns(UserWarning, match="None of 2 answers repeats") as said:
        found = retrieval_heads(model, processor, samples, max_new_tokens=3)
    assert len(said) == 1
    assert found.counted["counted"] == 0
    assert math.isnan(float(found.score.mean()))
    assert found.heads == ()


def test_a_repeated_needle_counts(monkeypatch):
    model, processor = tiny.shared("llava")
    monkeypatch.setattr("mmlm.head_measures.text.rouge_1_recall", lambda answer, needle: 1.0)
    sample = Needle("the cat saw a dog there . what was it ?", "a dog")
    found = retrieval_heads(model, processor, [sample], max_new_tokens=4)
    assert found.counted == {"samples": 1, "counted": 1, "without_needle": 0, "steps": 4}
    assert (found.values["set_score"] <= found.values["score"]).all()
    assert found.score.max() <= 1


def test_scores_are_means_over_the_answers_that_count(monkeypatch):
    model, processor = tiny.shared("llava")
    words = ("a dog", "the cat")
    text = "the cat saw a dog there . what was it ?"
    monkeypatch.setattr(
        "mmlm.head_measures.text.rouge_1_recall", lambda answer, needle: float(needle == words[0])
    )
    scores = torch.full((4, 8), 1.5).double(), torch.full((4, 8), 0.5).double()
    monkeypatch.setattr("mmlm.engine.head_scores.retrieval_scores", lambda *_: scores)
    both = retrieval_heads(model, processor, [Needle(text, w) for w in words], max_new_tokens=4)
    assert (both.counted["samples"], both.counted["counted"]) == (2, 1)
    assert both.score.eq(0.5).all()
    assert both.values["score"].eq(1.5).all()


def test_half_of_a_needle_is_not_enough(monkeypatch):
    model, processor = tiny.shared("llava")
    monkeypatch.setattr("mmlm.head_measures.text.rouge_1_recall", lambda answer, needle: 0.5)
    with pytest.warns(UserWarning, match="None of 1"):
        retrieval_heads(model, processor, [Needle("is a dog here ?", "a dog")], max_new_tokens=2)


def test_error_needles_that_are_not_there():
    model, processor = tiny.shared("llava")
    bad = Needle("what is this ?", "a dog")
    with pytest.raises(ValueError, match="does not stand in its prompt"):
        retrieval_heads(model, processor, [bad])
    with pytest.warns(UserWarning, match="None of 1"):
        found = retrieval_heads(model, processor, [bad], skip_bad=True)
    assert found.counted["without_needle"] == 1


def test_needles_lie_at_every_depth():
    found = list(needles(QuestionOptions(count=10)))
    depths = [one.prompt.index(one.needle) / len(one.prompt) for one in found]
    assert depths[0] == 0
    assert found[-1].prompt.index(found[-1].needle + " What does the text say") > 0
    assert any(0.2 < depth < 0.7 for depth in depths)
    # In longer texts as well, of which there are five lengths.
    found = list(needles(QuestionOptions(count=50)))
    for first in range(0, 50, 10):
        assert found[first].prompt.startswith(found[first].needle)
        last = found[first + 9]
        assert f"{last.needle} What does the text say" in last.prompt
    sentences = [one.prompt.count(" . ") for one in found[::10]]
    assert sentences == sorted(set(sentences))


def test_needles_whose_ends_are_merged_are_found_by_characters():
    model, processor = tiny.shared("llava")
    sample = Needle("the catalogue is here", "talog")
    ids = inputs_of(model, processor, [(sample.prompt, [])])["input_ids"][0].tolist()
    start, end = _needle_span(processor, ids, sample)
    assert "talog" in processor.tokenizer.decode(ids[start:end])
    assert "here" not in processor.tokenizer.decode(ids[start:end])
    # An end that is none of a token's: the next token begins right behind it.
    sample = Needle("the catalogue is here", "talogue")
    start, end = _needle_span(processor, ids, sample)
    assert processor.tokenizer.decode(ids[start:end]).endswith("ogue")


def test_recall_counts_words_as_often_as_they_are_said():
    assert rouge_1_recall("Eat a sandwich!", "eat a big sandwich") == 0.75
    assert rouge_1_recall("eating sandwiches", "he eats a sandwich") == 0.5  # by their stems
    assert rouge_1_recall("as", "a") == 0  # short words have none
    assert rouge_1_recall("no no", "no no no") == pytest.approx(2 / 3)
    assert rouge_1_recall("", "dog") == 0


def test_an_answer_ends_at_its_first_line_break(monkeypatch):
    texts = {5: "a", 6: "dog\n", 7: "and"}

    class Processor:
        def decode(self, tokens):
            return "".join(texts[token] for token in tokens)

    assert first_line(Processor(), [5, 6, 7, 5]) == [5, 6]
    assert first_line(Processor(), [5, 7]) == [5, 7]
    model, processor = tiny.shared("llava")
    monkeypatch.setattr("mmlm.head_measures.text.rouge_1_recall", lambda answer, needle: 1.0)
    monkeypatch.setattr("mmlm.head_measures.text.first_line", lambda _, tokens: tokens[:3])
    sample = Needle("the cat saw a dog there . what was it ?", "a dog")
    found = retrieval_heads(model, processor, [sample], max_new_tokens=8)
    assert found.counted["steps"] == 3


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ({"prompt": "a b"}, "`needle` must be text"),
        ({"prompt": "a b", "needle": " "}, "`needle` must be text"),
        ({"prompt": "a b", "needle": "c"}, "does not stand in the prompt"),
    ],
)
def test_texts_need_their_needle(line, match, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=match):
        list(needles(QuestionOptions(questions=path)))


def test_texts_of_a_file_are_the_first_ones(tmp_path):
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"prompt": f"here is {n} .", "needle": str(n)}) for n in range(3)]
    path.write_text("\n".join(lines) + "\n")
    found = list(needles(QuestionOptions(questions=path, count=2)))
    assert found == [Needle("here is 0 .", "0"), Needle("here is 1 .", "1")]


def test_texts_without_their_needle_are_left_out_if_so_wanted(tmp_path, capsys):
    path, output = tmp_path / "texts.jsonl", tmp_path / "heads.json"
    lines = [
        {"prompt": "a dog is here . what is here ?", "needle": "a dog"},
        {"prompt": "a cat is here . what is here ?", "needle": "a dog"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = [*COMMAND, "--kind", "text", "--questions", str(path), "--output", str(output)]
    given += ["--max_new_tokens", "2"]
    assert main(given) == 2
    assert "or give --skip_bad" in " ".join(capsys.readouterr().err.split())
    with pytest.warns(UserWarning, match="None of 2"):
        assert main([*given, "--skip_bad"]) == 0
    assert "left out: 1 texts without their needle" in capsys.readouterr().err
    assert HeadMap.load(output).counted["without_needle"] == 1
