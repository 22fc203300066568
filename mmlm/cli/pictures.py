"""Pictures with truth for `bench` and `demo`: the embedded world, or a folder in COCO format.

`find` reads and checks without writing anything, so that every refusal comes before any work;
`Source.draw` then draws the world's pictures, if they are not there yet.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.coco import Picture
    from benchmarks.pope.questions import Question

__all__ = ["COCO_PROMPT", "WORLD_PROMPT", "DataOptions", "Source", "find"]

WORLD_PICTURES = 300
WORLD_PROMPT = "describe the image in detail ."
COCO_PROMPT = "Please describe this image in detail."


@dataclass(frozen=True)
class DataOptions:
    """Which pictures; by default the embedded world, drawn on the spot.

    Attributes:
        images: Folder with pictures; without it the embedded world is drawn.
        annotations: Objects in the pictures, instances.json in COCO format. Not needed for
            pictures of COCO val2014 under their own names.
        references: Reference captions (captions.json in COCO format); objects they name count as
            being in the picture.
        split: Split of the world. `natural`: as in training; `counterfactual`: companions are
            missing more often than the model expects; `heldout_style`, `swapped`: see `mmlm data`.
        count: Number of pictures; for a folder drawn with the seed. Default: 300 of the world, all
            of a folder.
        subset: `opera500`: the 500 pictures of COCO val2014 in OPERA's released LLaVA-1.5 captions;
            without --images where `mmlm data fetch coco-val2014` puts them.
        seed: Which pictures.
    """

    images: Path | None = field(default=None, metadata={"alias": "--images"})
    annotations: Path | None = field(default=None, metadata={"alias": "--annotations"})
    references: Path | None = field(default=None, metadata={"alias": "--references"})
    split: str = field(default="natural", metadata={"alias": "--split"})
    count: int | None = field(default=None, metadata={"alias": "--count"})
    subset: Literal["all", "opera500"] = field(default="all", metadata={"alias": "--subset"})
    seed: int = field(default=0, metadata={"alias": "--seed"})


@dataclass(frozen=True)
class Source:
    """Pictures that can be asked about.

    Attributes:
        name: For people: "embedded world, counterfactual" or the folder.
        description: What determines the pictures and their truth, for the run record.
        prompt: The usual caption question.
        version: Name of POPE questions about them.
        folder: Where the files are, or will be.
        count: Number of pictures.
        pictures: The pictures; empty before `draw` for the world.
        files: Annotation files for the truth: instances and captions.
        themes: Objects that belong to each picture's scene; only the world knows.
        polls: Folder of the POPE questions that come with the pictures, if any.
        world: Split and seed of a world that is still to be drawn.
    """

    name: str
    description: Mapping[str, Any]
    prompt: str
    version: str
    folder: Path
    count: int
    pictures: tuple[Picture, ...] = ()
    files: tuple[tuple[Path, ...], tuple[Path, ...]] = ((), ())
    themes: Mapping[int, frozenset[str]] = field(default_factory=dict)
    polls: Path | None = None
    world: tuple[str, int] | None = None

    def draw(self, progress: bool) -> Source:
        """Draws the world's pictures into `folder`; nothing to do for a folder of pictures."""
        if self.world is None:
            return self
        from benchmarks.coco import read_instances
        from data_tools.world.export import write_split

        split, seed = self.world
        write_split(self.folder, split, self.count, seed, progress=progress)
        instances = self.folder / "instances.json"
        return replace(
            self,
            folder=self.folder / "images",
            pictures=tuple(read_instances(instances)),
            files=((instances,), ()),
            themes=_themes(instances),
            polls=self.folder,
            world=None,
        )

    def truth_files(self) -> dict[str, list[str]]:
        """Where the truth stands or will stand, for the run record and `mmlm score`."""
        instances, captions = self.files
        if self.world is not None:
            instances = (self.folder / "instances.json",)
        return {
            "annotations": [str(path.resolve()) for path in instances],
            "references": [str(path.resolve()) for path in captions],
        }

    def truth(self, variant: str = "wordnet") -> dict[int, set[str]]:
        """Objects of each picture, for CHAIR."""
        from benchmarks import coco

        wanted = {picture.image_id for picture in self.pictures}
        instances, captions = self.files
        known = (
            coco.truth_from_coco(instances, captions, variant)
            if instances
            else coco.truth_of_val2014()
        )
        return {image: objects for image, objects in known.items() if image in wanted}

    def questions(self, limit: int | None = None) -> dict[str, Sequence[Question]]:
        """POPE questions of the three kinds about the first ``limit`` usable pictures.

        The world brings its own, whose popular and adversarial objects are those of the training
        scenes; for a folder they are built from its annotations, as POPE's authors do.
        """
        from benchmarks import pope
        from benchmarks.pope import questions as pope_questions

        if self.polls is not None:
            splits = {
                kind: pope.read_questions(self.polls / f"pope_{kind}.jsonl") for kind in pope.KINDS
            }
            images = list(dict.fromkeys(q.image for q in next(iter(splits.values()))))[:limit]
            return {kind: [q for q in qs if q.image in images] for kind, qs in splits.items()}
        objects = [(picture.file_name, list(picture.objects)) for picture in self.pictures]
        usable = sum(len(names) >= 3 for _, names in objects)
        generator = random.Random(0)
        chosen = pope_questions.select_pictures(objects, generator, count=min(usable, limit or 500))
        return {kind: pope.build_questions(chosen, kind, generator) for kind in pope.KINDS}


def find(options: DataOptions, world_folder: Path) -> Source:
    """Reads and checks which pictures there are; writes nothing.

    Args:
        options: What the user asked for.
        world_folder: Where the world's pictures are drawn.

    Raises:
        InputError: If a file is missing or unreadable, or the options contradict each other.
    """
    if options.count is not None and options.count < 1:
        raise InputError(f"--count is {options.count}.", advice="Ask for at least 1 picture.")
    if options.seed < 0:
        raise InputError(f"--seed is {options.seed}.", advice="Give a seed of 0 or more.")
    if options.images is not None:
        return _folder(options, options.images)
    if options.subset != "all":
        from mmlm.cli.official import given_or_official

        return _folder(options, given_or_official("images", None, "coco-val2014"))
    given = [name for name in ("annotations", "references") if getattr(options, name)]
    if given:
        raise InputError(
            f"--{given[0]} is given without --images.",
            advice="Give the folder of the pictures as well.",
        )
    return _world(options, world_folder)


def _world(options: DataOptions, folder: Path) -> Source:
    from data_tools.world import SPLITS
    from data_tools.world.export import FORMAT

    if options.split not in SPLITS:
        raise InputError(
            f"There is no split {options.split!r}.",
            advice=f"Choose one of {', '.join(SPLITS)}.",
        )
    count = options.count or WORLD_PICTURES
    description = {"split": options.split, "count": count, "seed": options.seed, "format": FORMAT}
    return Source(
        name=f"embedded world, {options.split}",
        description={"world": description},
        prompt=WORLD_PROMPT,
        version=f"world-{options.split}",
        folder=folder / f"{options.split}-{options.seed}-{count}",
        count=count,
        world=(options.split, options.seed),
    )


def _folder(options: DataOptions, folder: Path) -> Source:
    from benchmarks.coco import read_instances, subset_ids
    from mmlm.records import file_hash

    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}.", advice="Check --images.")
    if options.annotations is not None:
        pictures = read_instances(options.annotations)
    else:
        pictures = _val2014(folder)
    if options.subset != "all":
        wanted = set(subset_ids(options.subset))
        pictures = [picture for picture in pictures if picture.image_id in wanted]
    if not pictures or (options.count or 0) > len(pictures):
        raise InputError(
            f"There are {len(pictures)} such pictures; {options.count or 1} were asked for.",
            advice="Ask for fewer with --count, or check --images and --subset.",
        )
    pictures.sort(key=lambda picture: picture.image_id)
    if options.count is not None:
        chosen = random.Random(options.seed).sample(pictures, options.count)
        pictures = sorted(chosen, key=lambda picture: picture.image_id)
    files = [path for path in (options.annotations, options.references) if path is not None]
    return Source(
        name=str(folder),
        description={
            "hashes": {path.name: file_hash(path) for path in files},
            "image_ids": [picture.image_id for picture in pictures],
        },
        prompt=COCO_PROMPT,
        version="custom",
        folder=folder,
        count=len(pictures),
        pictures=tuple(pictures),
        files=(
            (options.annotations,) if options.annotations else (),
            (options.references,) if options.references else (),
        ),
    )


def _val2014(folder: Path) -> list[Picture]:
    """Pictures of COCO val2014 under their own names; mmlm ships what is in them."""
    from benchmarks.coco import Picture, truth_of_val2014

    truth = truth_of_val2014()
    found = []
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(r"COCO_val2014_(\d{12})\.jpg", path.name)
        if match and int(match[1]) in truth:
            image = int(match[1])
            found.append(Picture(image, path.name, tuple(sorted(truth[image]))))
    if not found:
        raise InputError(
            f"{str(folder)!r} holds no pictures named COCO_val2014_<12 digits>.jpg.",
            advice="Give --annotations instances.json for other pictures.",
        )
    return found


def _themes(instances: Path) -> dict[int, frozenset[str]]:
    from data_tools.world import theme_classes

    data = json.loads(instances.read_text(encoding="utf-8"))
    classes = {
        theme: frozenset(theme_classes(theme))
        for theme in {image["theme"] for image in data["images"]}
    }
    return {image["id"]: classes[image["theme"]] for image in data["images"]}
