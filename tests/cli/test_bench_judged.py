"""`mmlm bench` and `mmlm score` for MMHal-Bench, HallusionBench and MME, with a tiny model."""

import json

import pytest
from PIL import Image

from benchmarks import hallusionbench, mme, mmhal
from mmlm.cli import main

SHORT = ("--generate.max_new_tokens", "2", "--quiet")


@pytest.fixture
def bench(tiny_folder, tmp_path):
    def run(name, *arguments):
        output = str(tmp_path / "out")
        return main(
            ["bench", name, "--model", str(tiny_folder), "--output", output, *SHORT, *arguments]
        )

    return run


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scores_of(capsys):
    return json.loads(capsys.readouterr().out)


def write_replies(path, replies):
    path.write_text("".join(json.dumps({"id": k, "reply": v}) + "\n" for k, v in replies.items()))
    return ("--judge", "scripted", "--judge.replies", str(path))


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (90, 60, 30)).save(path)


# --- MMHal-Bench ----------------------------------------------------------------------------------


@pytest.fixture
def mmhal_images(tmp_path):
    for question in mmhal.read_questions():
        picture(tmp_path / "images" / f"{question.image_id}.jpg")
    return str(tmp_path / "images")


def test_mmhal_is_judged_once_and_scored_again_without_judge(bench, mmhal_images, tmp_path, capsys):
    assert bench("mmhal", "--images", mmhal_images, "--json") == 0
    first = scores_of(capsys)
    assert first["metric"] == "mmhal/not-judged"
    assert first["statuses"]["not judged"] == 96
    answers = tmp_path / "out" / "answers.jsonl"
    assert main(["score", "mmhal", str(answers)]) == 2
    error = capsys.readouterr().err
    assert "have not been judged" in error
    assert "mmlm score mmhal FILE --judge" in error

    replies = {str(i): f"Fine. Rating: {i % 7}" for i in range(95)}
    judge = write_replies(tmp_path / "replies.jsonl", replies)
    export = tmp_path / "official.json"
    arguments = ["score", "mmhal", str(answers), "--json", "--export", str(export)]
    assert main([*arguments, *judge]) == 3  # the judge has no reply to the last one
    judged = scores_of(capsys)
    assert judged["metric"] == "mmhal/scripted/own-prompt"
    assert judged["statuses"]["not judged"] == 1
    assert judged["counts"]["judged"] == 95
    for file in ("answers.jsonl", "answers.judged.jsonl"):
        assert main(["score", "mmhal", str(answers.with_name(file)), "--json"]) == 3
        assert scores_of(capsys)["metrics"] == judged["metrics"]
    assert len(json.loads(export.read_text())) == 96


def test_mmhal_judged_in_the_same_run(bench, mmhal_images, tmp_path, capsys):
    template = tmp_path / "prompt.txt"
    template.write_text("{} {} {} {}")
    judge = write_replies(tmp_path / "r.jsonl", {str(i): "Rating: 4" for i in range(96)})
    arguments = ("--images", mmhal_images, "--template", str(template), *judge, "--json")
    assert bench("mmhal", *arguments) == 0
    scores = scores_of(capsys)
    assert scores["official"]["average_score"] == "4.00"
    assert scores["metric"].startswith("mmhal/scripted/prompt-")
    assert len(read(tmp_path / "out" / "answers.judged.jsonl")) == 96


def test_mmhal_refuses_before_any_work(bench, tmp_path, capsys):
    assert bench("mmhal") == 2
    assert "--images is missing" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert bench("mmhal", "--images", str(tmp_path / "none")) == 2
    assert "96 of 96 pictures are not in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- HallusionBench -------------------------------------------------------------------------------


@pytest.fixture
def hallusion(tmp_path, data_records):
    """One set of each category, as a question file, with its figures."""
    chosen = [
        record
        for record in data_records
        if record["subcategory"] == "ocr" and record["set_id"] == "0"
    ]
    (tmp_path / "q.json").write_text(json.dumps(chosen))
    entries = hallusionbench.read_entries(tmp_path / "q.json")
    for entry in entries:
        if entry.image:
            picture(tmp_path / "figures" / entry.image)
    arguments = ("--images", str(tmp_path / "figures"), "--data", str(tmp_path / "q.json"))
    return entries, arguments


@pytest.fixture(scope="session")
def data_records():
    from mmlm.language.tables import load_table

    return load_table("hallusionbench.json.xz", "benchmarks")


def test_hallusionbench_by_yes_and_no_then_by_a_judge(bench, hallusion, tmp_path, capsys):
    entries, arguments = hallusion
    assert {entry.has_figure for entry in entries} == {True, False}
    assert bench("hallusionbench", *arguments, "--json") == 0
    first = scores_of(capsys)
    assert first["metric"] == "hallusionbench/yesno"
    assert first["counts"]["questions"] == len(entries)
    answers = tmp_path / "out" / "answers.jsonl"
    stored = read(answers)
    assert [line["id"] for line in stored] == [entry.id for entry in entries]
    assert main(["score", "hallusionbench", str(answers), "--json"]) == 0
    assert scores_of(capsys)["metrics"] == first["metrics"]
    assert main(["score", "hallusionbench", str(answers), "--variant", "judge"]) == 2
    assert "have not been judged" in capsys.readouterr().err

    replies = {entry.id: "incorrect" for entry in entries}
    replies |= {f"{entry.id}#same": "same" for entry in entries}
    judge = write_replies(tmp_path / "replies.jsonl", replies)
    export = tmp_path / "result.json"
    command = ["score", "hallusionbench", str(answers), "--json"]
    assert main([*command, *judge, "--export", str(export)]) == 0
    judged = scores_of(capsys)
    assert judged["metric"] == "hallusionbench/judge:scripted/own-prompt"
    assert judged["metrics"]["aAcc"]["value"] == 0
    assert main(command) == 0
    assert scores_of(capsys)["official"] == judged["official"]
    assert main([*command, "--variant", "yesno"]) == 0
    assert scores_of(capsys)["metrics"] == first["metrics"]
    assert main(["score", "hallusionbench", str(export), "--json", "--reviewer", "me"]) == 0
    again = scores_of(capsys)
    assert again["metric"] == "hallusionbench/judge:me"
    assert again["official"] == judged["official"]


@pytest.mark.parametrize("method", ["VHR(alpha=2.0)", "VCD()"])
def test_methods_meet_questions_without_a_figure(bench, hallusion, tmp_path, capsys, method):
    entries, arguments = hallusion
    code = bench("hallusionbench", *arguments, "--method", method, "--json")
    stored = read(tmp_path / "out" / "answers.jsonl")
    assert [line.get("error") for line in stored if line.get("error")] == []
    assert code == 0
    assert scores_of(capsys)["counts"]["questions"] == len(entries)


def test_hallusionbench_refuses_before_any_work(bench, hallusion, tmp_path, capsys):
    entries, arguments = hallusion
    assert bench("hallusionbench") == 2
    assert "--images is missing" in capsys.readouterr().err
    (tmp_path / "figures" / entries[-1].image).unlink()
    assert bench("hallusionbench", *arguments) == 2
    assert "1 of " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- MME ------------------------------------------------------------------------------------------


@pytest.fixture
def mme_folder(tmp_path):
    for category in mme.CATEGORIES:
        picture(tmp_path / "mme" / category / "1.png")
        (tmp_path / "mme" / category / "1.txt").write_text(
            "Is it red? Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"
        )
    return str(tmp_path / "mme")


def test_mme_run_score_and_official_files(bench, mme_folder, tmp_path, capsys):
    assert bench("mme", "--data", mme_folder, "--prompt", "llava", "--json") == 0
    first = scores_of(capsys)
    answers = tmp_path / "out" / "answers.jsonl"
    assert read(answers)[0]["prompt"].startswith("Is it red?\nAnswer the question")
    assert first["counts"]["questions"] == 8
    results = tmp_path / "results"
    assert main(["score", "mme", str(answers), "--json", "--export", str(results)]) == 0
    assert scores_of(capsys)["official"] == first["official"]
    assert main(["score", "mme", str(results), "--json", "--baseline", str(answers)]) == 0
    again = scores_of(capsys)
    assert again["official"] == first["official"]
    assert again["change"]["total_points"]["value"] == 0


def test_mme_without_its_folder(bench, tmp_path, capsys):
    assert bench("mme") == 2
    assert "--data is missing" in capsys.readouterr().err
    assert bench("mme", "--data", str(tmp_path)) == 2
    assert "no folder for: existence, count, position, color" in capsys.readouterr().err


def test_judged_runs_can_be_compared(bench, hallusion, tmp_path, capsys):
    from benchmarks.reports.stored_runs import read_run

    entries, arguments = hallusion
    judge = write_replies(
        tmp_path / "r.jsonl",
        {e.id: "correct" if e.label == "yes" else "incorrect" for e in entries},
    )
    assert bench("hallusionbench", *arguments, *judge, "--json") == 0
    scores = scores_of(capsys)
    run = read_run(tmp_path / "out")
    assert run.scored.name == scores["metric"] == "hallusionbench/judge:scripted/own-prompt"
    assert run.scored.counts == scores["counts"]
    assert run.pictures == tmp_path / "figures"
    assert read_run(tmp_path / "out", variant="yesno").scored.name == "hallusionbench/yesno"
