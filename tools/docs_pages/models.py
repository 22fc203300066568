"""docs/models.md: model families, and which method runs on which, asked of small models of each.

The small models are those of the tests (tests/tiny.py): the real classes of transformers with few
and narrow layers, so that `mmlm doctor`'s questions have the answers of a model from the hub.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))

#: Family -> (a checkpoint of it, how its pictures become tokens).
CHECKPOINTS = {
    "llava": ("llava-hf/llava-1.5-7b-hf", "one tile, 576 tokens"),
    "llava_next": ("llava-hf/llava-v1.6-vicuna-7b-hf", "the picture and its tiles, with line ends"),
    "llava_onevision": (
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        "the same, tiles resized to a limit",
    ),
    "qwen2_5_vl": ("Qwen/Qwen2.5-VL-7B-Instruct", "any size, 2 x 2 patches a token, 3-D positions"),
    "qwen3_vl": ("Qwen/Qwen3-VL-8B-Instruct", "the same; features also enter early layers"),
    "internvl": ("OpenGVLab/InternVL3-8B-hf", "tiles of 256 tokens"),
    "idefics3": ("HuggingFaceM4/Idefics3-8B-Llama3", "framed tiles in rows; the projector merges"),
    "smolvlm": ("HuggingFaceTB/SmolVLM2-2.2B-Instruct", "the same"),
    "paligemma": (
        "google/paligemma2-3b-mix-448",
        "one picture; the whole prompt is read both ways",
    ),
    "gemma3": ("google/gemma-3-4b-it", "256 tokens, read both ways among each other"),
}

#: What a method must be given on any model -> (a setting with it, the word in the table).
GIVEN = {
    "ACT": ("ACT(heads_by_layer=((1, (0, 1)),))", "heads"),
    "HeadAblation": ("HeadAblation(heads_by_layer=((1, (0, 1)),))", "heads"),
    "PH3": ("PH3(heads_by_layer=((1, (0, 1)),))", "heads"),
    "SeeingKnowing": ("SeeingKnowing(image_heads=((1, (0, 1)),))", "heads"),
    "StreamingHeads": ("StreamingHeads(heads_by_layer=((1, (0, 1)),))", "heads"),
    "ZeroTuning": ("ZeroTuning(heads_by_layer=((1, (0, 1)),))", "heads"),
    "VAR": ("VAR(sink_dims=(2, 7), tau=0.9)", "sinks"),
    "DyVTE": ("DyVTE(exit_layer=1)", "weights"),
    "ImbalancedAttention": ("ImbalancedAttention(tower_score='column_mean')", "option"),
}
#: Small pictures have fewer features than the default grid of a real one.
SMALL = {"CrossLMM": "CrossLMM(grid=2)"}
#: Runs at once, and does what the paper means after a training.
TRAINED = ("CrossLMM", "DARA", "MMA")

INTRODUCTION = """# Models supported

<!-- Written by tools/build_docs.py from the family table and from `mmlm doctor`; do not edit. -->

mmlm works on stock models of transformers, without a class of its own: a method is hooks on the
parts that every vision-language model has. Where those parts are in a family is one row of
`mmlm/engine/families.py`. A model type without a row is tried with the usual names, and if a part
is missing, the error names it.

    mmlm doctor llava-hf/llava-1.5-7b-hf      # reads the small files only, no weights
    mmlm doctor ./my-model --load --json

| family | class in transformers | vision tower | pictures | for example |
| --- | --- | --- | --- | --- |
"""

LEGEND = """
## Which method runs on which

*yes*: at its defaults. *heads*: once its heads are found, by `mmlm calibrate heads`, those of PH3
and SeeingKnowing by `mmlm calibrate conflict-heads`. *sinks*: once the model's sink dimensions are
known (`mmlm calibrate sink-dims`; the published ones are built in). *weights*: once its routers
are trained, or with a fixed `exit_layer`. *option*: with `tower_score='column_mean'`, since the
tower has no class token. *train*: it runs, and does what its paper means after
[a training](model-side.md). **no**: see below.

"""


def models_page() -> str:
    """The page."""
    import tiny

    import mmlm

    lines, answers = [INTRODUCTION.rstrip()], {}
    for family in tiny.ALL:
        model, processor = tiny.build(family)
        answers[family] = _support(mmlm.Anatomy(model), processor, model)
        lines.append(_family_row(family, mmlm.Anatomy(model)))
    columns = [family.replace("_", " ") for family in answers]
    lines += [LEGEND.rstrip(), "", f"| method | {' | '.join(columns)} |"]
    lines.append(f"| --- |{' --- |' * len(columns)}")
    refusals: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in mmlm.method_names():
        words = []
        for family, support in answers.items():
            word, reason = support[name]
            words.append(word)
            if reason:
                refusals[name, reason].append(family)
        lines.append(f"| [{name}](methods.md#{name.lower()}) | {' | '.join(words)} |")
    lines += ["", "Why not:", ""]
    for (name, reason), families in refusals.items():
        lines.append(f"* **{name}** on {', '.join(f'`{f}`' for f in families)}: {reason}.")
    return "\n".join(lines) + "\n"


def _family_row(family: str, anatomy: Any) -> str:
    checkpoint, pictures = CHECKPOINTS[family]
    kind = type(anatomy.model).__name__
    tower = type(anatomy.parts()["vision tower"][0]).__name__
    return f"| `{family}` | `{kind}` | `{tower}` | {pictures} | `{checkpoint}` |"


def _support(anatomy: Any, processor: Any, model: Any) -> dict[str, tuple[str, str]]:
    """Per method the word in the table, and the reason where it is no."""
    import mmlm
    from mmlm.cli.doctor import examine

    refused = examine(model, processor)["methods"]
    found = {}
    for name, reasons in refused.items():
        word = "train" if name in TRAINED else "yes"
        if reasons and name in GIVEN | {n: (text, word) for n, text in SMALL.items()}:
            text, word = GIVEN.get(name) or (SMALL[name], word)
            reasons = anatomy.supports(mmlm.parse_method(text))
        found[name] = ("**no**", reasons[0]) if reasons else (word, "")
    return found
