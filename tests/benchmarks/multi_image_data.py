"""Small data sets with the official columns, and pictures inside as on the Hugging Face hub."""

import io
import json

import pyarrow
import pyarrow.parquet
from tiny import picture


def encoded(seed):
    stream = io.BytesIO()
    picture(seed, (40, 30)).save(stream, "PNG")
    return stream.getvalue()


def inside(seed):
    """A picture as `datasets` stores it."""
    return {"bytes": encoded(seed), "path": None}


def parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def mmmu_rows():
    def row(identifier, question, options, answer, kind="multiple-choice", images=(1,)):
        pictures = {f"image_{n}": inside(n) if n in images else None for n in range(1, 8)}
        return {
            "id": identifier,
            "question": question,
            "options": repr(options),
            "question_type": kind,
            "answer": answer,
            **pictures,
        }

    return [
        row("validation_Art_1", "What is <image 1> ?", ["a dog", "a cat"], "B"),
        row(
            "validation_Art_2",
            "Is <image 2> like <image 1>? Look at <image 2> again.",
            ["yes", "no"],
            "A",
            images=(1, 2),
        ),
        row("validation_Math_1", "<image 1> How many?", [], "3.5", kind="open"),
    ]


def mmmu(folder):
    rows = mmmu_rows()
    parquet(folder / "Art" / "validation-00000-of-00001.parquet", rows[:2])
    parquet(folder / "Math" / "validation-00000-of-00001.parquet", rows[2:])
    parquet(folder / "Math" / "dev-00000-of-00001.parquet", rows[2:])
    return folder


def blink_rows(answers=("(A)", "(B)", "(B)")):
    tasks = ("Counting", "Counting", "Jigsaw")
    return [
        {
            "idx": f"val_{task}_{number}",
            "sub_task": task,
            "prompt": f"Question {number}?\nSelect from the following choices.\n(A) one\n(B) two",
            "choices": ["one", "two"],
            "answer": answer,
            "image_1": inside(number),
            "image_2": inside(9) if task == "Jigsaw" else None,
            "image_3": None,
        }
        for number, (task, answer) in enumerate(zip(tasks, answers, strict=True), start=1)
    ]


def blink(folder):
    parquet(folder / "Counting" / "val-00000-of-00001.parquet", blink_rows()[:2])
    parquet(folder / "Jigsaw" / "val-00000-of-00001.parquet", blink_rows()[2:])
    return folder


def mantis_rows():
    return [
        {
            "id": "m1",
            "question_type": "multi-choice",
            "question": "<image> and <image>: which is first?",
            "images": [inside(1), inside(2)],
            "options": ["(A) left", "(B) right"],
            "answer": "B",
        },
        {
            "id": "m2",
            "question_type": "short-answer",
            "question": "What colour?",
            "images": [inside(3), inside(4)],
            "options": [],
            "answer": "Red",
        },
    ]


def mantis(folder):
    parquet(folder / "mantis_eval" / "test-00000-of-00001.parquet", mantis_rows())
    return folder


def nlvr2(folder):
    """The authors' JSON lines, and pictures by name in a folder of their own."""
    images = folder / "images" / "test1" / "0"
    images.mkdir(parents=True)
    rows = []
    for pair, label in ((0, "True"), (1, "False")):
        for side in (0, 1):
            (images / f"test1-0-{pair}-img{side}.png").write_bytes(encoded(2 * pair + side))
        rows.append(
            {"identifier": f"test1-0-{pair}-0", "sentence": "Both are grey.", "label": label}
        )
    data = folder / "test1.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def mvbench(folder, frames=6):
    """Two tasks; one clip is a folder of frames, the other a GIF."""
    tvqa = folder / "video" / "tvqa" / "frames" / "clip_1"
    tvqa.mkdir(parents=True)
    for number in range(1, frames + 1):
        (tvqa / f"{number:05d}.jpg").write_bytes(encoded(number))
    gif = folder / "video" / "FunQA_test" / "odd.gif"
    gif.parent.mkdir(parents=True)
    pictures = [picture(50 + number, (20, 10)) for number in range(5)]
    pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=40)
    (folder / "json").mkdir(parents=True)
    asked = {"question": "What happens?", "candidates": ["it falls", "it flies", "it rests"]}
    episodic = {**asked, "video": "clip_1", "answer": "it flies", "start": 0.0, "end": 2.0}
    odd = {**asked, "video": "odd.gif", "answer": "it rests"}
    for name, rows in (("episodic_reasoning", [episodic]), ("unexpected_action", [odd])):
        (folder / "json" / f"{name}.json").write_text(json.dumps(rows))
    return folder / "json"


def answered(task, *texts):
    """The lines a run would store."""
    return [
        {"id": item.request.id, **item.facts, "prompt": item.request.prompt, "text": text}
        for item, text in zip(task.items, texts, strict=True)
    ]
