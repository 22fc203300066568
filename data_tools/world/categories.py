"""The 80 categories of COCO and how large each is drawn.

The embedded world uses exactly COCO's categories, so that CHAIR's synonym list, POPE's question
builder and every COCO tool apply to it unchanged.
"""

from __future__ import annotations

CATEGORIES: tuple[tuple[int, str], ...] = (
    (1, "person"), (2, "bicycle"), (3, "car"), (4, "motorcycle"),
    (5, "airplane"), (6, "bus"), (7, "train"), (8, "truck"),
    (9, "boat"), (10, "traffic light"), (11, "fire hydrant"), (13, "stop sign"),
    (14, "parking meter"), (15, "bench"), (16, "bird"), (17, "cat"),
    (18, "dog"), (19, "horse"), (20, "sheep"), (21, "cow"),
    (22, "elephant"), (23, "bear"), (24, "zebra"), (25, "giraffe"),
    (27, "backpack"), (28, "umbrella"), (31, "handbag"), (32, "tie"),
    (33, "suitcase"), (34, "frisbee"), (35, "skis"), (36, "snowboard"),
    (37, "sports ball"), (38, "kite"), (39, "baseball bat"), (40, "baseball glove"),
    (41, "skateboard"), (42, "surfboard"), (43, "tennis racket"), (44, "bottle"),
    (46, "wine glass"), (47, "cup"), (48, "fork"), (49, "knife"),
    (50, "spoon"), (51, "bowl"), (52, "banana"), (53, "apple"),
    (54, "sandwich"), (55, "orange"), (56, "broccoli"), (57, "carrot"),
    (58, "hot dog"), (59, "pizza"), (60, "donut"), (61, "cake"),
    (62, "chair"), (63, "couch"), (64, "potted plant"), (65, "bed"),
    (67, "dining table"), (70, "toilet"), (72, "tv"), (73, "laptop"),
    (74, "mouse"), (75, "remote"), (76, "keyboard"), (77, "cell phone"),
    (78, "microwave"), (79, "oven"), (80, "toaster"), (81, "sink"),
    (82, "refrigerator"), (84, "book"), (85, "clock"), (86, "vase"),
    (87, "scissors"), (88, "teddy bear"), (89, "hair drier"), (90, "toothbrush"),
)  # fmt: skip
"""(official COCO category id, name) in COCO's order; class maps store the position plus one."""

NAMES: tuple[str, ...] = tuple(name for _, name in CATEGORIES)
INDEX: dict[str, int] = {name: i for i, name in enumerate(NAMES)}

SUPERCATEGORIES: tuple[tuple[str, int, int], ...] = (
    ("person", 0, 1),
    ("vehicle", 1, 9),
    ("outdoor", 9, 14),
    ("animal", 14, 24),
    ("accessory", 24, 29),
    ("sports", 29, 39),
    ("kitchen", 39, 46),
    ("food", 46, 56),
    ("furniture", 56, 62),
    ("electronic", 62, 68),
    ("appliance", 68, 73),
    ("indoor", 73, 80),
)
"""(COCO's supercategory, first position, one past the last position) in `CATEGORIES`."""

BIG = frozenset(
    "refrigerator oven couch bed bus train truck car elephant giraffe zebra horse cow airplane "
    "boat toilet tv bear sheep motorcycle bench person umbrella sink".split()
) | {"dining table"}
SMALL = frozenset(
    "fork knife spoon cup bottle mouse remote toothbrush scissors apple orange banana carrot "
    "broccoli donut sandwich frisbee clock book bird tie keyboard vase toaster cake bowl handbag "
    "kite".split()
) | {
    "wine glass", "cell phone", "hot dog", "sports ball", "baseball bat", "baseball glove",
    "hair drier",
}  # fmt: skip

LONG_SIDE: dict[str, tuple[int, int]] = {"big": (22, 34), "medium": (15, 24), "small": (8, 14)}
"""Smallest and largest long side in pixels of a picture of 80 pixels."""


def size_group(name: str) -> str:
    """`big`, `medium` or `small`: the key of `LONG_SIDE` for a class."""
    return "big" if name in BIG else "small" if name in SMALL else "medium"
