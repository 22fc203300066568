"""The sixteen themes: what a scene looks like and what usually stands in it.

These tables are the world's prior. A model learns from them what belongs together (a fork comes
with a knife) and invents it when the picture is unclear: the mechanism that hallucination
mitigation is about.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Theme:
    """One kind of scene.

    Attributes:
        name: Identifier of the theme.
        upper: RGB colour of the upper band.
        lower: RGB colour of the lower band.
        horizon: Border of the bands as a fraction of the height.
        classes: Class name -> probability that the class is in a scene, each independent.
        word: The theme in sentences (`in a WORD`). It differs from the name where the name would
            not read well or where CHAIR would count it as an object ("ball" is a sports ball).
    """

    name: str
    upper: Colour
    lower: Colour
    horizon: float
    classes: dict[str, float] = field(hash=False)
    word: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "word", self.word or self.name)


# fmt: off
THEMES: tuple[Theme, ...] = (
    Theme(
        "kitchen", (235, 225, 200), (170, 140, 110), 0.62,
        {
            "refrigerator": 0.75, "oven": 0.75, "sink": 0.7, "microwave": 0.55, "toaster": 0.4,
            "bottle": 0.45, "cup": 0.4, "bowl": 0.4, "knife": 0.35, "spoon": 0.3, "person": 0.25,
            "potted plant": 0.15, "clock": 0.2, "banana": 0.15, "apple": 0.15, "chair": 0.15,
        },
    ),
    Theme(
        "dining room", (225, 200, 180), (140, 95, 65), 0.5,
        {
            "dining table": 0.85, "chair": 0.75, "fork": 0.6, "knife": 0.6, "spoon": 0.45,
            "cup": 0.4, "wine glass": 0.5, "bottle": 0.35, "pizza": 0.3, "bowl": 0.35,
            "person": 0.35, "cake": 0.25, "vase": 0.2, "sandwich": 0.15,
        },
    ),
    Theme(
        "living room", (215, 220, 205), (155, 120, 95), 0.6,
        {
            "couch": 0.85, "tv": 0.75, "remote": 0.6, "potted plant": 0.45, "book": 0.4,
            "clock": 0.3, "vase": 0.35, "cat": 0.3, "dog": 0.2, "person": 0.3, "chair": 0.3,
            "teddy bear": 0.15, "cup": 0.2,
        },
    ),
    Theme(
        "bedroom", (205, 205, 230), (150, 130, 120), 0.55,
        {
            "bed": 0.9, "clock": 0.5, "book": 0.45, "teddy bear": 0.45, "cell phone": 0.35,
            "chair": 0.3, "cat": 0.25, "person": 0.25, "tv": 0.2, "backpack": 0.25,
            "potted plant": 0.2,
        },
    ),
    Theme(
        "bathroom", (200, 230, 235), (225, 230, 235), 0.6,
        {
            "toilet": 0.85, "sink": 0.8, "toothbrush": 0.65, "hair drier": 0.5, "cup": 0.3,
            "bottle": 0.4, "scissors": 0.25, "person": 0.2, "potted plant": 0.15, "vase": 0.12,
        },
    ),
    Theme(
        "office", (225, 228, 235), (165, 160, 160), 0.5,
        {
            "laptop": 0.8, "keyboard": 0.75, "mouse": 0.75, "cell phone": 0.5, "cup": 0.4,
            "book": 0.4, "chair": 0.5, "person": 0.3, "scissors": 0.25, "clock": 0.25,
            "potted plant": 0.25, "tie": 0.2, "bottle": 0.15,
        },
    ),
    Theme(
        "street", (165, 205, 240), (125, 125, 130), 0.5,
        {
            "car": 0.85, "traffic light": 0.7, "bus": 0.45, "person": 0.55, "truck": 0.4,
            "bicycle": 0.4, "stop sign": 0.4, "motorcycle": 0.35, "parking meter": 0.35,
            "fire hydrant": 0.35, "umbrella": 0.2, "handbag": 0.25, "dog": 0.15, "backpack": 0.2,
        },
    ),
    Theme(
        "park", (175, 220, 250), (110, 175, 85), 0.45,
        {
            "bench": 0.75, "dog": 0.6, "person": 0.6, "frisbee": 0.5, "kite": 0.4, "bird": 0.45,
            "bicycle": 0.35, "umbrella": 0.2, "skateboard": 0.25, "sports ball": 0.25,
            "backpack": 0.2, "book": 0.1,
        },
    ),
    Theme(
        "farm", (180, 220, 245), (150, 170, 70), 0.45,
        {
            "cow": 0.75, "sheep": 0.65, "horse": 0.6, "dog": 0.35, "bird": 0.35, "truck": 0.35,
            "person": 0.35, "cat": 0.15, "apple": 0.15, "carrot": 0.15,
        },
    ),
    Theme(
        "savanna", (250, 215, 150), (205, 170, 90), 0.45,
        {
            "elephant": 0.7, "giraffe": 0.7, "zebra": 0.7, "bird": 0.4, "bear": 0.2,
            "truck": 0.2, "person": 0.15,
        },
    ),
    Theme(
        "beach", (150, 215, 250), (240, 220, 165), 0.5,
        {
            "surfboard": 0.7, "umbrella": 0.65, "boat": 0.55, "person": 0.6, "bird": 0.4,
            "kite": 0.3, "sports ball": 0.3, "frisbee": 0.25, "dog": 0.2, "handbag": 0.25,
            "bottle": 0.2, "chair": 0.25,
        },
    ),
    Theme(
        "snow", (200, 220, 245), (245, 248, 252), 0.4,
        {
            "skis": 0.75, "snowboard": 0.65, "person": 0.75, "backpack": 0.45, "bear": 0.15,
            "dog": 0.15, "bench": 0.15,
        },
        "snowfield",
    ),
    Theme(
        "ball field", (170, 215, 245), (190, 150, 95), 0.35,
        {
            "baseball bat": 0.75, "baseball glove": 0.75, "sports ball": 0.7, "person": 0.75,
            "bench": 0.4, "bottle": 0.25, "tennis racket": 0.3, "backpack": 0.2,
        },
        "ballpark",
    ),
    Theme(
        "station", (205, 210, 220), (140, 140, 150), 0.55,
        {
            "train": 0.75, "suitcase": 0.75, "airplane": 0.35, "person": 0.6, "backpack": 0.45,
            "handbag": 0.45, "clock": 0.45, "bench": 0.4, "cell phone": 0.25, "bus": 0.2,
            "tie": 0.15, "umbrella": 0.15,
        },
    ),
    Theme(
        "market", (250, 240, 215), (190, 150, 110), 0.4,
        {
            "banana": 0.65, "apple": 0.65, "orange": 0.65, "broccoli": 0.5, "carrot": 0.55,
            "person": 0.35, "bottle": 0.2, "handbag": 0.2, "sandwich": 0.1, "umbrella": 0.15,
        },
    ),
    Theme(
        "cafe", (210, 180, 150), (110, 80, 65), 0.55,
        {
            "donut": 0.6, "cake": 0.5, "sandwich": 0.5, "hot dog": 0.4, "pizza": 0.35,
            "cup": 0.7, "laptop": 0.35, "cell phone": 0.35, "person": 0.4, "chair": 0.35,
            "spoon": 0.35, "wine glass": 0.15, "book": 0.2,
        },
    ),
)
# fmt: on

BY_NAME: dict[str, Theme] = {theme.name: theme for theme in THEMES}


def theme_classes(theme: str) -> frozenset[str]:
    """Classes that usually appear in a theme (for the theme share of invented objects).

    Args:
        theme: Name of a theme.

    Raises:
        ValueError: No theme has this name.
    """
    if theme not in BY_NAME:
        raise ValueError(f"unknown theme {theme!r}; themes are {', '.join(BY_NAME)}")
    return frozenset(BY_NAME[theme].classes)


def swapped(theme: Theme) -> Theme:
    """The theme whose table replaces this one's in the `swapped` split.

    Themes are exchanged in pairs, eight places apart: kitchen with farm, dining room with savanna,
    office with station, and so on. The prior then points the wrong way.
    """
    half = len(THEMES) // 2
    return THEMES[(THEMES.index(theme) + half) % len(THEMES)]
