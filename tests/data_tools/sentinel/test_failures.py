"""The table of failures, a test per row, and pictures of every kind."""

import errno
import io
import logging

import pytest
from PIL import Image
from tiny import picture

from data_tools import records as stage_records
from data_tools.detectors.scripted import ScriptedDetector
from data_tools.generators.scripted import ScriptedGenerator
from data_tools.records import StageOutput
from data_tools.sentinel.pipeline import SentinelPipeline
from data_tools.sentinel.settings import SentinelSettings
from data_tools.stages import run_stage
from mmlm.errors import ImageReadError, InputError

CAPTION = ["A DOG sits.", "A CAT sits.", "The DOG runs.", "The CAT runs."]


@pytest.fixture
def one(marked, records, tmp_path):
    """Describes one picture, which holds a dog, and gives status, pairs and audit line."""

    def run(script, *detectors, found=("dog",), **settings):
        if not callable(script):
            script = {("000", context): answer for context, answer in script.items()}
        detectors = detectors or (
            ScriptedDetector(findings={"000": found}, name="a"),
            ScriptedDetector(findings={"000": found}, name="b"),
        )
        pipeline = SentinelPipeline(
            ScriptedGenerator(script),
            marked,
            detectors,
            SentinelSettings(**{"n": 4, "max_sentences": 3, **settings}),
            folder=tmp_path,
        )
        (outcome,) = pipeline.process(records(1))
        (image,) = outcome.lines["images"]
        assert outcome.status == image["status"]
        return outcome.status, outcome.lines["pairs"], image

    return run


def caption(identifier, context, seed):
    return CAPTION


# Pictures.


def encoded(kind, image, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg():
    return encoded("JPEG", picture(0, (64, 64)))


UNREADABLE = {
    "missing": None,
    "empty": b"",
    "no picture": b"not a picture at all",
    "truncated": jpeg()[:-200],
    "damaged": encoded("PNG", picture(0, (64, 64)))[:60] + b"\0" * 400,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_acceptance_8_unreadable_pictures(kind, talking, records, run, tmp_path, caplog):
    rows = records(3)
    path = tmp_path / "001.png"
    path.unlink()
    if UNREADABLE[kind] is not None:
        path.write_bytes(UNREADABLE[kind])
    with caplog.at_level(logging.WARNING):
        statuses, output = run(talking(folder=tmp_path), rows)
    assert statuses["unreadable_image"] == 1
    assert statuses.total() == 3  # the run goes on
    assert [str(path) in message for message in caplog.messages] == [True]
    lines = {line["image_id"]: line for line in output.lines("images")}
    assert str(path) in lines["001"]["error"]
    assert lines["001"]["path"] == "001.png"
    assert lines["000"]["status"] != "unreadable_image" != lines["002"]["status"]


def test_a_picture_that_is_too_large(talking, records, run, tmp_path, monkeypatch):
    monkeypatch.setattr("mmlm.inputs.load_image.__defaults__", (63,))
    statuses, output = run(talking(folder=tmp_path), records(1))
    assert statuses == {"unreadable_image": 1}
    assert "too large" in output.lines("images")[0]["error"]


def test_strict_stops_at_the_first_unreadable_picture(talking, records, run, tmp_path):
    rows = records(3)
    (tmp_path / "001.png").write_bytes(b"")
    with pytest.raises(ImageReadError, match=r"001\.png"):
        run(talking(folder=tmp_path, strict=True, images_at_once=1), rows)


@pytest.mark.parametrize("kind", ["grey", "cmyk", "rotated", "one pixel", "palette"])
def test_acceptance_8_odd_pictures_are_read(kind, talking, run, tmp_path):
    odd = {
        "grey": picture(0, (20, 10)).convert("L"),
        "cmyk": picture(0, (20, 10)).convert("CMYK"),
        "rotated": picture(0, (20, 10)),
        "one pixel": picture(0, (1, 1)),
        "palette": picture(0, (20, 10)).convert("P"),
    }[kind]
    exif = Image.Exif()
    if kind == "rotated":
        exif[0x0112] = 6
    path = tmp_path / ("odd.png" if kind == "palette" else "odd.jpg")
    odd.save(path, exif=exif)
    pipeline = talking(folder=tmp_path)
    row = {"id": "odd", "image": path.name, "question": "describe"}
    statuses, _ = run(pipeline, [row])
    assert "unreadable_image" not in statuses
    shown = pipeline._generator.calls[0][0].picture.image
    assert shown.mode == "RGB"
    expected = {"one pixel": (1, 1), "rotated": (10, 20)}.get(kind, (20, 10))
    assert shown.size == expected


# Sentences.


def test_a_sentence_without_objects_is_unused_and_may_extend_the_context(one):
    script = {"": ["It is nice.", "How nice.", "A CAT.", "A CAT!"], "How nice.": ["A DOG."] * 4}
    _, _, image = one(script, max_sentences=2)
    assert [c["class"] for c in image["steps"][0]["candidates"]] == [
        "objectless", "objectless", "hallucinated", "hallucinated",
    ]  # fmt: skip
    assert image["caption"] in ("It is nice.", "How nice. A DOG.")
    _, pairs, image = one(script, allow_objectless_context=False)
    assert (image["caption"], pairs) == ("", [])


def test_no_object_in_any_sentence(one):
    status, pairs, image = one(lambda *_: ["How nice.", "Good.", "", "Good."])
    assert (status, pairs, image["n_sentences"]) == ("no_objects", [], 3)


def test_a_caption_that_ends_at_once(one):
    status, _, image = one({})
    assert (status, image["n_sentences"]) == ("no_objects", 0)


def test_nothing_to_pair(one):
    status, pairs, image = one(lambda *_: ["A DOG.", "The DOG.", "A DOG!", "DOG."])
    assert (status, pairs, image["n_sentences"]) == ("no_pairs", [], 3)


def test_less_than_two_candidates_extend_the_context_without_a_pair(one):
    status, pairs, image = one(lambda *_: ["A DOG."] * 4)
    assert (status, pairs, image["n_sentences"]) == ("no_pairs", [], 3)


def test_only_hallucinated_candidates_end_the_picture(one):
    script = {"": ["A DOG."] * 4, "A DOG.": ["A CAT.", "The CAT.", "CAT.", "CAT!"]}
    _, pairs, image = one(script)
    assert (image["caption"], pairs) == ("A DOG.", [])
    assert image["steps"][-1]["next"] is None
    _, _, image = one(script, next_sentence="authors")
    assert image["n_sentences"] == 2


def test_repeated_samples_end_a_caption_only_for_the_authors(one):
    _, _, image = one(lambda *_: ["A DOG."] * 4, finish_rule="authors")
    assert image["n_sentences"] == 0


def test_equal_pairs_are_dropped_and_counted(one):
    """Two sentences that differ in capitals only, which decide what counts as an object here."""
    script = {
        "": ["A DOG."] * 4,
        "A DOG.": ["A DOG sees a cat.", "A DOG sees  a CAT.", "The DOG.", "A CAT."],
    }
    _, pairs, image = one(script, max_sentences=2)
    assert image["counts"]["dropped_equal"] == 1
    # The other pair keeps its partners: the i-th stays with the i-th.
    assert [(p["id"], p["chosen"], p["rejected"]) for p in pairs] == [
        ("000-1-0", "The DOG.", "A CAT."),
    ]
    chosen = [c.get("chosen") for c in image["steps"][1]["candidates"]]
    assert chosen == [None, None, [0], None]


def test_sentences_in_a_language_that_the_extractor_does_not_know(
    talking, records, run, tmp_path, caplog
):
    pipeline = talking(folder=tmp_path, settings=SentinelSettings(max_sentences=1, n=2))
    pipeline._generator = ScriptedGenerator(lambda *_: ["Ein Hund.", "Eine Katze."])
    with caplog.at_level(logging.WARNING):
        run(pipeline, [{**records(1)[0], "id": str(n)} for n in range(100)])
    (message,) = caplog.messages
    assert "100% of the sentences" in message


# Detectors.


def test_a_detector_that_finds_nothing_rejects_everything(one):
    nothing = ScriptedDetector(findings={}, name="a")
    status, _, image = one(caption, nothing, ScriptedDetector(findings={"000": ["dog"]}, name="b"))
    assert status == "ok" or image["uncertain"] == ["dog"]
    assert image["hallucinated"] == ["cat"]
    assert "error" not in image


def test_no_detector_finds_anything(one):
    """Their pairs, possible where the empty context may have some, are withheld."""
    status, pairs, image = one(caption, found=())
    assert (status, pairs) == ("suspicious_image", [])
    assert image["hallucinated"] == ["cat", "dog"]


def test_pairs_of_a_suspicious_picture_are_withheld_unless_kept(one):
    """A closed detector that rejects all it knows; the authors' rule accepts the rest."""
    closed = ScriptedDetector(findings={}, vocabulary=frozenset({"cat"}), name="closed")
    status, pairs, image = one(caption, closed)
    assert (status, pairs) == ("suspicious_image", [])
    assert image["factual"] == ["dog"]
    assert image["counts"]["withheld_pairs"] > 0
    status, pairs, image = one(caption, closed, keep_suspicious=True)
    assert len(pairs) > 0
    assert "withheld_pairs" not in image["counts"]


def test_a_detector_that_raises(one):
    good = ScriptedDetector(findings={"000": ["dog"]}, name="good")
    bad = ScriptedDetector(findings={}, name="bad", fail_on=["000"])
    status, pairs, image = one(caption, good, bad)
    assert (status, pairs) == ("skipped_uncertain", [])
    assert image["uncertain"] == ["cat", "dog"]
    assert image["counts"]["detector_failures"] == 2
    assert image["error"].startswith("bad: RuntimeError: scripted failure")
    # All names, then each half once; a name that was asked is not asked again.
    assert bad.calls == [("000", ("dog", "cat")), ("000", ("dog",)), ("000", ("cat",))]


def test_a_detector_that_runs_out_of_memory_is_asked_in_halves(one):
    small = ScriptedDetector(findings={"000": ["dog"]}, name="small", memory={"000": 1})
    status, pairs, image = one(caption, small)
    assert status == "ok"
    assert len(pairs) > 0
    assert "detector_failures" not in image["counts"]
    assert "error" not in image


def test_a_failure_concerns_the_names_it_fell_on(one):
    class Picky(ScriptedDetector):
        def detect(self, picture, names):
            if "cat" in names:
                raise ValueError("no cats")
            return super().detect(picture, names)

    _, _, image = one(caption, Picky(findings={"000": ["dog"]}))
    assert image["factual"] == ["dog"]
    assert image["uncertain"] == ["cat"]
    assert image["counts"]["detector_failures"] == 1


@pytest.mark.parametrize("error", [TypeError("bug"), OSError(errno.ENOSPC, "No space left")])
def test_what_concerns_every_picture_ends_the_run(one, error):
    class Broken(ScriptedDetector):
        def detect(self, picture, names):
            raise error

    with pytest.raises(type(error)):
        one(caption, Broken(findings={}))


def test_long_lists_of_names_reach_the_detector_whole(one):
    words = ["".join("ABCDEFGHIJ"[int(d)] for d in f"{n:03d}") for n in range(300)]
    detector = ScriptedDetector(findings={"000": [word.lower() for word in words]})
    sentences = [f"See {' and '.join(words)}.", "A DOG.", "A CAT.", "One."]
    _, _, image = one(lambda *_: sentences, detector, max_sentences=1)
    assert len(detector.calls[0][1]) == 302
    assert len(image["factual"]) == 300


# Settings, output.


def test_settings_that_make_no_sense_name_the_field(marked):
    with pytest.raises(ValueError, match="n must be at least 2"):
        SentinelSettings(n=1)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        SentinelSettings(temperature=-1)
    with pytest.raises(ValueError, match="cross_check must be one of both, vote, single:a"):
        SentinelPipeline(
            ScriptedGenerator({}),
            marked,
            [ScriptedDetector(findings={}, name="a")],
            SentinelSettings(cross_check="single:z"),
        )


def test_the_output_of_another_run_is_refused(talking, records, tmp_path):
    rows, folder = records(2), tmp_path / "out"
    stage = talking(folder=tmp_path)
    run_stage(stage, rows, StageOutput(folder, {"seed": 0}, stage.kinds))
    before = (folder / "pairs.jsonl").read_bytes()
    with pytest.raises(InputError, match="seed was 0, now 1") as refused:
        StageOutput(folder, {"seed": 1}, stage.kinds)
    assert "--overwrite" in refused.value.advice
    assert "--resume_anyway" in refused.value.advice
    assert (folder / "pairs.jsonl").read_bytes() == before
    run_stage(stage, records(3), StageOutput(folder, {"seed": 1}, stage.kinds, resume_anyway=True))
    assert (folder / "pairs.jsonl").read_bytes().startswith(before)


def test_a_full_disk_stops_the_run_which_goes_on_later(
    talking, records, run, tmp_path, monkeypatch
):
    rows = records(12)
    _, whole = run(talking(folder=tmp_path), rows)
    append, room = stage_records.append_lines, [9]

    def full(stream, lines):
        if not room[0]:
            stream.write(b'{"half a li')  # as much as there was room for
            stream.flush()
            raise OSError(errno.ENOSPC, "No space left on device", stream.name)
        room[0] -= 1
        append(stream, lines)

    monkeypatch.setattr(stage_records, "append_lines", full)
    folder = tmp_path / "full"
    with pytest.raises(OSError, match="No space left on device"):
        run(talking(folder=tmp_path), rows, folder=folder)
    monkeypatch.undo()
    done = (folder / "done.jsonl").read_text().count("\n")
    assert 0 < done < 12
    run(talking(folder=tmp_path), rows, folder=folder)
    for kind in ("pairs", "images"):
        lines = [sorted((f / f"{kind}.jsonl").read_bytes().splitlines()) for f in (
            folder, whole.folder)]  # fmt: skip
        assert lines[0] == lines[1]
