"""Measures the embedded model for docs/embedded-model.md.

    python tools/measure_embedded.py scores --model runs/world/seed0/model --name seed0
    python tools/measure_embedded.py precision
    python tools/measure_embedded.py speed
    python tools/measure_embedded.py heads --count 100

Every command writes one JSON file under docs/results, without a command all of them are run on the
embedded model; `tools/embedded_tables.py` puts the results into the document. Pictures are drawn in
memory, by split, seed and number; nothing is read or downloaded. Greedy, 84 new tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import mmlm
from benchmarks import chair, pope, stats
from data_tools.world import SPLITS, Scene, render, scene, theme_classes
from data_tools.world.export import file_name
from data_tools.world.polling import KINDS, poll
from mmlm.runner import GenerateSettings, Request, generate_all

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
QUESTION = "please describe this image in detail ."
NEW_TOKENS = 84
SPLIT = "natural"
"""Split on which everything but the scores is measured: the one of `mmlm demo`."""
CLASSES_ASKED = 3
"""Present classes that POPE asks about in a picture, and as many absent ones."""


@dataclass(frozen=True)
class Pictures:
    """The evaluation pictures of a split.

    Attributes:
        split: key of `SPLITS`.
        count: how many.
        seed: of the scenes.
    """

    split: str
    count: int
    seed: int = 0

    def scenes(self) -> list[Scene]:
        """The truth about every picture."""
        return [scene(SPLITS[self.split], self.seed, i, self.split) for i in range(self.count)]


def captions(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    methods: Sequence[Any] = (),
    *,
    with_image: bool = True,
    batch_size: int = 32,
    num_beams: int = 1,
) -> list[dict[str, Any]]:
    """Greedy captions as `benchmarks.chair.score` reads them."""
    requests = [
        Request(str(s.index), (picture(s),) if with_image else (), QUESTION) for s in scenes
    ]
    answers = _generate(model, processor, requests, methods, batch_size, num_beams=num_beams)
    return [{"image_id": s.index, "caption": text} for s, text in zip(scenes, answers, strict=True)]


def asked(
    model: Any,
    processor: Any,
    scenes: Sequence[Scene],
    methods: Sequence[Any] = (),
    *,
    tokens: int = 16,
    num_beams: int = 1,
) -> dict[str, pope.PopeResult]:
    """POPE of every kind on the first 100 pictures that have enough objects.

    The kinds share half of their questions, those about objects that are there: these are asked
    once.
    """
    enough = [s for s in scenes if len(s.classes) >= CLASSES_ASKED][:100]
    drawn = {file_name(s.index): picture(s) for s in enough}
    polls = {kind: poll(kind, [(s, file_name(s.index)) for s in enough]) for kind in KINDS}
    wanted = dict.fromkeys(
        (q["image"], q["text"]) for questions in polls.values() for q in questions
    )
    requests = [Request(f"{image} {text}", (drawn[image],), text) for image, text in wanted]
    texts = _generate(model, processor, requests, methods, 64, tokens=tokens, num_beams=num_beams)
    answers = dict(zip(wanted, texts, strict=True))
    return {
        kind: pope.score(
            [answers[q["image"], q["text"]] for q in questions],
            [str(q["label"]) for q in questions],
            images=[str(q["image"]) for q in questions],
            version=f"world-{kind}",
        )
        for kind, questions in polls.items()
    }


def scores(arguments: argparse.Namespace) -> dict[str, Any]:
    """CHAIR, theme share, POPE and the captions without an image, on every split."""
    model, processor = mmlm.load(arguments.model)
    record: dict[str, Any] = {"name": arguments.name, "splits": {}}
    for split in arguments.splits:
        began = time.monotonic()
        scenes = Pictures(split, arguments.count).scenes()
        described = _described(scenes, captions(model, processor, scenes))
        blind = captions(model, processor, scenes, with_image=False)
        described["no_image"] = _described(scenes, blind)
        described["pope"] = {
            kind: result.as_json() for kind, result in asked(model, processor, scenes).items()
        }
        record["splits"][split] = described
        _note(f"{split}: {_summary(described)}  ({time.monotonic() - began:.0f} s)")
    return record


def precision(arguments: argparse.Namespace) -> dict[str, Any]:
    """On how many pictures 16-bit weights give the very captions that 32-bit weights give."""
    from mmlm.model.checkpoint import DTYPES

    scenes = Pictures(arguments.split, arguments.count).scenes()
    texts = {}
    for dtype in DTYPES[:3]:
        model, processor = mmlm.load(arguments.model, dtype=dtype)
        texts[f"computed in {dtype}"] = _texts(model, processor, scenes)
        model, _ = mmlm.load(arguments.model, dtype=dtype)
        texts[f"stored in {dtype}"] = _texts(model.float(), processor, scenes)
    reference = texts["stored in float32"]
    same = {
        name: sum(a == b for a, b in zip(reference, other, strict=True))
        for name, other in texts.items()
    }
    _note(str(same))
    return {"split": arguments.split, "pictures": len(scenes), "identical": same}


def speed(arguments: argparse.Namespace) -> dict[str, Any]:
    """Captions per second in batches of 1, 8 and 32."""
    import torch

    model, processor = mmlm.load(arguments.model)
    torch.set_num_threads(arguments.threads)
    rates = {}
    for batch_size in (1, 8, 32):
        scenes = Pictures(arguments.split, max(16, 3 * batch_size)).scenes()
        captions(model, processor, scenes[:batch_size], batch_size=batch_size)  # warm-up
        began = time.monotonic()
        captions(model, processor, scenes, batch_size=batch_size)
        rates[batch_size] = len(scenes) / (time.monotonic() - began)
    _note(str(rates))
    return {"threads": arguments.threads, "captions_per_second": rates}


def heads(arguments: argparse.Namespace) -> dict[str, Any]:
    """How much each head depends on the image, and where the last prompt position looks.

    VHD (VHR's Eq. 4) is divided by the sum of both outputs' norms, so it lies in [0, 1]. A sink is
    a position that takes more than half of a head's attention.
    """
    import torch

    from decoding.vhr import divergence
    from mmlm.inputs import message, prepare

    model, processor = mmlm.load(arguments.model)
    chosen = Pictures(arguments.split, arguments.count).scenes()
    spread, share, sinks = [], [], []
    for start in range(0, len(chosen), 20):
        pictures = [picture(s) for s in chosen[start : start + 20]]
        seen = prepare(
            processor, [[message("user", QUESTION, 1)]] * len(pictures), [[p] for p in pictures]
        )
        blind = prepare(processor, [[message("user", QUESTION, 0)]], [[]])
        with torch.inference_mode():
            with_image, attention = _last_position(model, seen)
            without, _ = _last_position(model, blind)
        size = with_image.norm(dim=-1) + without.norm(dim=-1)
        spread.append(divergence(with_image, without.expand_as(with_image)) / size)  # [l, B, H]
        image = seen["input_ids"] == model.config.image_token_id
        share.append((attention * image[None, :, None]).sum(-1))
        sinks.append((attention.amax(-1) > 0.5).float())
    return {
        "split": arguments.split,
        "pictures": len(chosen),
        "relative_vhd": torch.cat(spread, 1).mean(1).tolist(),
        "attention_on_image": torch.cat(share, 1).mean(1).tolist(),
        "sink_rate": torch.cat(sinks, 1).mean(1).tolist(),
    }


@dataclass(frozen=True, kw_only=True)
class _LastRow(mmlm.Method):
    """Keeps what the last prompt position looks at, and what its heads say; changes nothing.

    Attributes:
        seen: filled with (attention [B, H, N], head outputs [B, H, d]) by layer.
    """

    only_looks: ClassVar[frozenset[str]] = frozenset({"heads", "weights"})

    seen: dict[int, list[Any]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> Any:
        return "last"

    def neutral(self) -> _LastRow:
        return self

    def weights(self, state: Any, layer: int, rows: Any, a: Any) -> None:
        self.seen[layer] = [a[:, :, -1]]

    def heads(self, state: Any, layer: int, y: Any) -> None:
        self.seen[layer].append(y[:, -1].float())


def _last_position(model: Any, inputs: dict[str, Any]) -> tuple[Any, Any]:
    """Head outputs [layers, B, H, d] and attention [layers, B, H, N] of the last position."""
    import torch

    method = _LastRow()
    with mmlm.attach(model, method):
        model(**inputs)
    attention, outputs = zip(*(method.seen[layer] for layer in sorted(method.seen)), strict=True)
    return torch.stack(outputs), torch.stack(attention)


def _generate(
    model: Any,
    processor: Any,
    requests: Iterable[Request],
    methods: Sequence[Any],
    batch_size: int,
    tokens: int = NEW_TOKENS,
    num_beams: int = 1,
) -> list[str]:
    settings = GenerateSettings(max_new_tokens=tokens, batch_size=batch_size, num_beams=num_beams)
    texts = []
    for result in generate_all(model, processor, requests, methods, settings):
        if result.error:
            raise mmlm.errors.MmlmError(f"request {result.id} failed: {result.error}")
        texts.append(result.text)
    return texts


def _texts(model: Any, processor: Any, scenes: Sequence[Scene]) -> list[str]:
    return [record["caption"] for record in captions(model, processor, scenes)]


def picture(truth: Scene) -> Any:
    """What a scene looks like, a PIL image."""
    from PIL import Image

    return Image.fromarray(render(truth).image)


def _truth(scenes: Sequence[Scene]) -> dict[int, frozenset[str]]:
    return {s.index: s.classes for s in scenes}


def _described(scenes: Sequence[Scene], described: list[dict[str, Any]]) -> dict[str, Any]:
    """CHAIR with intervals, and how much of what is invented belongs to the theme."""
    result = chair.score(described, _truth(scenes))
    shares = chair.theme_share(result, {s.index: theme_classes(s.theme) for s in scenes})
    measures = shares.measures(resamples=stats.RESAMPLES)
    return {
        **result.as_json(),
        "theme": {name: measure.as_json() for name, measure in measures.items()},
        "examples": [record["caption"] for record in described[:3]],
    }


def _summary(described: dict[str, Any]) -> str:
    """One line for the terminal."""
    metrics = {name: m["value"] for name, m in described["metrics"].items()}
    parts = [f"{name} {value:.3f}" for name, value in metrics.items() if value is not None]
    if "theme" in described:
        theme = described["theme"]
        parts.append(f"theme {theme['theme_share']['value']} / {theme['chance']['value']}")
    thirds = [m["value"] for m in described["hallucination_by_third"]]
    parts.append("thirds " + " ".join(f"{v:.3f}" for v in thirds if v is not None))
    if "no_image" in described:
        parts.append(f"no image {described['no_image']['metrics']['chair_i']['value']}")
    for kind, result in described.get("pope", {}).items():
        parts.append(f"{kind} {result['metrics']['accuracy']['value']:.3f}")
    return ", ".join(parts)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def build_parser() -> argparse.ArgumentParser:
    """One sub-command per measurement; none of them means all, on the embedded model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command")
    for name, measure in MEASURES.items():
        command = commands.add_parser(name, help=measure.__doc__.splitlines()[0])
        command.add_argument("--model", default="embedded", help="folder, or 'embedded'")
        command.add_argument("--name", default=name, help="name of the result file")
        command.add_argument("--count", type=int, default=300, help="pictures")
        if name == "scores":
            splits = [split for split in SPLITS if split != "train"]
            command.add_argument("--splits", nargs="+", default=splits, choices=splits)
        else:
            command.add_argument("--split", default=SPLIT, choices=sorted(SPLITS))
        command.add_argument("--threads", type=int, default=2, help="threads")
        command.add_argument("--output", type=Path, default=RESULTS, help="folder")
    return parser


MEASURES = {
    "scores": scores,
    "precision": precision,
    "speed": speed,
    "heads": heads,
}


def main() -> None:
    """Measures one thing, or everything, and stores it."""
    import torch

    parser = build_parser()
    asked_for = parser.parse_args()
    if asked_for.command is None:
        # The shipped model was trained with seed 0; its scores keep that name.
        every = [[name, *(["--name", "seed0"] if name == "scores" else [])] for name in MEASURES]
    else:
        every = [sys.argv[1:]]
    for words in every:
        arguments = parser.parse_args(words)
        torch.set_num_threads(arguments.threads)
        record = MEASURES[arguments.command](arguments)
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{arguments.name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        _note(f"wrote {path}")


if __name__ == "__main__":
    main()
