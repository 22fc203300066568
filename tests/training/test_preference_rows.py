"""Reading preference rows, and what every bad one is told (trl-dpo 8)."""

import json

import pytest
from preference_rows import CHOSEN, REJECTED, asked, pair, sizes
from tiny import picture, shared

from data_tools.convert.formats.ours import row as written_row
from data_tools.convert.preference import PreferenceRecord
from data_tools.sentinel.pairs import Candidate, Pair
from data_tools.sentinel.records import pair_line
from mmlm.errors import ImageReadError, InputError
from mmlm.inputs import load_image
from training.errors import (
    ImageTokenMismatch,
    MissingField,
    PictureCountMismatch,
    PreferenceTooLong,
    UnusableResponse,
    WrongFieldType,
)
from training.pictures import picture_size, read_pictures
from training.preference.collator import VisionPreferenceCollator, usable_rows
from training.preference.rows import PreferenceRow, as_row, read_rows

OURS = {
    "id": "m",
    "images": ["a.png", "b.png"],
    "prompt": [
        *({"type": "text", "text": "Image1: "}, {"type": "image"}),
        *({"type": "text", "text": " Image2: "}, {"type": "image"}),
        {"type": "text", "text": "What is in Image2?"},
    ],
    "chosen": "A dog.",
    "rejected": "A cat.",
    "ratio": 0.2,
    "meta": {"model": "x"},
}
SENTINEL = {
    "id": "s",
    "images": ["a.png"],
    "question": "Describe it.",
    "context": "A lawn.",
    "chosen": "A dog runs.",
    "rejected": "A cat runs.",
    "is_final": False,
    "kind": "coherent",
    "meta": {"seed": 0},
}

SAID = {"role": "assistant", "content": "so"}


@pytest.fixture
def file(tmp_path):
    def write(*lines, name="pairs.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


def llava(**options):
    return VisionPreferenceCollator(shared("llava")[1], **options)


# ---- reading -------------------------------------------------------------------------------------


def test_both_forms(file, tmp_path):
    first, second = read_rows([file(OURS, SENTINEL)])
    assert first == PreferenceRow(
        id="m",
        images=(str(tmp_path / "a.png"), str(tmp_path / "b.png")),
        prompt=({"role": "user", "content": OURS["prompt"]},),
        chosen="A dog.",
        rejected="A cat.",
        meta={"ratio": 0.2, "model": "x"},
    )
    assert second == PreferenceRow(
        id="s",
        images=(str(tmp_path / "a.png"),),
        prompt=asked("Describe it.", 1),
        chosen="A dog runs.",
        rejected="A cat runs.",
        context="A lawn.",
        chosen_ends=False,
        rejected_ends=False,
        meta={"kind": "coherent", "seed": 0},
    )


def test_what_sentinel_and_convert_write_is_read(file, tmp_path):
    """No field is renamed on one side only."""
    answers = (
        Candidate("a dog .", (), "coherent", finished=True),
        Candidate("x .", (), "agnostic"),
    )
    sentinel = pair_line(
        "7", 0, Pair(*answers, "coherent"), image="a.png", question="what ?", context="a lawn .",
        context_objects=[], step=1, meta={},
    )  # fmt: skip
    record = PreferenceRecord(
        "c", ("a.png",), asked("q", 1), "yes", "no", context="well ,", rejected_complete=False
    )
    rows = read_rows([file(sentinel, written_row(record))])
    assert [(r.id, r.chosen_ends, r.rejected_ends, r.context) for r in rows] == [
        ("7-1-0", True, False, "a lawn ."),
        ("c", True, False, "well ,"),
    ]
    assert rows[0].prompt == asked("what ?", 1)
    assert rows[1].prompt == asked("q", 1)
    assert "is_final" not in rows[0].meta
    assert rows[0].meta["step"] == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"is_final": True}, (True, True)),
        ({"is_final": True, "chosen_final": False}, (False, True)),
        ({"is_final": True, "chosen_final": True, "rejected_final": False}, (True, False)),
        ({"is_final": None}, (True, True)),
    ],
)
def test_ends_of_each_side_come_before_those_of_both(file, fields, expected):
    [row] = read_rows([file({**SENTINEL, **fields})])
    assert (row.chosen_ends, row.rejected_ends) == expected


def test_pictures_of_a_folder_elsewhere(file, tmp_path):
    [row] = read_rows([file(SENTINEL)], image_folder=str(tmp_path / "other"))
    assert row.images == (str(tmp_path / "other" / "a.png"),)


def test_a_row_of_several_turns(file):
    turns = [
        *asked("first", 1),
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        *asked("second", 0),
    ]
    [row] = read_rows([file({**OURS, "images": ["a.png"], "prompt": turns})])
    assert list(row.prompt) == turns


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ({**OURS, "images": ["a.png"]}, PictureCountMismatch, "'m' has 1 pictures and 2 image"),
        ({**SENTINEL, "chosen": " "}, UnusableResponse, "row 's': `chosen` is empty"),
        ({**SENTINEL, "rejected": ""}, UnusableResponse, "row 's': `rejected` is empty"),
        ({**OURS, "images": "a.png"}, WrongFieldType, "`images` must be a list of paths"),
        ({**OURS, "prompt": "<image> What?"}, WrongFieldType, "must be a list of messages or seg"),
        ({**OURS, "prompt": [{"type": "video"}]}, WrongFieldType, "must be an image or a text"),
        ({**OURS, "prompt": [{"role": "user", "content": 3}]}, WrongFieldType, "got int"),
        ({**SENTINEL, "question": None}, WrongFieldType, "`question` must be text, got NoneType"),
        ({**SENTINEL, "context": ["a"]}, WrongFieldType, "`context` must be text, got list"),
        ({**SENTINEL, "is_final": "no"}, WrongFieldType, "`is_final` must be true or false"),
        ({**SENTINEL, "meta": 1}, WrongFieldType, "`meta` must be an object"),
        ({**SENTINEL, "id": ""}, WrongFieldType, "`id` must be text or a number, got ''"),
        ({**SENTINEL, "id": None}, MissingField, "no `id`"),
        ({"id": "x", "images": []}, MissingField, "no `question`; its fields are id, images"),
        ({**OURS, "reason": "short"}, InputError, "'short': this record was dropped by a filter"),
        (
            {**OURS, "images": ["a"], "prompt": [*asked("q", 1), SAID]},
            InputError,
            "the turns before the answer are user, assistant",
        ),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(file, line, error, message):
    path = file(SENTINEL, line)
    with pytest.raises(error) as caught:
        read_rows([path])
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)
    assert caught.value.advice


def test_files_without_rows(file, tmp_path):
    with pytest.raises(InputError, match="There are no pairs in "):
        read_rows([file()])
    with pytest.raises(InputError, match="no pairs in no files"):
        read_rows([])
    with pytest.raises(InputError, match="There is no file"):
        read_rows([str(tmp_path / "none.jsonl")])


def test_an_id_comes_once(file):
    first, second = file(SENTINEL), file(SENTINEL, name="more.jsonl")
    with pytest.raises(InputError, match=r"more.jsonl, line 1: the id 's' stands in .*line 1 alr"):
        read_rows([first, second])


# ---- TRL's columns -------------------------------------------------------------------------------


def test_trls_chat_columns():
    """Pictures of plain text stand before the first turn of the user, as TRL has it."""
    row = as_row(
        {
            "image": "a.png",
            "prompt": [{**SAID, "role": "system"}, {"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
            "tools": None,
        }
    )  # fmt: skip
    system = {"role": "system", "content": [{"type": "text", "text": "so"}]}
    assert row.images == ("a.png",)
    assert row.prompt == (system, *asked("q", 1))
    assert (row.chosen, row.rejected) == ("yes", "no")


def test_pictures_stand_in_the_first_turn_only():
    talk = [{"role": role, "content": "so"} for role in ("user", "assistant", "user")]
    row = as_row({**vars(pair()), "prompt": talk})
    assert [len(one["content"]) for one in row.prompt] == [2, 1, 1]


def test_what_arrow_makes_of_segments():
    """A table fills the fields that a segment lacks with None."""
    content = [{"type": "image", "text": None}, {"type": "text", "text": "q"}]
    row = as_row({**vars(pair()), "prompt": [{"role": "user", "content": content}], "meta": None})
    assert row.prompt == asked("q", 1)
    assert row.meta == {}


# ---- the table of bad input, trl-dpo 8 -----------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
def test_bad_input_missing_column(name):
    values = dict(vars(pair()))
    del values[name]
    with pytest.raises(KeyError) as caught:
        llava()([values])
    text = str(caught.value)
    assert text == f"there is no `{name}`; its fields are {', '.join(sorted(values))}."


@pytest.mark.parametrize("value", [3, ["a"], [{"role": "user", "content": "a"}], {"text": "a"}])
def test_bad_input_an_answer_that_is_no_text(value):
    with pytest.raises(TypeError, match="`chosen` must be text"):
        llava()([{**vars(pair()), "chosen": value}])


def test_bad_input_pictures_and_placeholders():
    """Both numbers, each once, though the batch holds every picture twice."""
    rows = [pair(0), {**vars(pair(1, 2)), "prompt": asked("what ?", 1)}]
    with pytest.raises(ValueError, match=r"^row 'r1' has 2 pictures and 1 image placeholders\.$"):
        llava()(rows)
    written = pair(2, question="what is <image> ?")
    with pytest.raises(
        ValueError, match=r"row 'r2' has 1 pictures, and its prompt 2 times '<image"
    ):
        llava()([written])


@pytest.mark.parametrize("name", ["chosen", "rejected", "context"])
def test_bad_input_an_image_token_in_an_answer(name):
    with pytest.raises(UnusableResponse, match=f"row 'r0': `{name}` holds '<image>'"):
        llava()([pair(**{name: "a <image> dog"})])


def test_bad_input_image_tokens_that_were_cut_off(monkeypatch):
    """Counted before the model sees them."""
    collator = llava()
    collator([pair()])
    processor = shared("llava")[1]
    call = type(processor).__call__

    def cut(self, *args, **options):
        made = call(self, *args, **options)
        made["input_ids"][0][made["input_ids"][0] == self.image_token_id] = 5
        made["input_ids"][0, 8:12] = self.image_token_id
        return made

    monkeypatch.setattr(type(processor), "__call__", cut)
    with pytest.raises(
        ImageTokenMismatch, match="'r0' has 4 image tokens, and its 1 pictures need 16"
    ):
        collator([pair()])


def damaged(tmp_path):
    path = tmp_path / "cut.png"
    picture(5).save(path)
    path.write_bytes(path.read_bytes()[:300])
    return path


def test_bad_input_unreadable_picture(tmp_path):
    row = pair(1, images=(str(damaged(tmp_path)),))
    with pytest.raises(ImageReadError, match=r"row 'r1': The picture '.*cut.png' cannot be read"):
        llava()([pair(0), row])
    collator = llava(on_bad_image="drop")
    assert collator([pair(0), row])["input_ids"].shape[0] == 2
    assert collator.dropped["unreadable picture"] == 1


def test_bad_input_a_batch_left_empty_is_no_step(tmp_path):
    """Never a batch without rows, whose loss would be zero: refused, with what to do."""
    row = pair(1, images=(str(tmp_path / "none.png"),))
    for collator in (llava(on_bad_image="drop"), llava(overlong="drop", max_length=5)):
        rows = [row] if collator.on_bad_image == "drop" else [pair(0)]
        with pytest.raises(InputError, match="None of the 1 rows of a batch can be used") as caught:
            collator(rows)
        assert "usable_rows" in caught.value.advice


@pytest.mark.parametrize("limit", [10, 20, 47])
def test_bad_input_too_long(limit):
    """Nothing is cut: neither picture nor answer, however little is too much."""
    row = pair()
    length = llava().length(row, sizes(row))
    assert length.image_tokens == 16
    llava(max_length=length.tokens)([row])
    limit = min(limit, length.tokens - 1)
    with pytest.raises(
        ValueError, match=f"row 'r0' has {length.tokens} tokens, 16 of them"
    ) as caught:
        llava(max_length=limit)([row])
    error = caught.value
    assert isinstance(error, PreferenceTooLong)
    assert (error.id, error.n_tokens, error.n_image_tokens, error.max_length) == (
        *("r0", length.tokens),
        *(16, limit),
    )


def test_bad_input_an_empty_answer():
    with pytest.raises(ValueError, match="row 'r0': `rejected` is empty"):
        llava()([pair(rejected="  ")])


def test_bad_input_equal_answers_are_left_out():
    rows = [pair(0), pair(1, rejected=f" {CHOSEN} ")]
    collator = llava()
    assert collator(rows)["input_ids"].shape[0] == 2
    assert collator.dropped == {"equal answers": 1}
    assert usable_rows(rows, llava()).left_out == {"equal answers": 1}


def test_bad_input_only_text_rows():
    rows = [pair(n, 0, rejected=f"{REJECTED} {n}") for n in range(3)]
    with pytest.warns(UserWarning, match="None of 3 rows has a picture") as caught:
        usable_rows(rows, llava())
    assert len(caught) == 1
    usable_rows([*rows, pair(3)], llava())  # warnings are errors


# ---- measured before training --------------------------------------------------------------------


def test_usable_rows_are_those_a_batch_takes(tmp_path):
    path = tmp_path / "good.png"
    picture(1, (100, 50)).save(path)
    bad = str(damaged(tmp_path))
    rows = [
        pair(0, images=(str(path),)),
        pair(1, images=(bad,)),
        pair(2, rejected=CHOSEN),
        pair(3, 3),
        pair(4, images=(str(path),), rejected="no"),
    ]
    limit = llava().length(rows[0], [(100, 50)]).tokens
    options = {"on_bad_image": "drop", "overlong": "drop", "max_length": limit}
    kept, lengths, left_out = usable_rows(rows, llava(**options))
    assert kept == [rows[0], rows[4]]
    batch = llava()(kept)
    assert lengths == batch["attention_mask"].sum(1).view(2, -1).amax(0).tolist()
    assert left_out == {"unreadable picture": 1, "equal answers": 1, "too long": 1}
    kept, _, left_out = usable_rows(rows, llava(**options), decode=False)
    assert [row.id for row in kept] == ["r0", "r1", "r4"]  # its head can be read


@pytest.mark.parametrize(
    ("options", "error"),
    [({"on_bad_image": "drop", "max_length": 40}, PreferenceTooLong), ({}, ImageReadError)],
)
def test_usable_rows_refuses_before_training(tmp_path, options, error):
    rows = [pair(0, images=(str(damaged(tmp_path)),)), pair(1, 3)]
    with pytest.raises(error, match="row 'r"):
        usable_rows(rows, llava(**options))


def test_sizes_are_those_of_the_pictures(tmp_path):
    """Turned by the camera, as bytes, as `datasets` stores them, or in memory."""
    image = picture(0, (60, 30))
    exif = image.getexif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    content = path.read_bytes()
    for source in (str(path), content, {"bytes": content, "path": None}, {"path": str(path)}):
        for decode in (False, True):
            assert picture_size(source, decode=decode) == (30, 60)
        [read] = read_pictures([source], "row")
        assert read.tobytes() == load_image(path).tobytes()
    assert picture_size(picture(0, (60, 30))) == (60, 30)
    with pytest.raises(ImageReadError, match="no such file"):
        picture_size(str(tmp_path / "none.png"))


def test_rows_from_a_table_as_datasets_stores_them(tmp_path):
    """An unmodified trainer may hand over what a data set on the disk holds."""
    path = tmp_path / "a.png"
    image = picture(3, (70, 40))
    image.save(path)
    stored = {**vars(pair()), "images": [{"bytes": path.read_bytes(), "path": None}]}
    one = llava()([stored])
    other = llava()([pair(images=(str(path),))])
    assert all(one[name].equal(other[name]) for name in other)
