"""HallusionBench: golden values, both variants by hand, judges that fail, damaged input."""

import itertools
import json
import random
from dataclasses import asdict

import pytest
from golden import golden

from benchmarks import hallusionbench
from benchmarks.hallusionbench import counts as hallusion_counts
from benchmarks.judges import ScriptedJudge
from mmlm.errors import InputError

ENTRIES = hallusionbench.read_entries()
WORDS = {"0": "incorrect", "1": "correct", "2": "unclear"}


def answered(text="Yes", entries=ENTRIES):
    """Stored lines; ``text`` may be a function of the entry."""
    return [
        {
            "id": entry.id,
            **asdict(entry),
            "image": entry.image,
            "text": text(entry) if callable(text) else text,
        }
        for entry in entries
    ]


def with_codes(lines, codes):
    """Lines with verdicts from two-character codes: verdict, same."""
    return [
        {
            **line,
            "judge": "script",
            "judged": {
                "correctness": {"reply": WORDS[code[0]]},
                "same": {"reply": "same" if code[1] == "1" else "different"},
            },
        }
        for line, code in zip(lines, codes, strict=True)
    ]


# --- golden ---------------------------------------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("root", golden("judge_benchmarks*"))
def test_every_official_value(root):
    expected = json.loads(next(root.glob("expected*.json")).read_text())["hallusionbench"]
    codes = json.loads(next(root.glob("inputs*.json")).read_text())["hallusionbench"]
    lines = with_codes(answered(), codes)
    scores = hallusionbench.score_stored(lines, "judge")
    assert scores.official == expected
    for name in ("aAcc", "fAcc", "qAcc", "easy_aAcc", "hard_aAcc", "LH", "VI", "Mixed"):
        assert round(100 * scores.metrics[name], 4) == expected[name]
    assert scores.metrics["yes_pct_diff"] == pytest.approx(expected["yes_pct_diff"], abs=1e-12)
    shuffled = random.Random(4).sample(lines, len(lines))
    again = hallusionbench.score_stored(shuffled, "judge")
    assert again.as_json(resamples=9) == scores.as_json(resamples=9)


@pytest.mark.golden
@pytest.mark.parametrize("root", golden("judge_benchmarks*"))
def test_the_flag_is_asked_for_only_where_it_matters(root):
    expected = json.loads(next(root.glob("expected*.json")).read_text())["hallusionbench"]
    codes = json.loads(next(root.glob("inputs*.json")).read_text())["hallusionbench"]
    by_id = {entry.id: code for entry, code in zip(ENTRIES, codes, strict=True)}
    asked = []

    def reply(prompt):
        name, _, kind = prompt.id.partition("#")
        asked.append(kind)
        code = by_id[name]
        return ("same" if code[1] == "1" else "different") if kind else WORDS[code[0]]

    lines = hallusionbench.judge_answers(answered(), ScriptedJudge(reply, "script"))
    scores = hallusionbench.score_stored(lines, "judge")
    assert scores.official == expected
    assert scores.name == "hallusionbench/judge:script/own-prompt"
    assert asked.count("") == 1129
    assert 0 < asked.count("same") < 674 / 2  # not about all 674 entries with a changed figure


# --- the rules ------------------------------------------------------------------------------------


def entry(category="VD", visual="1", figure="0", question="0", label="yes"):
    return hallusionbench.Entry(
        category, "ocr", visual, "0", figure, question, "Is it so?", "It is.", label
    )


@pytest.mark.parametrize(
    ("category", "visual", "verdict", "original", "same", "reason"),
    [
        ("VD", "2", "incorrect", "correct", True, "Mixed"),
        ("VD", "2", "incorrect", "correct", False, "VI"),
        ("VD", "2", "incorrect", "correct", None, "untold"),
        ("VD", "2", "incorrect", "incorrect", True, "VI"),
        ("VD", "2", "unclear", "correct", True, "VI"),
        ("VD", "2", "incorrect", None, True, "untold"),
        ("VS", "1", "incorrect", "incorrect", True, "LH"),
        ("VS", "1", "incorrect", "incorrect", False, "Mixed"),
        ("VS", "1", "unclear", "incorrect", True, "Mixed"),
        ("VS", "1", "incorrect", "unclear", True, "VI"),
        ("VS", "1", "unclear", "unclear", True, "VI"),
        ("VS", "1", "unclear", "correct", True, "VI"),
        ("VS", "1", "incorrect", "correct", True, "VI"),
        ("VS", "2", "incorrect", "correct", True, "LH"),
        ("VS", "2", "incorrect", "correct", False, "VI"),
        ("VS", "2", "correct", "incorrect", True, None),
    ],
)
def test_who_is_to_blame(category, visual, verdict, original, same, reason):
    outcome = hallusion_counts.Outcome(entry(category, visual, "1"), verdict, same)
    assert hallusion_counts.blame(outcome, original) == reason


def test_originals_are_blamed_by_category():
    wrong = hallusion_counts.Outcome(entry("VD"), "unclear")
    assert hallusion_counts.blame(wrong, "unclear") == "VI"
    made_up = hallusion_counts.Outcome(entry("VS", "0"), "incorrect")
    assert hallusion_counts.blame(made_up, "incorrect") == "LH"
    modest = hallusion_counts.Outcome(entry("VS", "0"), "unclear")
    assert modest.correct
    assert hallusion_counts.blame(modest, "unclear") is None


def test_every_error_has_exactly_one_reason():
    codes = [a + b for a, b in itertools.product("012", "01")]
    drawn = random.Random(7).choices(codes, k=len(ENTRIES))
    counts = hallusionbench.score_stored(with_codes(answered(), drawn), "judge").counts
    assert counts["LH"] + counts["VI"] + counts["Mixed"] == counts["wrong"]
    assert counts["untold"] == 0
    assert counts["questions"] - counts["correct"] == counts["wrong"]


def test_accuracies_by_hand():
    # One VS set: without figure, with the original one, with a changed one; two questions.
    entries = [
        entry("VS", visual, figure, question)
        for visual, figure in (("0", "0"), ("1", "1"), ("2", "2"))
        for question in ("0", "1")
    ]
    codes = ["20", "00", "10", "10", "10", "00"]
    scores = hallusionbench.score_stored(with_codes(answered(entries=entries), codes), "judge")
    assert scores.metrics["aAcc"] == pytest.approx(4 / 6)  # the first is unclear without a figure
    assert scores.metrics["fAcc"] == pytest.approx(1 / 2)  # figure 0 is none
    assert scores.metrics["qAcc"] == pytest.approx(1 / 2)
    assert scores.metrics["easy_aAcc"] == pytest.approx(1 / 2)
    assert scores.metrics["hard_aAcc"] == pytest.approx(1 / 2)
    assert scores.metrics["with_figure_aAcc"] == pytest.approx(3 / 4)
    assert scores.metrics["LH"] == pytest.approx(1 / 2)
    assert scores.metrics["Mixed"] == pytest.approx(1 / 2)
    assert scores.metrics["VD_aAcc"] is None
    assert scores.metrics["VS_aAcc"] == scores.metrics["aAcc"]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Correct", "correct"),
        ("The prediction is incorrect.", "incorrect"),
        ("“Unclear”", "unclear"),
        ("not correct", "correct"),  # the authors' rule
        ("", "unclear"),
    ],
)
def test_verdict_rule(reply, verdict):
    assert hallusionbench.read_verdict(reply) == verdict


# --- yes and no -----------------------------------------------------------------------------------


def test_perfect_answers():
    scores = hallusionbench.score_stored(answered(lambda e: f"{e.label.capitalize()}, I see."))
    assert scores.name == "hallusionbench/yesno"
    assert [scores.metrics[name] for name in ("aAcc", "fAcc", "qAcc")] == [1, 1, 1]
    assert scores.metrics["LH"] is None
    assert scores.metrics["yes_fp_ratio"] is None
    assert scores.official["LH"] is None
    assert not any(scores.statuses.values())


def test_yes_to_everything():
    scores = hallusionbench.score_stored(answered("Yes."))
    assert scores.counts["correct"] == sum(e.label == "yes" for e in ENTRIES)
    assert scores.metrics["yes_pct_diff"] == pytest.approx(1 - 484 / 1129)
    assert scores.metrics["yes_fp_ratio"] == 1
    # It says the same with every figure.
    assert scores.counts["untold"] == 0


def test_unparsed_answers_are_wrong_where_there_is_a_figure():
    scores = hallusionbench.score_stored(answered(lambda e: "Yes and no." if e.image else ""))
    assert scores.statuses["unparsed"] == 1129
    assert scores.counts["correct"] == sum(not e.has_figure for e in ENTRIES) == 178
    assert scores.metrics["with_figure_aAcc"] == 0


def test_against_a_naive_count():
    generator = random.Random(5)
    lines = answered(lambda e: generator.choice(["yes", "No.", "perhaps"]))
    right = {}
    for one, line in zip(ENTRIES, lines, strict=True):
        said = {"yes": "yes", "No.": "no", "perhaps": None}[line["text"]]
        right[one] = said == one.label or (said is None and one.image == "")

    def share(chosen, key):
        groups = {}
        for one in chosen:
            groups.setdefault(key(one), []).append(right[one])
        return sum(all(group) for group in groups.values()) / len(groups)

    metrics = hallusionbench.score_stored(lines).metrics
    shown = [one for one in ENTRIES if one.image]
    vs = [one for one in ENTRIES if one.category == "VS"]
    assert metrics["aAcc"] == pytest.approx(sum(right.values()) / 1129)
    assert metrics["fAcc"] == pytest.approx(share(shown, lambda e: e.image))
    assert metrics["qAcc"] == pytest.approx(share(ENTRIES, lambda e: e.pair))
    assert metrics["with_figure_qAcc"] == pytest.approx(share(shown, lambda e: e.pair))
    assert metrics["VS_qAcc"] == pytest.approx(share(vs, lambda e: e.pair))


# --- what can go wrong ----------------------------------------------------------------------------


def test_failed_answers_leave_their_figure_and_pair_out():
    lines = answered("Yes")
    at = next(i for i, one in enumerate(ENTRIES) if one.category == "VD" and not one.is_original)
    lines[at] = {**lines[at], "text": None, "error": "cannot read"}
    scores = hallusionbench.score_stored(lines)
    assert scores.statuses["failed"] == 1
    assert scores.statuses["not judged"] == 0
    assert scores.statuses["figures left out"] == 1
    assert scores.statuses["question pairs left out"] == 1
    assert scores.counts["questions"] == 1128
    assert scores.counts["figures"] == 345
    assert scores.official == {}
    assert scores.samples[at].correct is None


def test_a_failed_original_leaves_reasons_untold():
    lines = answered("No")
    at = next(i for i, e in enumerate(ENTRIES) if e.id == "VD_illusion_0_0_0")
    lines[at] = {**lines[at], "text": None, "error": "cannot read"}
    scores = hallusionbench.score_stored(lines)
    counts = scores.counts
    assert counts["LH"] + counts["VI"] + counts["Mixed"] + counts["untold"] == counts["wrong"]


def test_a_failing_judge_is_counted():
    judge = ScriptedJudge(lambda p: "correct" if "VS" in p.id else None, "half")
    scores = hallusionbench.score_stored(hallusionbench.judge_answers(answered(), judge), "judge")
    assert scores.statuses["not judged"] == 591
    assert scores.counts["questions"] == 538
    assert scores.metrics["VD_aAcc"] is None
    assert scores.official == {}
    silent = hallusionbench.judge_answers(answered(), ScriptedJudge({}, "silent"))
    with pytest.raises(InputError, match="None of 1129 answers has a verdict"):
        hallusionbench.score_stored(silent, "judge")


def test_a_judge_that_compares_nothing_leaves_reasons_untold():
    judge = ScriptedJudge(lambda p: None if "#same" in p.id else "incorrect", "lazy")
    scores = hallusionbench.score_stored(hallusionbench.judge_answers(answered(), judge), "judge")
    assert scores.statuses["reason of the error untold"] > 0
    assert scores.metrics["aAcc"] == 0


def test_missing_questions_are_counted():
    vd = [one for one in ENTRIES if one.category == "VD"]
    scores = hallusionbench.score_stored(answered(entries=vd))
    assert scores.statuses["absent"] == 538


def test_without_verdicts_the_error_names_the_command():
    with pytest.raises(InputError, match="not been judged") as refused:
        hallusionbench.score_stored(answered(), "judge")
    assert "mmlm score hallusionbench FILE --judge" in refused.value.advice
    with pytest.raises(ValueError, match="Unknown variant 'gpt'"):
        hallusionbench.score_stored(answered(), "gpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.clear(), "no answers to score"),
        (lambda lines: lines[2].pop("id"), "Line 3 has no id"),
        (lambda lines: lines.append(lines[0]), "is there twice"),
        (lambda lines: lines[2].update(text=float("nan")), "not a text"),
        (lambda lines: lines[2].update(id="VD_ocr_99_0_0"), "belongs to another question"),
        (lambda lines: lines[2].update(label="2"), "label is '2'"),
        (lambda lines: lines[2].update(visual_input="3"), "visual_input is '3'"),
        (lambda lines: lines[2].pop("reference"), "no text in 'reference'"),
        (
            lambda lines: lines.remove(next(x for x in lines if x["figure_id"] == "0")),
            "counterpart",
        ),
    ],
)
def test_damaged_lines_are_refused(change, message):
    lines = answered()
    change(lines)
    with pytest.raises(InputError, match=message):
        hallusionbench.score_stored(lines)


def test_shipped_questions_are_the_official_ones(data_folder):
    path = data_folder / "hallusionbench" / "HallusionBench.json.gz"
    assert hallusionbench.read_entries(path) == ENTRIES
    assert len(ENTRIES) == 1129


def test_names_of_figures_are_the_official_ones(data_folder):
    from benchmarks.base import read_json

    records = read_json(data_folder / "hallusionbench" / "HallusionBench.json.gz")
    for record, one in zip(records, ENTRIES, strict=True):
        assert (record["filename"] or "").removeprefix("./") == one.image


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[0].pop("gt_answer"), "entry 1 has no 'gt_answer'"),
        (lambda r: r[0].update(gt_answer="2"), "label is 'None'"),
        (lambda r: r[0].update(category="VX"), "category is 'VX'"),
        (lambda r: r.append(r[0]), "is there twice"),
    ],
)
def test_damaged_question_files_are_refused(data_folder, tmp_path, change, message):
    from benchmarks.base import read_json

    records = read_json(data_folder / "hallusionbench" / "HallusionBench.json.gz")
    change(records)
    (tmp_path / "q.json").write_text(json.dumps(records))
    with pytest.raises(InputError, match=message):
        hallusionbench.read_entries(tmp_path / "q.json")


def test_missing_figures_are_counted(tmp_path):
    with pytest.raises(InputError, match="346 of 346 figures are not in"):
        hallusionbench.task(ENTRIES, tmp_path)


def test_official_file_goes_there_and_back(tmp_path, data_folder):
    from benchmarks.base import read_json

    codes = random.Random(1).choices([a + b for a in "012" for b in "01"], k=1129)
    lines = with_codes(answered("Yes, it is."), codes)
    path = tmp_path / "HallusionBench_result.json"
    hallusionbench.write_official(path, lines)
    written = json.loads(path.read_text())
    source = read_json(data_folder / "hallusionbench" / "HallusionBench.json.gz")
    for record, original, code in zip(written, source, codes, strict=True):
        ours = {name: record[name] for name in original if name != "sample_note"}
        assert ours == {name: original[name] for name in ours}
        assert record["gpt4v_output_gpt_check"] + record["same"] == code
    back = hallusionbench.read_answers(path, "gpt-4")
    scores = hallusionbench.score_stored(back, "judge")
    assert scores.name == "hallusionbench/judge:gpt-4"
    assert scores.official == hallusionbench.score_stored(lines, "judge").official
    written[0]["gpt4v_output_gpt_check"] = "3"
    path.write_text(json.dumps(written))
    with pytest.raises(InputError, match="the verdict is '3'"):
        hallusionbench.read_answers(path)
    with pytest.raises(InputError, match="has no answer"):
        hallusionbench.write_official(path, [{**line, "error": "x"} for line in lines])


# --- comparing ------------------------------------------------------------------------------------


def test_compared_by_set_with_all_its_questions():
    from benchmarks.reports.comparison import Contender, compare, samples_by_picture

    plain = hallusionbench.score_stored(answered("Yes"))
    right = hallusionbench.score_stored(answered(lambda e: e.label))
    found = samples_by_picture(right)
    assert len(found) == 167
    assert sum(map(len, found.values())) == 1129
    comparison = compare([Contender("plain", plain), Contender("right", right)])
    assert len(comparison.outcomes[0].worse) == 0
    assert len(comparison.outcomes[0].better) > 100
