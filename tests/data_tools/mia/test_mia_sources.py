"""Questions about one picture, in the forms in which they are published."""

import json

import pytest

from data_tools.mia.sources import digest, read_sources, world_sources
from mmlm.errors import InputError


def write(path, records):
    lines = path.suffix == ".jsonl"
    path.write_text(
        "".join(json.dumps(one) + "\n" for one in records) if lines else json.dumps(records)
    )
    return path


def llava(identifier, *texts, image="coco/train2017/1.jpg"):
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
    return {"id": identifier, "image": image, "conversations": turns}


def test_question_and_answer(tmp_path):
    record = {"id": 7, "image": "a/b.png", "question": " What? ", "answer": "That.", "source": "x"}
    (one,) = read_sources(write(tmp_path / "s.jsonl", [record])).items
    assert (one.id, one.question, one.answer, one.source) == ("7", "What?", "That.", "x")
    assert one.image == tmp_path / "a" / "b.png"
    (one,) = read_sources(tmp_path / "s.jsonl", tmp_path / "other").items
    assert one.image == tmp_path / "other" / "a" / "b.png"


def test_llava_in_a_list(tmp_path):
    records = [
        llava("1", "<image>\nWhat is it?", "A cat.", "And that?", "A dog."),
        llava("2", "Who is it?\n<image>", "Nobody.", image="vg/VG_100K/2.jpg"),
        {"id": "3", "conversations": [{"from": "human", "value": "Hi"}]},  # a text without picture
        llava("1", "<image>\nAgain?", "Yes."),
        llava("4", "Only a question?"),
        llava("5", "Where is it?", "At [0.12, 0.3, 0.55, 1.0]."),
    ]
    found = read_sources(write(tmp_path / "s.json", records))
    assert [(one.id, one.question, one.source) for one in found.items] == [
        ("1", "What is it?", "coco"), ("2", "Who is it?", "vg"), ("1~2", "Again?", "coco"),
    ]  # fmt: skip
    assert found.skipped == {"no_image": 1, "no_turn": 1, "boxes": 1}
    every = read_sources(tmp_path / "s.json", turns="all", boxes=True).items
    assert [(one.id, one.question) for one in every] == [
        ("1", "What is it?"), ("1#2", "And that?"), ("2", "Who is it?"), ("1~2", "Again?"),
        ("5", "Where is it?"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", False),
        ("[ 0.1,0.22 ,0.3, .4 ]", False),
        ("a list [1, 2, 3, 4]", True),
        ("[0.1, 0.2]", True),
    ],
)
def test_boxes_are_recognised(tmp_path, text, kept):
    records = [llava("1", "Q?", "A."), llava("2", f"What is in {text}?", "A cat.")]
    found = read_sources(write(tmp_path / "s.json", records))
    assert len(found.items) == 1 + kept
    assert found.skipped["boxes"] == 1 - kept


def test_chat_messages_stop_where_roles_do(tmp_path):
    record = {
        "id": "1",
        "image": "1.png",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "Two?"},
        ],
    }
    (one,) = read_sources(write(tmp_path / "s.jsonl", [record]), turns="all").items
    assert (one.question, one.answer) == ("One?", "1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.jsonl", '{"id": "1", "image": "1.png"}', "record 1 has neither `question`"),
        ("s.json", '{"id": "1"}', "no list of records"),
        ("s.json", "[{", "is no JSON"),
        ("s.jsonl", '{"id": 1, "image": "1.png", "question": 3, "answer": ""}', "turn that is no"),
        ("s.jsonl", '{"id": 1, "question": "a", "answer": "b"}', "no record about one picture"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_text(content + "\n")
    with pytest.raises(InputError, match=message):
        read_sources(tmp_path / name)
    with pytest.raises(InputError, match="no file"):
        read_sources(tmp_path / "absent.jsonl")


def test_world_scenes_are_sources(tmp_path):
    found = world_sources(tmp_path / "world", 3, seed=4).items
    assert len(found) == 3 * (1 + 5)
    assert len({one.id for one in found}) == 18
    assert {one.source for one in found} == {"world"}
    assert len({one.image for one in found}) == 3
    assert all(one.image.is_file() for one in found)
    assert found == world_sources(tmp_path / "world", 3, seed=4).items
    other = world_sources(tmp_path / "elsewhere", 3, seed=4).items
    assert digest(found) == digest(other)  # wherever the pictures are
    assert digest(found) != digest(world_sources(tmp_path / "five", 3, seed=5).items)
