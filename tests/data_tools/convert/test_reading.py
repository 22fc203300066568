"""Published formats, as their papers' files hold them, and what is wrong with single rows."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from tiny import picture

from data_tools.convert import READERS
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, Problem, contents, placeholders
from data_tools.convert.reading import read
from data_tools.records import Outcome, StageOutput
from mmlm.errors import InputError

TALK = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]
WORSE = [TALK[0], {"from": "gpt", "value": "A cat."}]
ROWS = {
    "sentinel": {
        "image_id": "17",
        "image_path": "0.png",
        "question": "What is this?",
        "context": "A lawn.",
        "y_win": "A dog runs.",
        "y_lose": "A cat runs.",
        "type": "y+",
        "nonhallu_objects": ["dog"],
    },
    "rlhf-v": {
        "ds_name": "RLHF-V",
        "image_path": "0.png",
        "text": json.dumps({"question": "What is this?", "chosen": "A dog.", "rejected": "A cat."}),
        "origin_dataset": "VQAv2",
        "idx": 7,
    },
    "rlaif-v": {
        "ds_name": "RLAIF-V",
        "image_path": "0.png",
        "question": "What is this?",
        "chosen": "A dog.",
        "rejected": "A cat.",
        "origin_split": "{}",
        "idx": "7",
    },
    "povid": {
        "id": "7",
        "image": "0.png",
        "conversations": TALK,
        "rejected_conversations": WORSE,
    },
    "mia-dpo": {
        "image": ["0.png", "1.png"],
        "prompt": "Image1:<image>\nImage2:<image>\nIn Image2, what is this?",
        "chosen": "A dog.",
        "rejected": "A cat.",
    },
    "llava": {"id": "7", "image": "0.png", "conversations": TALK},
    "llama-factory": {
        "conversations": TALK[:1],
        "chosen": TALK[1],
        "rejected": WORSE[1],
        "images": ["0.png"],
    },
    "mmlm": {
        "id": "7",
        "images": ["0.png"],
        "question": "What is this?",
        "context": "A lawn.",
        "chosen": "A dog.",
        "rejected": "A cat.",
        "step": 1,
        "chosen_final": True,
        "rejected_final": False,
        "is_final": True,
        "meta": {"model": "m"},
    },
    "trl": {
        "images": ["0.png"],
        "prompt": [{"role": "user", "content": "What is this?"}],
        "chosen": [{"role": "assistant", "content": "A dog."}],
        "rejected": [{"role": "assistant", "content": "A cat."}],
    },
}
QUESTION = [{"type": "image"}, {"type": "text", "text": "What is this?"}]


def records(path, source_format="auto", check="exists", images=None):
    pictures = Pictures(images or path.parent, path.parent / "store", check)
    return list(read(path, source_format, pictures))


@pytest.mark.parametrize("name", list(READERS))
def test_every_format_is_told_by_its_fields_and_read(put, folder, name):
    (record,) = records(put([ROWS[name]]))
    assert isinstance(record, PreferenceRecord)
    if name == "mia-dpo":
        assert [part.get("text") for part in record.prompt[0]["content"]] == [
            *("Image1:", None, "\nImage2:", None, "\nIn Image2, what is this?")
        ]
        assert record.images == (str(folder / "0.png"), str(folder / "1.png"))
    else:
        assert record.prompt == ({"role": "user", "content": QUESTION},)
        assert record.images == (str(folder / "0.png"),)
    assert record.chosen.startswith("A dog")
    assert record.rejected is None if name == "llava" else record.rejected.startswith("A cat")
    assert record.context == ("A lawn." if name in ("sentinel", "mmlm") else "")
    assert record.complete is (name not in ("sentinel", "mmlm"))
    assert record.chosen_complete is (name != "sentinel")


@pytest.mark.parametrize(
    ("name", "identifier", "meta"),
    [
        ("sentinel", "17-1", {"image_id": "17", "type": "y+", "nonhallu_objects": ["dog"]}),
        (
            "rlhf-v",
            "7",
            {"ds_name": "RLHF-V", "image_path": "0.png", "origin_dataset": "VQAv2"},
        ),
        ("rlaif-v", "7", {"ds_name": "RLAIF-V", "image_path": "0.png", "origin_split": "{}"}),
        ("povid", "7", {}),
        ("mia-dpo", "row-1", {}),
        ("mmlm", "7", {"step": 1, "model": "m"}),
    ],
)
def test_nothing_the_source_says_is_lost(put, name, identifier, meta):
    (record,) = records(put([ROWS[name]]))
    assert (record.id, record.meta) == (identifier, meta)


def test_sentinel_by_picture_without_paths(folder, put):
    """The form for LLaVA's training; Visual Genome's pictures lie in two folders."""
    (folder / "VG_100K_2").mkdir()
    picture(5).save(folder / "VG_100K_2" / "2324811.jpg")
    pair = {"question": "What?", "win": "A dog.", "lose": "A cat.", "context": None}
    path = put({"2324811": [pair, {**pair, "win": "Two dogs."}], "99": [pair]}, "in.json")
    first, second, missing = records(path)
    assert first.images == second.images == (str(folder / "VG_100K_2" / "2324811.jpg"),)
    assert (first.id, second.id, second.chosen) == ("2324811-1", "2324811-2", "Two dogs.")
    assert first.context == ""
    assert "no 99.jpg or the like" in missing.reason
    assert missing.place == f"{path}, 99, entry 1"


def test_bytes_in_a_table_are_written_out_once(folder, tmp_path):
    content = (folder / "0.png").read_bytes()
    rows = [
        {**ROWS["rlaif-v"], "idx": str(n), "image": {"bytes": content, "path": "x.png"}}
        for n in range(3)
    ]
    rows[2]["image"] = {"bytes": b"no picture", "path": "y.png"}
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second, wrong = records(path)
    assert first.images == second.images
    assert list((tmp_path / "store").iterdir()) == [tmp_path / "store" / first.images[0]]
    assert (tmp_path / "store" / first.images[0]).read_bytes() == content
    assert wrong.reason == "the picture's 10 bytes are no picture"
    assert wrong.place.endswith("in.parquet, row 3")


def test_our_pipelines_output_is_read_as_it_stands(folder):
    with StageOutput(folder / "out", {}, ("pairs",)) as output:
        line = {**ROWS["mmlm"], "images": ["../0.png"]}
        output.write([Outcome("a", "ok", {"pairs": [line]}), Outcome("b", "no_pairs")])
    (record,) = list(read(folder / "out", "auto", Pictures(folder / "out", folder)))
    assert record.images == (str(folder / "0.png"),)


def test_llava_with_several_turns(put):
    more = [*TALK, {"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "Brown."}]
    (record,) = records(put([{**ROWS["llava"], "conversations": more}], "in.json"))
    assert [message["role"] for message in record.prompt] == ["user", "assistant", "user"]
    assert record.chosen == "Brown."


@pytest.mark.parametrize(
    "prompt", ["<image>\nWhat is this?", "What <image>is this?", "What is this?"]
)
def test_mia_dpo_with_one_path_has_its_picture_in_front(put, prompt):
    """As the authors' loader moves it, wherever the prompt says it is."""
    (record,) = records(put([{**ROWS["mia-dpo"], "image": "0.png", "prompt": prompt}]))
    assert record.prompt == ({"role": "user", "content": QUESTION},)


def test_text_only_records(put):
    talk = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hi."}]
    (record,) = records(put([{"id": "1", "conversations": talk}]))
    assert record.images == ()


@pytest.mark.parametrize(
    ("text", "back"),
    [
        ("<image>\nWhat?", "<image>\nWhat?"),
        ("What?\n<image>", "<image>\nWhat?"),  # as LLaVA's own loader moves it
        ("<image>What?", "<image>\nWhat?"),
        ("No picture.", "No picture."),
        ("A <image> in the middle", "A <image> in the middle"),
        ("Image1:<image>\nImage2:<image>\nWhat?", "Image1:<image>\nImage2:<image>\nWhat?"),
    ],
)
def test_placeholders(text, back):
    assert placeholders(contents(text)) == back


# --- what is wrong with a row ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("rlaif-v", {"chosen": " "}, "`chosen` is empty"),
        ("rlaif-v", {"rejected": ""}, "`rejected` is empty"),
        ("rlaif-v", {"rejected": " a  DOG."}, "equal but for blanks and case"),
        ("rlaif-v", {"chosen": None}, "`chosen` must be text, got NoneType"),
        ("rlaif-v", {"chosen": "<image> a dog"}, "`chosen` holds <image>"),
        ("rlaif-v", {"question": "  "}, "the prompt has no text"),
        ("rlaif-v", {"image_path": "9.png"}, "there is no picture"),
        ("rlaif-v", {"image_path": 3}, "a picture is int"),
        ("rlhf-v", {"text": "{"}, "`text` is no JSON"),
        ("rlhf-v", {"text": "3"}, "`text` must hold an object"),
        ("rlhf-v", {"idx": None}, "it has no `idx`"),
        ("mia-dpo", {"image": ["0.png"]}, "2 image placeholders for 1 pictures"),
        ("mia-dpo", {"image": []}, "2 image placeholders for 0 pictures"),
        ("mia-dpo", {"video": "v.mp4"}, "about a video"),
        ("povid", {"rejected_conversations": WORSE[1:]}, "differ before their last answers"),
        ("povid", {"conversations": TALK[:1]}, "differ before|does not end with an answer"),
        ("povid", {"conversations": [{"from": "system", "value": ""}]}, "a turn of 'system'"),
        ("llava", {"conversations": []}, "must be a list of turns"),
        ("llava", {"conversations": [TALK[1], TALK[0], TALK[1]]}, "turns before the answer are"),
        ("llava", {"image": None}, "1 image placeholders for 0 pictures"),
        ("mmlm", {"question": None, "prompt": [{"type": "video"}]}, "the type 'video'"),
        ("mmlm", {"prompt": [{"role": "user", "content": "x"}]}, "must be a list of segments"),
        ("trl", {"chosen": [{"role": "user", "content": "x"}]}, "one turn of the assistant"),
    ],
)
def test_a_bad_row_is_left_out_with_its_line(put, name, change, reason):
    good, other = dict(ROWS[name]), dict(ROWS[name])
    other |= {"id": "8", "idx": 8} if name != "sentinel" else {}
    rows = records(put([good, {**good, **change, "id": "bad"}, other]), name)
    assert isinstance(rows[0], PreferenceRecord)
    assert isinstance(rows[2], PreferenceRecord)
    import re

    assert isinstance(rows[1], Problem)
    assert re.search(reason, rows[1].reason)
    assert rows[1].place.endswith("in.jsonl, line 2")


def test_ids_come_once(put):
    first, second = records(put([ROWS["povid"], ROWS["povid"]]))
    assert first.id == "7"
    assert "the id '7' was there before" in second.reason
    assert "line 1" in second.reason


def test_lines_that_are_no_text_or_no_json(put):
    path = put([ROWS["povid"]])
    path.write_bytes(path.read_bytes() + b'\n{"id": "\xff"}\n{"id": \n[1]\n')
    good, bytes_, json_, list_ = records(path, "povid")
    assert good.id == "7"
    assert (bytes_.place[-6:], json_.place[-6:]) == ("line 3", "line 4")
    assert "no UTF-8 text" in bytes_.reason
    assert "no JSON" in json_.reason
    assert list_.reason == "a list, no object"


def test_pictures_that_do_not_decode(put, folder):
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:500])
    path = put([ROWS["povid"]])
    assert isinstance(records(path)[0], PreferenceRecord)
    (problem,) = records(path, check="decodes")
    assert "damaged or cut off" in problem.reason
    (folder / "0.png").unlink()
    assert isinstance(records(path, check="nothing")[0], PreferenceRecord)


# --- files as a whole -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"[1, 2", "in.json", "is no JSON"),
        (b'"text"', "in.json", "neither a list of objects nor"),
        (b"\xff\xfe", "in.json", "no UTF-8 text"),
        (b"x", "in.csv", "ends in none of"),
        (b"", "in.jsonl", "is empty"),
        (b"PAR1", "in.parquet", "cannot be read behind row 0"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, content, name, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        records(path)


def test_a_missing_file_and_a_folder_of_something_else(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        records(tmp_path / "absent.json")
    with pytest.raises(InputError, match="neither a pipeline's output"):
        list(read(tmp_path, "auto", Pictures(tmp_path, tmp_path)))


def test_json_lines_in_a_json_file(put):
    path = put([ROWS["povid"], {**ROWS["povid"], "id": "8"}])
    assert [one.id for one in records(path.rename(path.with_suffix(".json")))] == ["7", "8"]


def test_a_format_that_cannot_be_told_says_what_it_saw(put):
    with pytest.raises(InputError, match=r"no known format: question \(str\), answer \(int\)"):
        records(put([{"question": "a", "answer": 3}]))
    with pytest.raises(InputError, match="no known format"):
        records(put([ROWS["povid"], {"question": "a", "answer": 3}]))
    both = {**ROWS["sentinel"], **ROWS["povid"]}
    with pytest.raises(InputError, match="fit sentinel and povid") as error:
        records(put([both]))
    assert "--from" in error.value.advice
    with pytest.raises(InputError, match="There is no format 'coco'"):
        records(put([both]), "coco")
