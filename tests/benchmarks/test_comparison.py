"""Comparing runs: the arithmetic against plain references, and every refusal."""

import importlib
import inspect
import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.base import CountTable, Mark, Ratio, Sample, Scores
from benchmarks.reports import comparable, compare_page, compare_tables, comparison
from benchmarks.reports.comparison import Contender, compare, holm, sign_test
from benchmarks.reports.scorers import SCORERS
from benchmarks.reports.stored_runs import StoredRun, provisions, read_run, score_file
from benchmarks.run import Item, Task
from mmlm.errors import InputError
from mmlm.runner import Request

RATIOS = {"accuracy": Ratio(("right",), ("asked",)), "silent": Ratio(("silent",), ("asked",))}


def scored(rights, name="quiz/strict", pictures=None):
    """Scores of two questions per picture; `rights` says how many are right (0, 1, 2)."""
    pictures = pictures or [f"{i}.png" for i in range(len(rights))]
    samples, rows, images = [], [], []
    for picture, right in zip(pictures, rights, strict=True):
        for number in range(2):
            good = number < right
            rows.append({"asked": 1, "right": int(good), "wrong": int(not good), "silent": 0})
            images.append(picture)
            mark = Mark(0, 3, "good" if good else "bad", "said <it>")
            samples.append(
                Sample(
                    f"{picture}-{number}", picture, f"Q{number}?", "yes & no" if good else "no",
                    good, "expected yes", (mark,) if good else (),
                )
            )  # fmt: skip
    return Scores(
        name=name,
        table=CountTable.build(images, rows, RATIOS),
        directions={"accuracy": "higher", "silent": "none"},
        good=("right",),
        bad=("wrong",),
        samples=samples,
    )


def runs(*rights):
    return [Contender(f"run{i}", scored(one)) for i, one in enumerate(rights)]


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 1), (5, 5), (2, 9), (12, 0)])
def test_sign_test_counts_all_outcomes_of_a_fair_coin(wins, losses):
    n = wins + losses
    tosses = [sum(toss) for toss in product((0, 1), repeat=n)]
    extreme = [heads for heads in tosses if abs(2 * heads - n) >= abs(wins - losses)]
    assert sign_test(wins, losses) == pytest.approx(len(extreme) / len(tosses), abs=1e-15)


def test_sign_test_of_more_pictures_than_floats_can_count():
    assert 0 < sign_test(1300, 1200) < 0.06
    assert sign_test(2000, 1000) < 1e-70
    assert sign_test(7000, 7000) == 1
    with pytest.raises(ValueError, match="must not be negative"):
        sign_test(-1, 2)


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1, never falling.
    assert holm([0.02, 0.5, 0.01, 0.03]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.04]) == [0.04]
    assert holm([0.9, 0.8]) == pytest.approx([1, 1])
    assert holm([]) == []


def test_pictures_are_won_lost_and_tied():
    result = compare(runs([2, 1, 0, 1, 1], [2, 2, 2, 0, 1]))
    (outcome,) = result.outcomes
    assert outcome.better == ("2.png", "1.png")  # the larger gain first
    assert outcome.worse == ("3.png",)
    assert outcome.same == 2
    assert outcome.p_value == outcome.adjusted == 1
    assert str(outcome).startswith("run1: better on 2 pictures, worse on 1, the same on 2")


def test_differences_are_paired_and_reversed_when_the_runs_are():
    rights = np.random.default_rng(0).integers(0, 3, size=(2, 60)).tolist()
    there = compare(runs(*rights)).rows[0].cells[1].change
    back = compare(runs(*reversed(rights))).rows[0].cells[1].change
    assert there.value == pytest.approx((sum(rights[1]) - sum(rights[0])) / 120)
    assert back.value == pytest.approx(-there.value)
    assert back.interval.low == pytest.approx(-there.interval.high)


def test_order_of_the_samples_changes_nothing():
    first, second = scored([2, 1, 0, 1] * 5), scored([1, 1, 2, 2] * 5)
    turned = scored([1, 1, 2, 2][::-1] * 5, pictures=[f"{i}.png" for i in range(20)][::-1])
    plain = compare([Contender("a", first), Contender("b", second)])
    mixed = compare([Contender("a", first), Contender("b", turned)])
    assert compare_tables.as_json(plain) == compare_tables.as_json(mixed)


def test_a_run_against_its_copy_shows_nothing():
    result = compare(runs([2, 1, 0, 1] * 5, [2, 1, 0, 1] * 5))
    assert result.outcomes[0].p_value == 1
    assert result.outcomes[0].same == 20
    change = result.rows[0].cells[1]
    assert (change.change.value, change.verdict) == (0, "within noise")


def test_verdicts_and_json():
    result = compare(runs([0] * 20, [2] * 20, [0] * 19 + [1]), resamples=50, seed=3)
    record = compare_tables.as_json(result)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    accuracy = record["metrics"]["accuracy"]["runs"]
    assert "change" not in accuracy["run0"]
    assert (accuracy["run1"]["change"], accuracy["run1"]["verdict"]) == (1, "better")
    assert accuracy["run2"]["verdict"] == "within noise"
    told = record["per_picture"]["run1"]
    assert (told["better"], told["worse"], told["same"]) == (20, 0, 0)
    assert told["sign_test_p"] == pytest.approx(2 / 2**20)
    assert told["holm_p"] == pytest.approx(4 / 2**20)  # two tests, this one the smaller p
    assert told["better_on"][0] == "0.png"
    assert (record["resamples"], record["seed"]) == (50, 3)
    few = compare_tables.as_json(compare(runs([0] * 9, [2] * 9)))
    assert few["metrics"]["accuracy"]["runs"]["run1"]["verdict"] == "too few pictures"


def test_undefined_metrics_stay_undefined():
    never = {"never": Ratio(("silent",), ("silent",))}
    both = [
        Contender(name, replace(one, table=replace(one.table, ratios=never), directions={}))
        for name, one in (("a", scored([1, 2])), ("b", scored([2, 2])))
    ]
    result = compare(both)
    assert result.rows[0].cells[1].change.value is None
    assert compare_tables.as_json(result)["metrics"]["never"]["runs"]["b"]["verdict"] == "undefined"
    assert "undefined" in page_of(result)


def test_terminal_tables_of_few_and_many_runs():
    import io

    from rich.console import Console

    for count in (2, 7):
        console = Console(file=io.StringIO(), width=160)
        for table in compare_tables.terminal(compare(runs(*([[0, 1, 2] * 4] * count)))):
            console.print(table)
        shown = console.file.getvalue()
        assert "changes against run0" in shown
        assert f"run{count - 1}" in shown
        assert ("Holm" in shown) == (count > 2)


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_compared():
    base_run = Contender("a", scored([1, 2]))
    with pytest.raises(ValueError, match="at least two runs"):
        compare([base_run])
    with pytest.raises(ValueError, match="a label of its own"):
        compare([base_run, Contender("a", scored([1, 2]))])
    with pytest.raises(InputError, match="quiz/strict, b as quiz/loose"):
        compare([base_run, Contender("b", scored([1, 2], "quiz/loose"))])
    with pytest.raises(InputError, match="2 pictures, b about 3: 0 stand in the first only, 1"):
        compare([base_run, Contender("b", scored([1, 2, 0]))])
    with pytest.raises(InputError, match="no metric 'f1'") as caught:
        compare(runs([1], [2]), metrics=["f1"])
    assert caught.value.advice == "Choose among accuracy, silent."
    other = scored([1, 2])
    other = replace(other, table=replace(other.table, columns=("asked", "right", "wrong", "x")))
    with pytest.raises(InputError, match="count different things: silent, x"):
        compare([base_run, Contender("b", other)])


def stored(record=None, lines=None, benchmark="quiz"):
    lines = lines or [{"id": str(i), "prompt": f"Q{i}", "text": f"a{i}"} for i in range(3)]
    return StoredRun(SimpleNamespace(name="x"), benchmark, record or {}, lines, scored([1]))


def record(**changes):
    return {
        "command": "bench quiz",
        "model": {"id": "m", "dtype": "float32"},
        "methods": [],
        "data": {"questions": "sha256:1", "prompt": "why?", "image_ids": [1, 2, 3]},
        "information": {"versions": {"torch": "2"}},
    } | changes


def check(first, second):
    comparable.check_comparable({"a": first, "b": second})


def test_runs_about_other_things_are_refused():
    with pytest.raises(InputError, match="a is a run of quiz, b one of pope"):
        check(stored(), stored(benchmark="pope"))
    data = record()["data"]
    with pytest.raises(InputError, match=r"data.prompt is 'why.' against 'what.'"):
        check(stored(record()), stored(record(data=data | {"prompt": "what?"})))
    with pytest.raises(InputError, match=r"a list of 3 against one of 2 \(2 entries in both\)"):
        check(stored(record()), stored(record(data=data | {"image_ids": [1, 2]})))
    with pytest.raises(InputError, match=r"data.questions is 'sha256:1' against nothing"):
        check(stored(record()), stored(record(data={"prompt": "why?", "image_ids": [1, 2, 3]})))


def test_answers_in_one_run_only_are_refused():
    lines = [{"id": str(i), "text": "a"} for i in range(3)]
    failed = [*lines[:2], {"id": "2", "text": None, "error": "no picture"}]
    with pytest.raises(InputError, match=r"1 have an answer in a only, 0 in b only, e.g. '2'"):
        check(stored(lines=lines), stored(lines=failed))
    check(stored(lines=failed), stored(lines=failed))
    asked = [{"id": "0", "prompt": "one", "text": "a"}]
    with pytest.raises(InputError, match="prompt of '0' is 'one' against 'two'"):
        check(stored(lines=asked), stored(lines=[asked[0] | {"prompt": "two"}]))
    check(stored(lines=[{"text": "a"}]), stored(lines=[{"text": "b"}]))  # no ids to go by


def test_what_else_differs_is_told():
    other = record(model={"id": "m", "dtype": "bfloat16"}, information={"versions": {"torch": "3"}})
    changed = [{"id": str(i), "prompt": f"Q{i}", "text": "b"} for i in range(3)]
    told = comparable.other_differences(
        {"a": stored(record()), "b": stored(other, changed), "c": stored(record()), "d": stored()}
    )
    assert told[:2] == [
        "b also differs from a in model.dtype: 'float32' against 'bfloat16'.",
        "b also differs from a in versions.torch: '2' against '3'.",
    ]
    assert told[2] == "c gave exactly the same answers as a."
    assert told[3].startswith("d has no run record")
    assert len(told) == 4


# --- stored runs ----------------------------------------------------------------------------------

LINES = [
    {"id": f"random-{i}", "split": "random", "version": "custom", "question_id": i,
     "image": f"{i // 2}.png", "question": f"Q{i}?", "label": ("yes", "no")[i % 2],
     "prompt": f"Q{i}?", "text": "Yes."}
    for i in range(4)
]  # fmt: skip


def write(folder, lines=LINES, run=None, name="answers.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if run is not None:
        (folder / f"{name}.run.json").write_text(run if isinstance(run, str) else json.dumps(run))
    return folder


def pope_record(**information):
    return {"command": "bench pope", "information": {"scorer": "pope/strict"} | information}


def test_score_file_by_folder_and_by_file(tmp_path):
    write(tmp_path / "a", run=pope_record(requests=4))
    by_folder = score_file(tmp_path / "a")
    assert score_file(tmp_path / "a" / "answers.jsonl").name == by_folder.name
    assert by_folder.name.endswith("/strict")
    assert score_file(tmp_path / "a", "opera").name.endswith("/opera")


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (None, {}, "should hold the answers of one run; it has none"),
        ("{", {}, "is damaged"),
        ([], {}, "is damaged"),
        ({"command": "bench pope", "information": []}, {}, "is damaged"),
        ({"command": "generate"}, {}, "nobody knows which benchmark"),
        ({"command": "bench chess"}, {}, "no way to score answers of 'chess'"),
        (pope_record(), {"benchmark": "chair"}, "answers of pope, not of chair"),
        (pope_record(), {"variant": "loose"}, "Variant 'loose': Unknown parser"),
        (pope_record(requests=5), {}, "not finished: 4 of 5 answers"),
    ],
)
def test_runs_that_cannot_be_read(tmp_path, run, options, message):
    with pytest.raises(InputError, match=message) as caught:
        read_run(write(tmp_path / "a", run=run), **options)
    assert caught.value.advice


def test_waiting_answers_shards_and_two_runs_in_a_folder(tmp_path):
    folder = write(tmp_path / "a", run=pope_record())
    (folder / "answers.jsonl.early").write_text("")
    with pytest.raises(InputError, match="not finished: 4 answers"):
        read_run(folder)
    write(tmp_path / "b", run=pope_record(), name="answers.shard-0-of-2.jsonl")
    with pytest.raises(InputError, match="parts of a run only"):
        read_run(tmp_path / "b")
    write(write(tmp_path / "c", run=pope_record()), run=pope_record(), name="other.jsonl")
    with pytest.raises(InputError, match=r"it has answers.jsonl, other.jsonl"):
        read_run(tmp_path / "c")


def test_answers_from_elsewhere_need_the_benchmark(tmp_path):
    file = write(tmp_path / "a") / "answers.jsonl"
    with pytest.raises(InputError, match="has no run record") as caught:
        read_run(file)
    assert "--benchmark" in caught.value.advice
    run = read_run(file, benchmark="pope")
    assert (run.pictures, run.failed, len(run.lines)) == (None, 0, 4)


def test_moved_truth_is_asked_for(tmp_path):
    lines = [{"id": "1", "image_id": 1, "image": "1.png", "caption": "A dog."}]
    gone = {"command": "bench chair", "information": {"annotations": [str(tmp_path / "gone.json")]}}
    folder = write(tmp_path / "a", lines, gone)
    with pytest.raises(InputError, match=r"gone.json, which is missing") as caught:
        read_run(folder)
    assert "--annotations" in caught.value.advice
    with pytest.raises(InputError, match="None of the 1 pictures"):
        read_run(folder, information={"annotations": []})


def test_every_benchmark_that_can_be_run_can_be_compared():
    from mmlm.cli.bench import COMMANDS

    assert COMMANDS.keys() <= SCORERS.keys()


VARIANTS = {
    "amber": "exact/raw",
    "blink": "val/stated-letter",
    "chair": "pattern",
    "hallusionbench": "judge:gpt-4",
    "mvbench": "test/lmms-eval",
    "pope": "chat/opera",
    "text-dominance": "instruction/without-first",
}


@pytest.mark.parametrize("name", SCORERS)
def test_scorers_exist_and_take_what_their_variants_say(name):
    scorer = SCORERS[name]
    module, _, function = scorer.target.partition(":")
    lines, *parameters = inspect.signature(
        getattr(importlib.import_module(module), function)
    ).parameters.values()
    assert lines.name == "lines"
    known = {parameter.name for parameter in parameters}
    assert {*scorer.facts, *scorer.options(VARIANTS.get(name, ""))} <= known
    assert all(parameter.default is not parameter.empty for parameter in parameters)


def test_names_of_variants_become_parameters():
    told = {name: SCORERS[name].options(variant) for name, variant in VARIANTS.items()}
    assert told["amber"]["near"].name == "exact"
    assert told["amber"]["answers"] == "raw"
    assert told["blink"] == {"parser": "stated-letter"}
    assert told["hallusionbench"] == {"variant": "judge"}
    assert told["pope"] == {"parser": "opera"}
    assert told["text-dominance"] == {"text": "instruction", "first_token": False}


def test_provisions_find_the_pictures_again(tmp_path):
    def task(*items):
        return Task("quiz", tuple(Item(Request(str(i), (p,), "?"), f) for i, (p, f) in items))

    here = [(i, (tmp_path / "sub" / f"{i}.png", {"image": f"sub/{i}.png"})) for i in range(2)]
    assert provisions(task(*here)) == {"requests": 2, "images": str(tmp_path.resolve())}
    elsewhere = (2, (tmp_path / "other" / "2.png", {"image": "2.png"}))
    assert provisions(task(*here, elsewhere)) == {"requests": 3}
    assert provisions(task((0, (tmp_path / "a.png", {})))) == {"requests": 1}


# --- the page -------------------------------------------------------------------------------------


def page_of(result, picture=lambda name: None, notes=()):
    facts = {"run <0>": "no method"}
    return compare_page.render(compare_page.Page(result, notes, facts, picture))


def test_page_shows_gains_losses_and_an_unchosen_part():
    from PIL import Image

    asked = []

    def picture(name):
        asked.append(name)
        return Image.new("RGB", (40, 30)) if name != "2.png" else None

    text = page_of(compare(runs([2, 1, 0], [1, 1, 2])), picture, ["b <also> differs"])
    assert compare_page.GENERATOR in text[:600]
    assert "Where run1 is better than run0" in text
    assert "Where run1 is worse than run0" in text
    assert "The first pictures, as they come" in text
    assert asked == ["2.png", "0.png", "0.png", "1.png", "2.png"]
    assert text.count("picture not found") == 2
    assert '<mark class="good" title="said &lt;it&gt;">yes</mark> &amp; no' in text
    assert "b &lt;also&gt; differs" in text
    assert "run &lt;0&gt;" in text
    assert "://" not in text
    assert "<script" not in text


def test_page_names_every_clear_change():
    worse = compare(runs([2] * 20, [1] * 20))
    text = page_of(replace(worse, rows=(worse.rows[1], worse.rows[0])))
    assert "Also worse: Accuracy −50.0 [−50.0, −50.0]." in text
    assert "Also better" not in text


def test_page_shows_the_answers_that_differ_first():
    samples = [Sample(str(i), "a.png", f"Q{i}?", "no", True) for i in range(9)]
    others = [
        replace(one, answer="yes", correct=False) if one.id == "7" else one for one in samples
    ]
    others[5] = replace(others[5], answer="no!")
    table = scored([1], pictures=["a.png"]).table
    both = [
        Contender(name, replace(scored([1], pictures=["a.png"]), table=table, samples=one))
        for name, one in (("a", samples), ("b", others))
    ]
    text = page_of(compare(both))
    shown = [i for i in range(9) if f'<p class="question">Q{i}?' in text]
    assert shown == [0, 1, 5, 7]
    assert text.index("Q7?") < text.index("Q5?") < text.index("Q0?")
    assert "and 5 more about this picture" in text


def test_samples_are_found_by_unit_picture_or_id():
    table = CountTable.build([3, "set-1", "5.png"], [{"n": 1}] * 3, {})
    samples = [
        Sample("3", "3.jpg", "", "by its id", None),
        Sample("x", "5.png", "", "by its picture", None),
        Sample("y", "5.png", "", "by its unit", None, unit="set-1"),
        Sample("z", "6.png", "", "by nothing", None),
    ]
    found = comparison.samples_by_picture(Scores("x", table, {}, (), samples=samples))
    answers = {image: [one.answer for one in ones] for image, ones in found.items()}
    assert answers == {3: ["by its id"], "5.png": ["by its picture"], "set-1": ["by its unit"]}


def test_one_question_for_all_is_shown_once():
    one = scored([1], pictures=["a.png"])
    same = replace(one, samples=[replace(sample, question="What?") for sample in one.samples])
    text = page_of(compare([Contender("a", same), Contender("b", same)]))
    assert 'class="question"' not in text
    assert text.count("Asked: “What?”") == 1
