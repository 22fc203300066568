"""Every format that is written: read back, or fed to TRL's own collator."""

import copy
import json

import datasets
import pytest
from PIL import Image
from tiny import build, shared
from tokenizers.processors import TemplateProcessing

from data_tools.convert import FORMS
from data_tools.convert.formats.trl_text import Renderer
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, Unwritable, user
from data_tools.convert.reading import read
from data_tools.convert.writing import form_of, write
from mmlm.errors import InputError
from mmlm.inputs import SIMPLE_TEMPLATE


@pytest.fixture
def single(folder):
    return PreferenceRecord(
        "a", (str(folder / "0.png"),), user("What is this?", 1), "A dog.", "A cat."
    )


@pytest.fixture
def several(folder):
    content = [
        *({"type": "text", "text": "Image1:"}, {"type": "image"}),
        *({"type": "text", "text": "\nImage2:"}, {"type": "image"}),
        {"type": "text", "text": "\nIn Image2, what is this?"},
    ]
    return PreferenceRecord(
        "b",
        (str(folder / "1.png"), str(folder / "2.png")),
        ({"role": "user", "content": content},),
        "Ein Hündchen.",
        "A bus.",
        meta={"ratio": 0.3},
    )


@pytest.fixture
def continued(folder):
    return PreferenceRecord(
        "c",
        (str(folder / "3.png"),),
        user("Describe it.", 1),
        "A dog runs.",
        "A cat runs.",
        context="A lawn.",
        chosen_complete=False,
        rejected_complete=False,
    )


@pytest.fixture
def talk(folder):
    prompt = (
        *user("What is this?", 1),
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
        {"role": "user", "content": [{"type": "text", "text": "Which colour?"}]},
    )
    return PreferenceRecord("d", (str(folder / "0.png"),), prompt, "Brown.", "Pink.")


def back(path):
    folder = path if path.is_dir() else path.parent
    return list(read(path, "auto", Pictures(folder, path.parent / "store")))


def test_ours_keeps_everything(tmp_path, single, several, continued, talk):
    alone = PreferenceRecord("e", single.images, single.prompt, "A dog.")
    one_ends = PreferenceRecord(**{**vars(continued), "id": "f", "rejected_complete": True})
    everything = [single, several, continued, talk, alone, one_ends]
    path = tmp_path / "out.jsonl"
    assert write(everything, "mmlm", path) == 6
    assert back(path) == everything
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["images"] == ["0.png"]  # beside the file: it may be moved with its pictures
    assert lines[2]["context"] == "A lawn."
    assert "rejected" not in lines[4]
    assert (lines[5]["chosen_complete"], lines[5]["rejected_complete"]) == (False, True)
    other = tmp_path / "deeper" / "out.jsonl"
    write([single], "mmlm", other)
    assert back(other) == [single]


@pytest.mark.parametrize("name", ["trl", "llama-factory"])
def test_preferences_come_back(tmp_path, single, several, talk, name):
    path = tmp_path / f"out.{'jsonl' if name == 'trl' else 'json'}"
    write([single, several, talk], name, path)
    expected = [PreferenceRecord(**{**vars(one), "meta": {}}) for one in (single, several, talk)]
    assert back(path) == expected


def test_llava_comes_back_without_the_worse_answers(tmp_path, single, several, talk):
    path = tmp_path / "out.json"
    write([single, several, talk], "llava", path)
    expected = [
        PreferenceRecord(**{**vars(one), "meta": {}, "rejected": None})
        for one in (single, several, talk)
    ]
    assert back(path) == expected
    written = json.loads(path.read_text())
    assert written[0]["image"] == single.images[0]
    assert written[1]["image"] == list(several.images)
    assert written[1]["conversations"][0]["value"].startswith("Image1:<image>\nImage2:<image>\n")


def test_llava_of_an_answer_behind_a_context(tmp_path, continued):
    final = PreferenceRecord(**{**vars(continued), "chosen_complete": True})
    path = tmp_path / "out.json"
    write([final], "llava", path)
    assert json.loads(path.read_text())[0]["conversations"][1]["value"] == "A lawn. A dog runs."


def test_llama_factory_gets_its_entry(tmp_path, single):
    (tmp_path / "dataset_info.json").write_text('{"older": {"file_name": "older.json"}}')
    write([single], "llama-factory", tmp_path / "pairs.json")
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    assert info["pairs"]["file_name"] == "pairs.json"
    assert info["pairs"]["ranking"] is True
    assert "older" in info


@pytest.mark.parametrize("name", ["trl", "llava", "llama-factory"])
def test_a_context_that_a_format_cannot_express_is_refused(tmp_path, single, continued, name):
    path = tmp_path / f"out.{FORMS[name][0]}"
    with pytest.raises(Unwritable, match="'c'") as error:
        write([single, continued], name, path)
    assert "--to" in error.value.advice
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", ["trl", "llama-factory"])
def test_a_sentence_without_context_does_not_end_its_turn_either(tmp_path, continued, name):
    first = PreferenceRecord(**{**vars(continued), "context": ""})
    with pytest.raises(Unwritable, match="does not end"):
        write([first], name, tmp_path / f"out.{FORMS[name][0]}")


@pytest.mark.parametrize("name", ["trl", "llama-factory"])
def test_one_answer_is_no_preference(tmp_path, single, name):
    alone = PreferenceRecord("e", single.images, single.prompt, "A dog.")
    with pytest.raises(Unwritable, match="no rejected answer"):
        write([alone], name, tmp_path / f"out.{FORMS[name][0]}")


def test_text_that_looks_like_a_picture_is_refused(tmp_path, single):
    odd = PreferenceRecord("o", single.images, user("What does <image> mean?", 1), "A tag.", "No.")
    with pytest.raises(Unwritable, match="holds <image> as text"):
        write([odd], "llava", tmp_path / "out.json")


# --- TRL ------------------------------------------------------------------------------------------


def columns(path, form):
    if form == "jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{**row, "images": [Image.open(one) for one in row["images"]]} for row in rows]
    if form == "parquet":
        return list(datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache")))
    return list(datasets.load_from_disk(str(path)))


def batch(processor, rows):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    rows = [{key: value for key, value in row.items() if key != "id"} for row in rows]
    return DataCollatorForVisionPreference(processor)(copy.deepcopy(rows))


@pytest.mark.parametrize("form", FORMS["trl"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_trls_collator_reads_the_chat_form(tmp_path, single, several, talk, form, family):
    processor = shared(family)[1]
    path = tmp_path / ("out" if form == "folder" else f"out.{form}")
    assert write([single, several, talk], "trl", path) == 3
    rows = columns(path, form)
    assert [len(row["images"]) for row in rows] == [1, 2, 1]
    assert all(isinstance(one, Image.Image) for row in rows for one in row["images"])
    made = batch(processor, rows)
    scored = [
        processor.tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(made["input_ids"], made["completion_mask"], strict=True)
    ]
    for text, answer in zip(
        scored, ["A dog.", "Ein Hündchen.", "Brown.", "A cat.", "A bus.", "Pink."], strict=True
    ):
        assert answer in text


@pytest.mark.parametrize("form", FORMS["trl-text"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_trls_collator_reads_the_raw_form(tmp_path, single, several, continued, form, family):
    processor = shared(family)[1]
    path = tmp_path / ("out" if form == "folder" else f"out.{form}")
    row_of = Renderer(processor).row
    assert write([single, several, continued], "trl-text", path, row_of=row_of) == 3
    made = batch(processor, columns(path, form))
    tokenizer = processor.tokenizer
    prompts, scored = [], []
    for ids, mask, seen in zip(
        made["input_ids"], made["completion_mask"], made["attention_mask"], strict=True
    ):
        prompts.append(tokenizer.decode(ids[(seen - mask).bool()]))
        scored.append(tokenizer.decode(ids[mask.bool()]))
    end = tokenizer.eos_token
    assert [text.strip() for text in scored] == [
        *(f"A dog.{end}", f"Ein Hündchen.{end}", "A dog runs."),
        *(f"A cat.{end}", f"A bus.{end}", "A cat runs."),
    ]
    assert prompts[2].endswith("A lawn.")
    assert "A lawn." not in scored[2]
    order = [prompts[1].index(part) for part in ("Image1:", "Image2:", "In Image2")]
    assert order == sorted(order)


def test_acceptance_7_pictures_stay_where_the_prompt_has_them(single, several):
    """Templates that print all pictures first must not tear the names from them (MIA-DPO 7, 8)."""
    processor = build("llava")[1]
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: "
        "{% for part in m['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} "
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    row = Renderer(processor).row
    assert "Image1:<image>\nImage2:<image>\nIn Image2, what" in row(several)["prompt"]
    assert row(single)["prompt"].startswith("user: <image>\nWhat is this?")


def test_the_raw_form_of_llava_to_the_letter(several, continued, single):
    processor = build("llava")[1]
    processor.chat_template = SIMPLE_TEMPLATE
    row = Renderer(processor).row
    bos = processor.tokenizer.bos_token
    starts = processor.tokenizer("a")["input_ids"][0] == processor.tokenizer.bos_token_id
    begin = bos if starts else ""
    assert row(continued) == {
        "id": "c",
        "images": list(continued.images),
        "prompt": f"{begin}USER: <image>\nDescribe it. ASSISTANT: A lawn.",
        "chosen": " A dog runs.",
        "rejected": " A cat runs.",
    }
    end = processor.tokenizer.eos_token
    one_ends = PreferenceRecord(**{**vars(continued), "rejected_complete": True})
    assert (row(one_ends)["chosen"], row(one_ends)["rejected"]) == (
        " A dog runs.",
        f" A cat runs.{end}",
    )
    assert row(single)["chosen"] == f" A dog.{end}"
    assert row(single)["prompt"].endswith("ASSISTANT:")


def test_bos_is_written_once(single):
    processor = build("llava")[1]
    tokenizer = processor.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A",
        special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)],
    )
    processor.chat_template = SIMPLE_TEMPLATE
    assert Renderer(processor).row(single)["prompt"].startswith(f"{tokenizer.bos_token}USER")
    processor.chat_template = "{{ bos_token }}" + SIMPLE_TEMPLATE
    text = Renderer(processor).row(single)["prompt"]
    assert text.count(tokenizer.bos_token) == 1


# --- files ----------------------------------------------------------------------------------------


def test_an_output_that_is_there_is_kept(tmp_path, single, several):
    path = tmp_path / "out.jsonl"
    write([single], "mmlm", path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="is there already"):
        write([several], "mmlm", path)
    assert path.read_bytes() == before
    write([several], "mmlm", path, overwrite=True)
    assert back(path) == [several]
    for _ in range(2):
        write([single], "trl", tmp_path / "folder", overwrite=True)
    assert len(columns(tmp_path / "folder", "folder")) == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet", "out"])
def test_no_records_leave_no_file(tmp_path, name):
    assert write([], "trl", tmp_path / name) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "name", "message"),
    [
        ("coco", "out.jsonl", "no format 'coco' to write"),
        ("mmlm", "out.parquet", r"written to \.jsonl, not"),
        ("trl", "out.json", r"written to \.jsonl or \.parquet or a folder"),
        ("llava", "out", r"written to \.json or \.jsonl"),
    ],
)
def test_a_format_has_its_files(tmp_path, target, name, message):
    with pytest.raises(InputError, match=message):
        form_of(target, tmp_path / name)


def test_raw_strings_need_a_model(tmp_path, single):
    with pytest.raises(InputError, match="written for a model"):
        write([single], "trl-text", tmp_path / "out.jsonl")
