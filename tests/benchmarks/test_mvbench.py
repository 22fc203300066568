"""MVBench: which frames of a clip are shown, and the accuracies of the answers."""

import multi_image_data as data
import pytest
from multi_image_data import answered
from PIL import Image

from benchmarks.multi_image import frames, mvbench
from benchmarks.multi_image.rows import Pictures
from mmlm.errors import InputError


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path / "kept")


def test_mvbench_questions_frames_and_scores(tmp_path):
    pictures = Pictures(tmp_path / "kept", tmp_path / "video")
    path = data.mvbench(tmp_path)
    episodic, odd = mvbench.read_questions(path, pictures, frames=2)
    assert episodic.prompt == (
        "Question:What happens?\nOption:\n(A) it falls\n(B) it flies\n(C) it rests\n"
        "Only give the best option.\n"
    )
    # Seconds 0 to 2 at three frames a second are frames 1 to 6; the middles of two halves.
    assert [path.name for path in episodic.pictures] == ["00002.jpg", "00004.jpg"]
    assert [Image.open(path).size for path in odd.pictures] == [(20, 10), (20, 10)]
    assert (episodic.label, odd.label) == ("B", "C")
    task = mvbench.task([episodic, odd])
    assert task.metric == "mvbench/train/2-frames/first-letter"
    lines = answered(task, "(B) it flies", "")
    scores = mvbench.score_stored(lines)
    assert scores.metrics["mean_accuracy"] == 0.5
    assert scores.official == {"mvbench_accuracy": 100.0}  # empty replies are not counted there
    assert scores.statuses["no option"] == 1
    by_word = answered(task, "Best: b", "option C")
    assert mvbench.score_stored(by_word).metrics["accuracy"] == 0.5  # "Best" begins with B
    assert mvbench.score_stored(by_word, "lmms-eval").metrics["accuracy"] == 1.0
    lines[0]["frames"] = 16
    with pytest.raises(InputError, match="runs with 16, 2 frames"):
        mvbench.score_stored(lines)


def test_mvbench_frames_are_written_once(tmp_path, monkeypatch):
    path = data.mvbench(tmp_path)
    pictures = Pictures(tmp_path / "kept", tmp_path / "video")
    first = mvbench.read_questions(path, pictures, frames=3)
    monkeypatch.setattr(frames, "_open", lambda clip: pytest.fail("decoded again"))
    assert mvbench.read_questions(path, pictures, frames=3) == first


def test_mvbench_files_that_cannot_be_used(tmp_path, pictures):
    path = data.mvbench(tmp_path)
    pictures = Pictures(tmp_path / "kept", tmp_path / "json")  # no clips there
    mvbench.read_questions(path, pictures)
    with pytest.raises(InputError, match="2 pictures are missing"):
        pictures.check()
    (path / "other.json").write_text((path / "unexpected_action.json").read_text())
    with pytest.raises(InputError, match="named after no task"):
        mvbench.read_questions(path, pictures)


def test_of_several_clips_the_one_of_the_tasks_source_is_taken(tmp_path):
    found = {"a.mp4": [tmp_path / "sta" / "a.mp4", tmp_path / "star" / "cut" / "a.mp4"]}
    assert mvbench._find(found, "action_sequence", "a.mp4") == found["a.mp4"][1]
    assert mvbench._find(found, "action_localization", "a.mp4") == found["a.mp4"][0]
    assert mvbench._find(found, "action_localization", "b.mp4") is None
    found["a.mp4"].reverse()  # "star" begins with "sta", and comes first now
    assert mvbench._find(found, "action_localization", "a.mp4") == tmp_path / "sta" / "a.mp4"


@pytest.mark.parametrize(
    ("count", "last", "bounds", "wanted"),
    [
        (4, 99, None, [12, 37, 62, 86]),  # 49.5 rounds to the even 50
        (2, 99, (1.0, 3.0), [15, 25]),
        (3, 1, None, [0, 0, 1]),
        (2, 99, (50.0, 60.0), [99, 99]),  # behind the end
    ],
)
def test_positions_of_frames(count, last, bounds, wanted):
    assert frames.positions(count, last, 10.0, bounds) == wanted


def test_video_is_read_with_opencv(tmp_path, pictures):
    import cv2
    import numpy as np

    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (32, 32))
    for level in range(0, 250, 25):
        writer.write(np.full((32, 32, 3), level, np.uint8))
    writer.release()
    found = frames.frame_files(path, 2, None, pictures)
    levels = [int(np.asarray(Image.open(one)).mean().round()) for one in found]
    assert levels == [pytest.approx(50, abs=4), pytest.approx(150, abs=4)]
    path.write_bytes(b"no video")
    with pytest.raises(InputError, match="cannot be read"):
        frames.frame_files(path, 2, None, pictures)


def test_video_without_a_decoder(tmp_path, pictures, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"x")
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="Nothing is installed"):
        frames.frame_files(tmp_path / "clip.mp4", 2, None, pictures)
