"""Reading conversations: both forms, and one refusal per kind of mistake."""

import json

import pytest

from mmlm.errors import InputError
from training.sft.rows import read_conversations


def _write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


def _turns(*values):
    speakers = ["human", "gpt"] * len(values)
    return [{"from": s, "value": v} for s, v in zip(speakers, values, strict=False)]


def _parts(message):
    return [part.get("text", "<IMG>") for part in message["content"]]


LLAVA = {"id": "a", "image": "x/1.png", "conversations": _turns("<image>\nwhat ?", "a dog .")}
CHAT = {
    "id": 7,
    "images": ["1.png", "2.png"],
    "messages": [
        {"role": "system", "content": "be brief ."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "image"}],
        },
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "dog"}],
        },
    ],
}


def test_both_forms_and_where_their_pictures_are(tmp_path):
    llava, chat = read_conversations([_write(tmp_path, LLAVA, "\n", CHAT)])
    assert (llava.id, llava.images) == ("a", (str(tmp_path / "x/1.png"),))
    assert [m["role"] for m in llava.messages] == ["user", "assistant"]
    assert [_parts(m) for m in llava.messages] == [["<IMG>", "what ?"], ["a dog ."]]
    assert llava.place.endswith("rows.jsonl:1")
    assert chat.place.endswith("rows.jsonl:3")
    assert (chat.id, len(chat.images)) == ("7", 2)
    # An answer is one text, whatever segments it came in.
    assert [_parts(m) for m in chat.messages] == [
        ["be brief ."],
        ["one", "<IMG>", "<IMG>"],
        ["a dog"],
    ]
    elsewhere = read_conversations([_write(tmp_path, LLAVA)], image_folder="/data")
    assert elsewhere[0].images == ("/data/x/1.png",)


def test_a_file_may_be_one_json_array(tmp_path):
    path = _write(tmp_path, json.dumps([LLAVA, LLAVA | {"id": "b"}]), name="mix.json")
    rows = read_conversations([path])
    assert [row.id for row in rows] == ["a", "b"]
    assert rows[1].place == f"{path}, row 2"


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nwhat ?", ["<IMG>", "what ?"]),
        ("what ?\n<image>", ["<IMG>", "what ?"]),  # LLaVA's code moves it to the front
        ("in <image> what ?", ["in ", "<IMG>", " what ?"]),
        ("<image>", ["<IMG>"]),
    ],
)
def test_notation_of_llava(tmp_path, value, parts):
    row = LLAVA | {"conversations": _turns(value, "a dog .")}
    [read] = read_conversations([_write(tmp_path, row)])
    assert _parts(read.messages[0]) == parts


def test_unanswered_ends_of_llava_are_left_out(tmp_path):
    turns = [{"from": "gpt", "value": "hello"}, *_turns("what ?", "a dog .", "and ?")]
    row = {"id": "a", "conversations": turns}
    [read] = read_conversations([_write(tmp_path, row)])
    assert [_parts(m) for m in read.messages] == [["what ?"], ["a dog ."]]
    assert read.images == ()


def _chat(*messages, **fields):
    return {"id": "a", "messages": list(messages), **fields}


USER = {"role": "user", "content": "what ?"}
ANSWER = {"role": "assistant", "content": "a dog ."}
BAD = {
    "no json": ("{", "rows.jsonl:2: it is no JSON"),
    "no object": ("[]\n", None),
    "number": ("5\n", "rows.jsonl:2: a row must be an object, not int"),
    "no id": ({**CHAT, "id": None}, "`id` must be a text or a number, not None"),
    "neither": ({"id": "a"}, "exactly one of `conversations`, `messages`; it has ['id']"),
    "both": ({**CHAT, **LLAVA}, "exactly one of `conversations`, `messages`"),
    "both pictures": (_chat(USER, ANSWER, image="a", images=["b"]), "only one of `image`"),
    "picture type": (_chat(USER, ANSWER, image=5), "must be a path or a list of paths, not 5"),
    "count": (_chat(USER, ANSWER, image="a.png"), "row 'a' has 1 pictures and 0 image placehold"),
    "no turns": ({"id": "a", "conversations": []}, "`conversations` must be a list of turns"),
    "speaker": ({"id": "a", "conversations": [{"from": "bot", "value": "x"}]}, "is from 'bot'"),
    "value": ({"id": "a", "conversations": [{"from": "gpt"}]}, "`value` of a turn must be a text"),
    "no messages": (_chat(), "`messages` must be a list of messages"),
    "role": (_chat({"role": "tool", "content": "x"}), "has the role 'tool'; known are"),
    "content": (_chat({"role": "user", "content": 5}), "a `content` must be a text or a list"),
    "segment": (_chat({"role": "user", "content": [{"type": "video"}]}), "a segment must be an"),
    "order": (_chat(USER, USER, ANSWER), "turns must be user, assistant, .* user, user, assistant"),
    "unanswered": (_chat(USER, ANSWER, USER), "turns must be user, assistant"),
    "late system": (_chat(USER, ANSWER, {"role": "system", "content": "x"}), "after one system"),
    "empty": (_chat(USER, {"role": "assistant", "content": " "}), r"turn 2 \(assistant\) is empty"),
    "shown": (
        _chat(USER, {"role": "assistant", "content": [{"type": "image"}]}, image="a"),
        r"turn 2 \(assistant\) holds a picture",
    ),
}  # fmt: skip
del BAD["no object"]


@pytest.mark.parametrize("name", sorted(BAD))
def test_what_is_wrong_is_said_with_its_place(tmp_path, name):
    row, message = BAD[name]
    message = message.replace("[", r"\[") if name == "neither" else message
    with pytest.raises(InputError, match=message) as caught:
        read_conversations([_write(tmp_path, LLAVA, row)])
    assert f"{tmp_path}/rows.jsonl:2" in str(caught.value)
    assert caught.value.advice


def test_files_that_give_nothing(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_conversations([str(tmp_path / "none.jsonl")])
    with pytest.raises(InputError, match="There are no conversations"):
        read_conversations([_write(tmp_path, "\n")])
    with pytest.raises(InputError, match="in no files"):
        read_conversations([])
