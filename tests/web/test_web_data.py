"""The data tab's steps: the same lines as `mmlm data sentinel` writes, one sentence at a time."""

import pytest
from PIL import Image

import mmlm
from data_tools.detectors.world import WorldTruth
from data_tools.generators.huggingface import HFGenerator
from data_tools.sentinel.objects.make import make_extractor
from data_tools.sentinel.pipeline import SentinelPipeline
from data_tools.sentinel.settings import SentinelSettings
from data_tools.world.export import write_split
from mmlm.errors import ImageReadError, InputError
from mmlm.show.truth import draw_scene
from mmlm.web.data_steps import DrawnScene, Upload, Watch, check

QUESTION = "describe the image ."
FEW = SentinelSettings(n=6, max_sentences=2)


@pytest.fixture(scope="module")
def embedded():
    return mmlm.load("embedded")


@pytest.fixture
def begin(embedded):
    """Watches; closed at the end of the test."""
    open_ones = []

    def begin(subject, settings=FEW, question=QUESTION):
        open_ones.append(Watch(subject, question, settings, *embedded))
        return open_ones[-1]

    yield begin
    for watch in open_ones:
        watch.close()


def run(watch):
    while not watch.complete:
        watch.step()
    return watch


def test_every_step_adds_a_sentence_with_its_candidates(begin):
    watch = begin(DrawnScene(17))
    assert (watch.image, watch.pairs, watch.complete) == ({}, [], False)
    for number in (1, 2):
        watch.step()
        assert len(watch.image["steps"]) == watch.image["n_sentences"] == number
        assert sum(one["drawn"] for one in watch.image["steps"][-1]["candidates"]) <= 6
        assert watch.complete is (number == 2)
    before = watch.image
    watch.step()
    assert watch.image == before


def test_the_lines_are_those_of_the_command(begin, embedded, tmp_path):
    watch = run(begin(DrawnScene(17)))
    write_split(tmp_path / "world", "natural", 18, progress=False)
    pipeline = SentinelPipeline(
        HFGenerator(*embedded, max_new_tokens=64),
        make_extractor(),
        [WorldTruth()],
        FEW,
        folder=tmp_path,
    )
    record = {"id": "picture", "image": "world/images/000018.png", "question": QUESTION}
    (outcome,) = pipeline.process([record])
    assert watch.image == outcome.lines["images"][0]
    assert watch.pairs == outcome.lines["pairs"]
    assert len(watch.pairs) >= 1


def test_a_drawn_scene_is_the_one_of_the_compare_tab(begin):
    watch = begin(DrawnScene(5))
    watch.step()
    shown = Image.open(watch.folder / watch.image["path"])
    assert shown.tobytes() == draw_scene(index=5).image.tobytes()


def test_detectors_that_err_make_objects_uncertain(begin):
    assert begin(DrawnScene(17)).detectors == ("WorldTruth",)
    watch = run(begin(DrawnScene(17, errors=0.4), SentinelSettings(n=10, max_sentences=4)))
    assert watch.detectors == ("WorldTruth-1", "WorldTruth-2")
    assert watch.image["uncertain"]


def test_an_upload_is_judged_by_what_its_owner_sees(begin, tmp_path):
    drawn = draw_scene(index=17)
    drawn.image.save(tmp_path / "mine.png")
    seen = tuple(sorted(drawn.known.objects))
    watch = run(begin(Upload(tmp_path / "mine.png", seen)))
    assert watch.detectors == ("you",)
    assert set(watch.image["factual"]) <= set(seen)
    assert not set(watch.image["hallucinated"]) & set(seen)


def test_the_playgrounds_detector_and_the_visitor_must_agree(begin, tmp_path):
    draw_scene(index=17).image.save(tmp_path / "mine.png")

    class Blind(WorldTruth):
        def detect(self, picture, names):
            from data_tools.detectors import Finding

            return {name: Finding(False) for name in names}

    seen = tuple(sorted(draw_scene(index=17).known.objects))
    watch = run(begin(Upload(tmp_path / "mine.png", seen, Blind())))
    assert watch.detectors == ("you", "WorldTruth")
    assert not watch.image["factual"]
    assert watch.image["uncertain"]


def test_a_broken_picture_is_told_at_the_first_step(begin, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    watch = begin(Upload(tmp_path / "broken.png", ("dog",)))
    with pytest.raises(ImageReadError, match=r"broken\.png"):
        watch.step()


def test_closing_leaves_nothing_behind(embedded):
    watch = Watch(DrawnScene(3), QUESTION, FEW, *embedded)
    watch.step()
    assert watch.folder.is_dir()
    watch.close()
    assert not watch.folder.exists()
    assert watch.complete
    watch.step()  # a late click does nothing
    watch.close()


def test_a_refusal_leaves_nothing_behind(embedded, monkeypatch):
    folders = []
    monkeypatch.setattr(DrawnScene, "place", lambda self, folder: folders.append(folder) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Watch(DrawnScene(3), QUESTION, FEW, *embedded)
    assert not folders[0].exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DrawnScene(-1), "scene is -1"),
        (lambda: DrawnScene(0, 0.7), "errors are 0.7"),
        (lambda: Upload("x.png"), "Nobody says"),
        (lambda: check("  ", FEW), "question is empty"),
        (lambda: check(QUESTION, SentinelSettings(n=21)), "n is 21"),
        (lambda: check(QUESTION, SentinelSettings(max_sentences=17)), "max_sentences is 17"),
    ],
)
def test_what_cannot_be_watched_is_refused_with_advice(make, words):
    with pytest.raises(InputError, match=words) as caught:
        make()
    assert caught.value.advice
