"""Draws docs/images/micl.png: one episode of every task with its answers.

Usage: python tools/micl_picture.py
"""

from pathlib import Path

from PIL import Image, ImageDraw

from data_tools.micl import TASKS, drawing
from data_tools.micl.episodes import episode

TARGET = Path(__file__).parents[1] / "docs" / "images" / "micl.png"
CELL, LINE, TITLE, GAP = 132, 26, 120, 10
SHOTS = 4


def main() -> None:
    """Draws and writes the picture."""
    row_height = CELL + LINE + GAP
    size = (TITLE + (SHOTS + 1) * (CELL + GAP) + GAP, len(TASKS) * row_height + GAP)
    sheet = Image.new("RGB", size, "#f4f4f2")
    canvas = ImageDraw.Draw(sheet)
    for row, task in enumerate(TASKS.values()):
        top = GAP + row * row_height
        shown = episode(task, SHOTS, seed=0, number=4)
        drawing.text(canvas, (TITLE / 2, top + CELL / 2), task.name, 20)
        for column, one in enumerate([*shown.demos, shown.query]):
            left = TITLE + column * (CELL + GAP)
            picture = task.draw(one.params)
            picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            at = (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2)
            sheet.paste(picture, at)
            query = column == SHOTS
            words = f"? ({one.answer})" if query else one.answer
            colour = (170, 60, 20) if query else (40, 40, 40)
            drawing.text(canvas, (left + CELL / 2, top + CELL + LINE / 2), words, 18, colour)
    TARGET.parent.mkdir(exist_ok=True)
    sheet.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
