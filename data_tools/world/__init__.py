"""The embedded world: procedural pictures in COCO's 80 categories with exact truth.

    from data_tools.world import SPLITS, caption, render, scene

    truth = scene(SPLITS["natural"], seed=0, index=17, split="natural")
    picture = render(truth)                               # image, class_map, instance_map
    text = caption(truth, numpy.random.default_rng(0))

Pure numpy and Pillow. `data_tools.world.export.write_split` writes a split to disk in COCO form.
"""

from data_tools.world.categories import CATEGORIES, NAMES
from data_tools.world.language import (
    CAPTION_QUESTIONS,
    caption,
    existence_answer,
    existence_question,
    questions,
    vocabulary,
)
from data_tools.world.painting import Picture, render
from data_tools.world.scenes import SPLITS, Instance, Scene, WorldConfig, scene
from data_tools.world.themes import THEMES, Theme, theme_classes

__all__ = [
    "CAPTION_QUESTIONS",
    "CATEGORIES",
    "NAMES",
    "SPLITS",
    "THEMES",
    "Instance",
    "Picture",
    "Scene",
    "Theme",
    "WorldConfig",
    "caption",
    "existence_answer",
    "existence_question",
    "questions",
    "render",
    "scene",
    "theme_classes",
    "vocabulary",
]
