"""``mmlm data sentinel``: pairs of sentences for training, from a model's own captions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.data.on_ray import run_actors
from mmlm.cli.data.report import report_run
from mmlm.cli.data.sentinel_options import ObjectOptions, Sentinel
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.options import check_model_name, open_model, parse_methods
from mmlm.errors import InputError

if TYPE_CHECKING:
    from data_tools.detectors import Detector
    from data_tools.generators import SentenceGenerator
    from data_tools.records import StageOutput
    from data_tools.sentinel.objects import ObjectExtractor
    from data_tools.sentinel.objects.pronouns import Coreference
    from data_tools.sentinel.pipeline import SentinelPipeline

__all__ = ["COMMAND", "make_pairs"]

WORLD = "world"


def make_pairs(options: Sentinel, terminal: Terminal) -> int:
    """Describes every picture that is not done yet, and stores pairs and audit.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if more than a fifth of the pictures failed.

    Raises:
        MmlmError: For everything that makes the run impossible, before any work; in strict mode
            also for the first picture that cannot be read.
    """
    from data_tools.records import StageOutput
    from mmlm.sharding import this_shard

    shard = this_shard(options.shard)
    rows = _rows(options)
    detectors = _detectors(options)
    output = StageOutput(
        options.output,
        _run_record(options, rows, detectors),
        ("pairs", "images"),
        shard,
        total=len(rows),
        overwrite=options.overwrite,
        resume_anyway=options.resume_anyway,
    )
    mine = [row for row in rows if shard.owns(row["id"])]
    before = sum(row["id"] in output.done for row in mine)
    if before:
        terminal.note(f"{before} of {len(mine)} pictures were done; going on.")
    if before < len(mine):
        _work(options, terminal, rows, detectors, output)
    return report_run(options.output, output, terminal)


def _rows(options: Sentinel) -> list[dict[str, Any]]:
    from data_tools.sentinel.inputs import from_file, from_folder, world_records

    given = [options.input is not None, options.images is not None, options.world.count != 0]
    if sum(given) != 1:
        raise InputError(
            "There must be exactly one of --input, --images and --world.count.",
            advice="Give the pictures: --input FILE.jsonl, --images FOLDER, or --world.count 500.",
        )
    if options.world.count < 0:
        raise InputError(
            f"--world.count is {options.world.count}.", advice="Ask for at least one picture."
        )
    if options.input is not None:
        return from_file(options.input, options.output)
    if options.images is not None:
        return from_folder(options.images, options.output, options.settings.seed)
    return world_records(WORLD, options.world.count, options.settings.seed)


def _detectors(options: Sentinel) -> list[Detector]:
    """The detectors, not loaded; also refuses a policy that names none of them."""
    from data_tools.detectors import parse_detector
    from data_tools.detectors.cache import CachedDetector
    from data_tools.sentinel.asking import Witnesses

    texts = options.detectors or (("WorldTruth",) if options.world.count else ())
    if not texts:
        raise InputError(
            "No detector is given.",
            advice="Give two, e.g. --detector \"GroundingDINO(checkpoint='path')\" "
            "--detector \"HFDetector(model='path')\".",
        )
    detectors = [parse_detector(text) for text in texts]
    try:
        Witnesses(detectors, options.settings)
    except ValueError as error:
        raise InputError(f"{error}.", advice="Change --settings.cross_check.") from error
    if options.detector_cache is None:
        return detectors
    return [CachedDetector(one, options.detector_cache) for one in detectors]


def _run_record(
    options: Sentinel, rows: Sequence[dict[str, Any]], detectors: Sequence[Detector]
) -> dict[str, Any]:
    """What determines the lines and is known before anything is loaded."""
    from importlib.metadata import version

    from data_tools.sentinel.asking import Witnesses
    from data_tools.sentinel.inputs import records_hash
    from mmlm.records import INFORMATION

    objects = dataclasses.asdict(options.objects)
    source = options.input or options.images
    return {
        "command": "data sentinel",
        "settings": dataclasses.asdict(options.settings),
        "generator": _generator_record(options),
        "detectors": Witnesses(detectors, options.settings).texts,
        "objects": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in objects.items()
            if name != "device"
        },
        "records": records_hash(rows),
        "world": dataclasses.asdict(options.world) if options.world.count else None,
        INFORMATION: {
            "input": None if source is None else str(source),
            "device": options.model.device,
            "images_at_once": options.images_at_once,
            "versions": {name: version(name) for name in ("mmlm", "torch", "transformers")},
        },
    }


def _generator_record(options: Sentinel) -> dict[str, Any]:
    if options.generator == "openai":
        # How a server is reached decides nothing; what it samples from is known when it was asked.
        return {"kind": "openai", "model": options.server.model}
    model = dataclasses.asdict(options.model)
    return {
        "kind": "hf",
        "model": {name: model[name] for name in ("id", "dtype", "attention", "chat_template")},
        "methods": [method.text for method in parse_methods(options.methods)],
        "max_new_tokens": options.max_new_tokens,
    }


def _work(
    options: Sentinel,
    terminal: Terminal,
    rows: Sequence[dict[str, Any]],
    detectors: Sequence[Detector],
    output: StageOutput,
) -> None:
    from data_tools.sentinel.inputs import export_world
    from data_tools.stages import run_stage

    if options.generator == "hf":
        check_model_name(options.model.id)
    # What can be refused is refused before a picture is drawn.
    pipeline = None if options.ray.actors else _pipeline(options, terminal, detectors)
    if options.world.count:
        export_world(
            options.output / WORLD,
            options.world.split,
            options.world.count,
            options.world.seed,
            overwrite=options.overwrite,
            progress=terminal.progress,
        )
    if pipeline is None:
        there = dataclasses.replace(options, output=options.output.absolute())
        run_actors(partial(_in_actor, there), rows, output, options.ray, terminal)
        return
    output.add_facts({"loaded": pipeline.facts})
    run_stage(pipeline, rows, output, progress=terminal.progress)


def _in_actor(options: Sentinel) -> SentinelPipeline:
    """The pipeline as a worker makes it for itself."""
    return _pipeline(options, Terminal(quiet=True), _detectors(options))


def _pipeline(
    options: Sentinel, terminal: Terminal, detectors: Sequence[Detector]
) -> SentinelPipeline:
    """The pipeline with everything that it needs loaded."""
    from data_tools.sentinel.pipeline import SentinelPipeline

    extractor, coreference = _readers(options.objects)
    for detector in detectors:
        detector.load()
    try:
        return SentinelPipeline(
            _generator(options, terminal),
            extractor,
            detectors,
            options.settings,
            coreference=coreference,
            folder=options.output,
            images_at_once=options.images_at_once,
            strict=options.strict,
        )
    except ValueError as error:
        raise InputError(f"{error}.", advice="See: mmlm data sentinel --help") from error


def _readers(options: ObjectOptions) -> tuple[ObjectExtractor, Coreference | None]:
    from data_tools.sentinel.objects.make import make_extractor
    from data_tools.sentinel.objects.mentions import NOT_OBJECTS, MentionRules
    from data_tools.sentinel.objects.pronouns import load_fastcoref

    authors = options.authors_words
    rules = MentionRules(
        coco_only=options.coco_only,
        ignored=() if authors else NOT_OBJECTS,
        lemmatise_every_token=authors,
        word_list="authors" if authors else "chair",
    )
    try:
        extractor = make_extractor(
            options.extractor,
            rules=rules,
            pipeline=options.pipeline,
            weights=options.weights,
            device=options.device,
        )
    except ValueError as error:
        raise InputError(f"{error}.", advice="Give --objects.weights FOLDER.") from error
    if options.coreference is None:
        return extractor, None
    return extractor, load_fastcoref(str(options.coreference), options.device)


def _generator(options: Sentinel, terminal: Terminal) -> SentenceGenerator:
    if options.generator == "openai":
        from data_tools.generators.serving import open_generator

        server = open_generator(options.server, "--server")
        server.check()
        return server
    from data_tools.generators.huggingface import HFGenerator

    methods = parse_methods(options.methods)
    model, processor = open_model(options.model, methods, terminal)
    return HFGenerator(
        model,
        processor,
        max_new_tokens=options.max_new_tokens,
        methods=methods,
        pictures_at_once=options.images_at_once,
    )


COMMAND = Command(
    summary="pairs of a clean and a hallucinated sentence from a model's own captions (SENTINEL)",
    settings=Sentinel,
    run=make_pairs,
    example=(
        "mmlm data sentinel --config data/world_sentinel --output pairs\n"
        "mmlm data sentinel --config data/sentinel --images photos --output pairs --shard 0/8"
    ),
)
