"""A contact sheet: examples as a picture, to see at a glance what a run is made of.

Every card shows what the model is shown, the target outlined, and what was asked and answered.
Drawn with Pillow alone; the same lines give the same pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from data_tools.mia.layouts import label_font
from data_tools.mia.records import GRID, PIP, SEQUENCE, locate, shuffled
from mmlm.inputs import load_image

__all__ = ["pick", "sheet"]

CARD, PICTURES, GAP, PAD = 620, 330, 24, 20
"""Width of a card, height of its pictures, space between cards and within them, in pixels."""
INK, MUTED, PAPER, GROUND = "#1d2129", "#6b7280", "#ffffff", "#eceef1"
TARGET, CHOSEN, REJECTED = "#e8590c", "#2b8a3e", "#c92a2a"
OUTLINE = 5
TITLE, TEXT = 20, 17
MAX_LINES = 4
NAMES = {SEQUENCE: "sequence", GRID: "grid", PIP: "picture in picture"}


def pick(lines: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Examples for a sheet: every format and every number of pictures before any comes again.

    Args:
        lines: Instructions or pairs.
        count: How many.
    """
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for line in shuffled(lines, 0):  # neighbours in a file often share their picture
        groups.setdefault((line["format"], line["n_images"]), []).append(line)
    order = [groups[key] for key in sorted(groups, key=lambda key: (key[1], key[0]))]
    longest = max((len(group) for group in order), default=0)
    rounds = [group[i] for i in range(longest) for group in order if i < len(group)]
    return rounds[:count]


def sheet(lines: Sequence[Mapping[str, Any]], root: Path, *, columns: int = 2) -> Image.Image:
    """Draws cards in columns.

    Args:
        lines: Instructions, or pairs with the ``tiles`` of their instruction.
        root: OUT.
        columns: Cards beside each other; >= 1.

    Returns:
        The sheet.

    Raises:
        ImageReadError: If a picture is missing or damaged.
    """
    cards = [_card(line, root) for line in lines]
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    heights = [max(card.height for card in row) for row in rows]
    width = columns * CARD + (columns + 1) * GAP
    canvas = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1)), GROUND)
    y = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, card in enumerate(row):
            x = GAP + column * (CARD + GAP)
            canvas.paste(PAPER, (x, y, x + CARD, y + height))
            canvas.paste(card, (x, y))
        y += height + GAP
    return canvas


def _card(line: Mapping[str, Any], root: Path) -> Image.Image:
    shown = _shown(line, root)
    paragraphs = list(_paragraphs(line))
    height = PAD + TITLE + PAD + shown.height + PAD
    height += sum(len(_wrapped(text, CARD - 2 * PAD)) * (TEXT + 8) + 8 for text, _ in paragraphs)
    card = Image.new("RGB", (CARD, height + PAD // 2), PAPER)
    draw = ImageDraw.Draw(card)
    title = f"{NAMES[line['format']]} of {line['n_images']}"
    draw.text((PAD, PAD - 4), title, fill=INK, font=label_font(TITLE))
    draw.text((CARD - PAD, PAD - 2), str(line["id"]), fill=MUTED, font=label_font(14), anchor="ra")
    y = PAD + TITLE + PAD
    card.paste(shown, ((CARD - shown.width) // 2, y))
    y += shown.height + PAD
    for text, colour in paragraphs:
        for row in _wrapped(text, CARD - 2 * PAD):
            draw.text((PAD, y), row, fill=colour, font=label_font(TEXT))
            y += TEXT + 8
        y += 8
    return card


def _shown(line: Mapping[str, Any], root: Path) -> Image.Image:
    """What the model is shown, scaled to the card, the target outlined."""
    pictures = [load_image(locate(root, path)) for path in line["images"]]
    target = line["target_index"] - 1
    if line["format"] != SEQUENCE:
        (picture,) = pictures
        scale = min((CARD - 2 * PAD) / picture.width, PICTURES / picture.height)
        shown = _scaled(picture, scale)
        if line.get("tiles"):
            _outline(shown, [round(scale * side) for side in line["tiles"][target]])
        return shown
    return _strip(pictures, target)


def _strip(pictures: Sequence[Image.Image], target: int) -> Image.Image:
    """The pictures of a sequence beside each other, equally high, their names above."""
    room = CARD - 2 * PAD - GAP // 2 * (len(pictures) - 1)
    height = room / sum(picture.width / picture.height for picture in pictures)
    scaled = [_scaled(one, min(height, PICTURES - 28) / one.height) for one in pictures]
    width = sum(one.width for one in scaled) + GAP // 2 * (len(pictures) - 1)
    strip = Image.new("RGB", (width, max(one.height for one in scaled) + 28), PAPER)
    x = 0
    for number, one in enumerate(scaled):
        strip.paste(one, (x, 28))
        colour = TARGET if number == target else MUTED
        ImageDraw.Draw(strip).text((x, 2), f"Image{number + 1}", fill=colour, font=label_font(17))
        if number == target:
            _outline(strip, [x, 28, x + one.width, 28 + one.height])
        x += one.width + GAP // 2
    return strip


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    size = max(1, int(picture.width * scale)), max(1, int(picture.height * scale))
    # Small pictures are made of few pixels on purpose; blurring them would hide that.
    how = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    return picture.resize(size, how)


def _outline(image: Image.Image, box: Sequence[int]) -> None:
    x0, y0, x1, y1 = box
    inside = (x0, y0, min(x1, image.width) - 1, min(y1, image.height) - 1)
    ImageDraw.Draw(image).rectangle(inside, outline=TARGET, width=OUTLINE)


def _paragraphs(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    segments = line.get("prompt_segments") or line["prompt"]
    prompt = "".join(" [image] " if one["type"] == "image" else one["text"] for one in segments)
    answers = [(f"Chosen: {line.get('chosen') or line.get('answer')}", CHOSEN)]
    if "rejected" in line:
        answers.append((f"Rejected: {line['rejected']}", REJECTED))
        ratio = "none" if line["ratio"] is None else f"{line['ratio']:.2f}"
        perplexity = "none" if line["ppl"] is None else f"{line['ppl']:.2f}"
        answers.append((f"attention on the target {ratio}, perplexity {perplexity}", MUTED))
    return [(" ".join(prompt.split()), INK), *answers]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that fit; what exceeds the last one is cut, and says so."""
    font = label_font(TEXT)
    rows = [""]
    for word in text.split():
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width or not rows[-1]:
            rows[-1] = longer
        else:
            rows.append(word)
    if len(rows) <= MAX_LINES:
        return rows
    return [*rows[: MAX_LINES - 1], rows[MAX_LINES - 1] + " ..."]
