"""The tasks: published examples, splits, pictures that show what the parameters say."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_tools.micl import TASKS, drawing, episodes
from data_tools.micl.clock import Clock
from data_tools.micl.operators import Operator
from data_tools.micl.sudoku import Sudoku


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    ("task", "params", "latent", "answer"),
    [
        # The examples that were read off the paper's figures.
        ("operator", {"a": 0, "b": 1}, "x", "0"),
        ("operator", {"a": 2, "b": 6}, "x", "12"),
        ("operator", {"a": 1, "b": 8}, "x", "8"),
        ("operator", {"a": 9, "b": 4}, "-", "5"),
        ("clock", {"p": 3, "q": 11}, "+", "14"),
        ("clock", {"p": 1, "q": 2}, "+", "3"),
        ("clock", {"p": 8, "q": 12}, "+", "20"),
        ("clock", {"p": 6, "q": 4}, "x", "24"),
        ("outlier", {"odd_colour": "red", "odd_shape": "star"}, "colour", "red"),
        ("outlier", {"odd_colour": "red", "odd_shape": "star"}, "shape", "star"),
        ("sudoku", {"n": 916, "missing": [2]}, "rule", "918"),
        ("sudoku", {"n": 216, "missing": [1]}, "rule", "217"),
        ("sudoku", {"n": 468, "missing": [2]}, "rule", "470"),
        ("sudoku", {"n": 448, "missing": [1]}, "rule", "449"),
        # Three rows: 387 _ 389 / 388 _ 392 / _ 392 395.
        ("sudoku", {"n": 387, "missing": [1, 1, 0]}, "rule", "388, 390, 389"),
        ("palindrome", {"digits": [7, 8, 9]}, "rule", "7"),
        ("palindrome", {"digits": [9, 4, 2]}, "rule", "9"),
        ("palindrome", {"digits": [9, 6, 6]}, "rule", "9"),
        ("character", {"identity": 3}, '{"3": "Flora", "9": "Walter"}', "Flora"),
    ],
)
def test_the_published_examples(task, params, latent, answer):
    assert TASKS[task].answer(params, latent) == answer


def test_counts_by_hand():
    objects = [
        {"shape": "circle", "colour": "red", "size": "small"},
        {"shape": "circle", "colour": "blue", "size": "large"},
        {"shape": "square", "colour": "red", "size": "small"},
    ]
    task = TASKS["count"]
    found = {latent: task.answer({"objects": objects}, latent) for latent in task.latents(rng())}
    assert (found["shape=circle"], found["colour=red"], found["size=large"]) == ("2", "2", "1")
    assert found["colour=green"] == "0"
    assert not task.allows({"objects": objects}, "colour=green")
    assert not task.allows({"objects": objects[:1] * 7}, "colour=red")


@pytest.mark.parametrize(
    ("task", "counts"), [(Operator(), (40, 60)), (Clock(), (40, 92))], ids=["operator", "clock"]
)
def test_support_and_query_pairs_are_disjoint_and_complete(task, counts):
    numbers = rng()
    seen = [
        {tuple(task.item(numbers, split).values()) for _ in range(3000)}
        for split in ("support", "query")
    ]
    assert tuple(map(len, seen)) == counts
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("name", ["sudoku", "palindrome"])
def test_no_item_of_a_pattern_task_is_in_both_splits(name):
    numbers, key = rng(), {"sudoku": "n", "palindrome": "digits"}[name]
    seen = [
        {str(TASKS[name].item(numbers, split)[key]) for _ in range(400)}
        for split in ("support", "query")
    ]
    assert not seen[0] & seen[1]


@pytest.mark.parametrize("name", TASKS)
def test_pictures_are_the_same_for_the_same_parameters_and_others_for_others(name):
    task, numbers = TASKS[name], rng(4)
    first, second = task.item(numbers, "query"), task.item(numbers, "query")
    assert task.draw(first).tobytes() == task.draw(first).tobytes()
    assert task.draw(first).tobytes() != task.draw(second).tobytes()
    assert task.draw(first).size == ((420, 120) if name == "palindrome" else (336, 336))


def share(picture: Image.Image, colour) -> float:
    return float((np.asarray(picture) == colour).all(axis=2).mean())


def test_clock_hands_point_where_the_parameters_say():
    picture = np.asarray(Clock().draw({"p": 3, "q": 9})).astype(int)
    blue = picture[:, :, 2] - picture[:, :, 0] > 80
    red = picture[:, :, 0] - picture[:, :, 2] > 80
    assert blue[168, 168:].sum() > 60  # to the right: three o'clock
    assert not blue[168, :150].any()
    assert red[168, :168].sum() > 80  # to the left, and longer
    assert blue[:, 200].sum() > red[:, 136].sum()  # the blue hand is the thicker one
    upright = np.asarray(Clock().draw({"p": 12, "q": 6})).astype(int)
    blue = upright[:, :, 2] - upright[:, :, 0] > 80
    assert blue[100:168, 168].all()  # twelve is at the top
    assert not blue[200:, 168].any()


def test_nothing_is_subtracted_below_zero():
    asked = [one for one in episodes(Operator(), 4, 60, seed=0) if one.latent == "-"]
    assert len(asked) > 10
    for one in asked:
        assert all(int(shown.answer) >= 0 for shown in [*one.demos, one.query])


def test_the_odd_shapes_are_drawn_once_each():
    params = {
        "shape": "square",
        "colour": "green",
        "odd_shape": "circle",
        "odd_colour": "red",
        "count": 8,
        "place_of_odd_colour": 1,
        "place_of_odd_shape": 6,
    }
    picture = TASKS["outlier"].draw(params)
    red, green = share(picture, (214, 39, 40)), share(picture, (30, 140, 50))
    assert 5.5 < green / red < 8  # six squares and a larger circle against one square
    plain = TASKS["outlier"].draw(params | {"place_of_odd_shape": -1})
    changed = np.argwhere((np.asarray(picture) != np.asarray(plain)).any(axis=2))
    # Only the second cell of the second row.
    assert 67 <= changed[:, 1].min() <= changed[:, 1].max() <= 135
    assert changed[:, 0].min() > 168


@pytest.mark.parametrize("missing", [1, 2])
def test_the_missing_cell_of_a_sudoku_is_empty(missing):
    picture = np.asarray(Sudoku().draw({"n": 500, "missing": [missing]}))
    row, column = divmod(missing, 2)
    inside = [slice(20 + 160 * place, 150 + 160 * place) for place in (row, column)]
    assert (picture[inside[0], inside[1]] == 255).all()
    assert (picture[20:150, 20:150] != 255).any()


def test_the_harder_sudoku_counts_in_steps_of_its_row():
    rows = [[387, None, 389], [388, None, 392], [None, 392, 395]]  # the published example
    expected = drawing.blank()
    canvas = ImageDraw.Draw(expected)
    cell = 320 / 3
    for row, numbers in enumerate(rows):
        for column, number in enumerate(numbers):
            left, top = 8 + column * cell, 8 + row * cell
            canvas.rectangle([left, top, left + cell, top + cell], None, (0, 0, 0), 3)
            if number:
                at = (left + cell / 2, top + cell / 2)
                drawing.text(canvas, at, str(number), int(cell / 2.6))
    drawn = Sudoku(hard=True).draw({"n": 387, "missing": [1, 1, 0]})
    assert drawn.tobytes() == expected.tobytes()


def test_a_palindrome_shows_its_second_half_without_the_answer():
    picture = TASKS["palindrome"].draw({"digits": [7, 8, 9], "colours": ["black"] * 5})
    cells = [np.asarray(picture)[:, 70 * place + 5 : 70 * place + 65] for place in range(6)]
    assert (cells[2] == cells[3]).all()
    assert (cells[1] == cells[4]).all()
    assert not (cells[0] == cells[5]).all()


def test_forty_faces_differ():
    draw = TASKS["character"].draw
    base = {"scale": 1.0, "tilt": 0.0, "x": 50, "y": 50, "noise": 1}
    faces = {draw({"identity": number, **base}).tobytes() for number in range(40)}
    assert len(faces) == 40


def test_only_sudoku_has_a_harder_form():
    assert Sudoku(hard=True).item(rng(), "query")["missing"].__len__() == 3
    with pytest.raises(ValueError, match="no harder form"):
        Clock(hard=True)
