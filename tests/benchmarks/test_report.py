"""The report: honest verdicts, correct marks, one valid page without network."""

import io
from html.parser import HTMLParser

import pytest
from PIL import Image
from rich.console import Console

from benchmarks import chair, pope
from benchmarks.reports import page, report
from benchmarks.run import Speed

TRUTH = {i: {"dog", "cat"} for i in range(40)}
GOOD = "A dog and a cat."
BAD = "A dog, a zebra."


def run_of(label, captions, answers=None, seconds=1.0):
    scored = chair.score(
        [{"image_id": i, "caption": text} for i, text in enumerate(captions)], TRUTH
    )
    labels = ["yes", "no"] * 20
    said = answers or labels
    images = [i // 2 for i in range(40)]
    splits = {kind: pope.score(said, labels, images=images) for kind in pope.KINDS}
    text = "" if label == "plain" else f"{label}(alpha=1)"
    return report.MethodRun(label, text, scored, pope.summarize(splits), Speed(seconds, 40, 400))


@pytest.fixture(scope="module")
def runs():
    plain = run_of("plain", [BAD] * 20 + [GOOD] * 20)
    return [
        plain,
        run_of("Helps", [BAD] * 8 + [GOOD] * 32, seconds=1.5),
        run_of("Harms", [BAD] * 32 + [GOOD] * 8),
        run_of("Nothing", [BAD] * 21 + [GOOD] * 19),
    ]


@pytest.fixture(scope="module")
def rows(runs):
    return report.compare(runs, {i: {"dog", "zebra"} for i in TRUTH})


def row_of(rows, name):
    return next(row for row in rows if row.name == name)


def test_verdicts_follow_the_paired_intervals(rows):
    assert [cell.verdict for cell in row_of(rows, "chair_i").cells] == [
        "",
        "better",
        "worse",
        "within noise",
    ]
    # Fewer inventions here also means that the cat is named more often.
    assert [cell.verdict for cell in row_of(rows, "recall").cells][1:3] == ["better", "worse"]
    assert row_of(rows, "chair_s").cells[1].change.value == pytest.approx(-12 / 40)


def test_a_metric_without_a_better_side_has_no_good_or_bad_change(rows):
    verdicts = {cell.verdict for row in rows if row.direction == "none" for cell in row.cells}
    assert verdicts <= {"", "changed", "within noise"}


def test_theme_share_counts_invented_objects_of_the_scene(runs, rows):
    share = row_of(rows, "theme_share").cells[0].measure
    assert (share.numerator, share.denominator) == (20, 20)
    chance = chair.theme_share(runs[0].chair, {i: {"dog", "zebra"} for i in TRUTH})
    # Of 78 absent objects only the zebra fits the scene: the dog is present.
    assert chance.measure("chance").value == pytest.approx(1 / 78)


def test_conclusions_do_not_flatter(runs, rows):
    helps, harms, nothing = report.conclusions(runs, rows)
    assert str(helps).startswith("Helps invents less than plain decoding (CHAIR_i -")
    assert "does not help" in harms.effect
    assert "no clear effect" in nothing.effect
    assert [c.verdict for c in (helps, harms, nothing)] == ["better", "worse", "within noise"]


def test_less_invention_bought_with_fewer_true_objects_is_said():
    plain = run_of("plain", ["A dog, a cat, a zebra."] * 40)
    short = run_of("Short", ["A dog."] * 40)
    rows = report.compare([plain, short])
    (told,) = report.conclusions([plain, short], rows)
    assert told.effect == "invents less than plain decoding, but also names fewer true objects"


def test_worse_answers_are_part_of_the_conclusion():
    plain = run_of("plain", [GOOD] * 40)
    always_yes = run_of("Yes", [GOOD] * 40, answers=["yes"] * 40)
    (told,) = report.conclusions([plain, always_yes], report.compare([plain, always_yes]))
    assert told.effect.endswith("no clear effect on invention here; its yes/no answers are worse")
    assert "POPE F1 -33.3" in told.details


def test_a_handful_of_pictures_gives_no_verdict():
    plain, better = run_of("plain", [BAD] * 9), run_of("Better", [GOOD] * 9)
    rows = report.compare([plain, better])
    assert row_of(rows, "chair_s").cells[1].verdict == "too few pictures"
    (told,) = report.conclusions([plain, better], rows)
    assert told.effect == "was tried on too few pictures to tell"


def test_undefined_numbers_are_called_so():
    plain, silent = run_of("plain", ["Nothing."] * 40), run_of("Silent", ["Nothing."] * 40)
    rows = report.compare([plain, silent])
    cell = row_of(rows, "chair_i").cells[1]
    assert (cell.measure.value, cell.change.value, cell.verdict) == (None, None, "")
    assert report.change_text(row_of(rows, "chair_i"), cell) == "undefined"
    assert "undefined" in page.render(page_of([plain, silent], rows))


def test_relative_time(runs):
    assert [report.relative_time(run, runs[0]) for run in runs] == pytest.approx(
        [1.0, 1.5, 1.0, 1.0]
    )
    untimed = run_of("plain", [GOOD] * 40)
    object.__setattr__(untimed, "speed", Speed())
    assert report.relative_time(runs[1], untimed) is None


def test_many_runs_get_a_line_each_that_fits_the_terminal(runs):
    many = [*runs, *(run_of(f"Other{i}", [BAD] * 20 + [GOOD] * 20) for i in range(4))]
    rows = report.compare(many)
    console = Console(file=io.StringIO(), width=110)
    console.print(report.terminal(many, rows, "title"))
    shown = console.file.getvalue()
    assert "…" not in shown
    for label in ("plain", "Helps", "Other3"):
        (line,) = [line for line in shown.splitlines() if line.startswith(f"│ {label} ")]
        assert line.count("│") == 9
    helps = next(line for line in shown.splitlines() if "Helps" in line)
    assert "20.0 -30.0" in helps  # CHAIR_s
    assert "1.50" in helps


def test_terminal_table_shows_every_number(runs, rows):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.terminal(runs, rows, "title"))
    text = console.export_text()
    assert "CHAIR_s: captions that invent ↓" in text
    assert "50.0 [35.0, 65.0]" in text
    assert "-30.0 [" in text
    assert "Time per caption, plain = 1" in text


def test_json_form(runs, rows):
    import json

    record = report.as_json(runs, rows)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["runs"][1]["time_relative_to_plain"] == pytest.approx(1.5)
    change = record["changes"][1]["runs"]["Helps"]
    assert change["verdict"] == "better"
    assert change["interval"][1] < 0


# --- the page -------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Follows the nesting of the elements and collects attributes that could load something."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag


def check(text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert all(value.startswith("data:image/") for value in checker.loads)
    assert "script" not in checker.tags
    assert "link" not in checker.tags
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    return checker


def page_of(runs, rows, size=80):
    return page.Page(
        runs=runs,
        rows=rows,
        source="a <source> & more",
        picture=lambda image: Image.new("RGB", (size, size), (image * 6, 50, 90)),
        facts={"model": "tiny <b>"},
    )


def test_page_is_well_formed_and_self_contained(runs, rows):
    text = page.render(page_of(runs, rows))
    checker = check(text)
    assert page.GENERATOR in text[:600]
    assert "a &lt;source&gt; &amp; more" in text
    assert "tiny &lt;b&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert checker.tags.count("img") == 18  # three parts of six pictures
    assert "data:image/png;base64," in text


def test_large_pictures_become_thumbnails(runs, rows):
    text = page.render(page_of(runs, rows, size=900), per_group=1)
    check(text)
    assert "data:image/jpeg;base64," in text
    assert 'width="640"' in text


def test_gallery_shows_both_directions_and_an_unchosen_part(runs):
    parts = page.gallery_of([runs[0], runs[1], run_of("Other", [GOOD] * 39 + [BAD])], per_group=4)
    fewer, more, first = (positions for _, _, positions in parts)
    assert fewer == [8, 9, 10, 11]  # both methods dropped the zebra there
    assert more == [39]
    assert first == [0, 1, 2, 3]
    only_plain = page.gallery_of(runs[:1], per_group=4)
    assert [positions for _, _, positions in only_plain] == [[0, 1, 2, 3]]


def marked(caption, truth=("dog",)):
    result = chair.score([{"image_id": 1, "caption": caption}], {1: set(truth)})
    return page._marked(result.per_caption[0])


def test_marks():
    assert marked("A Puppy & a hot dog .") == (
        'A <mark class="good" title="dog: in the picture">Puppy</mark> &amp; a '
        '<mark class="bad" title="hot dog: invented">hot dog</mark>.'
    )


def test_marks_survive_letters_that_grow_in_lower_case():
    # "İ" becomes two characters in lower case.
    assert marked("İ İ a dog") == (
        'İ İ a <mark class="good" title="dog: in the picture">dog</mark>'
    )
