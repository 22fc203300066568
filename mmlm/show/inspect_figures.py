"""The figures of an inspection, and its numbers as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmlm.pages import escaped
from mmlm.show import figures
from mmlm.show.figures import Panel, Tile
from mmlm.show.head_figures import draw_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from mmlm.show.inspection import Arm, Inspection
    from mmlm.show.spots import Spot

__all__ = [
    "draw_copies",
    "draw_first",
    "draw_heads",
    "draw_layers",
    "draw_looks",
    "draw_magnets",
    "draw_norms",
    "draw_sinks",
    "draw_words",
    "stage_table",
]

_TILES = 6
"""Words in a row of a sheet."""


def draw_words(inspection: Inspection, shown: Sequence[Spot], image: int = 0) -> Figure | None:
    """A row per answer: the picture's map for its first words, of one scale per word.

    Args:
        inspection: The answers.
        shown: The words; of each answer the first six that it says.
        image: Number of the picture.

    Returns:
        None if no attention over pictures was measured.
    """
    if not any(arm.look for arm in inspection.arms):
        return None
    picture = inspection.pictures[image].image
    rows: dict[str, list[Tile]] = {}
    for number, arm in enumerate(inspection.arms):
        said = [spot for spot in shown if number in spot.said]
        said.sort(key=lambda spot: spot.said[number].start)
        rows[arm.name] = [Tile("the picture", picture.convert("RGB"))]
        rows[arm.name] += [_word(inspection, spot, number, image) for spot in said[:_TILES]]
    return figures.sheet(rows)


def _word(inspection: Inspection, spot: Spot, number: int, image: int) -> Tile:
    """One answer's map of a word; all answers that say it have one scale."""
    maps = inspection.maps({i: (s.start, s.end) for i, s in spot.said.items()}, image)
    peak = max(float(values.max()) for values, _ in maps.values())
    values, share = maps[number]
    drawn = figures.overlay(inspection.pictures[image].image, values, peak=peak, side=320)
    verdict = {"good": "found: ", "bad": "invented: "}.get(spot.said[number].kind, "")
    return Tile(f"{verdict}{spot.text}", drawn, f"{share:.0%} on the picture")


def draw_layers(inspection: Inspection) -> Figure | None:
    """Attention on the pictures, MDI, sinks in pictures and first tokens, layer by layer.

    Returns:
        None if nothing of it was measured.
    """
    measured: list[tuple[Panel, bool]] = [
        (
            Panel(
                "Attention on the pictures",
                "share",
                {arm.name: arm.attention_on_pictures() for arm in inspection.arms},
            ),
            any(arm.look for arm in inspection.arms),
        ),
        (
            Panel(
                "Text dominance: attention per text token over attention per image token",
                "MDI",
                {arm.name: arm.dominance("mdi") for arm in inspection.arms},
                even=1.0,
                logarithmic=True,
            ),
            any(arm.dominance("mdi") for arm in inspection.arms),
        ),
        (
            Panel(
                "Attention on visual sinks",
                "share",
                {arm.name: _on_sinks(arm) for arm in inspection.arms},
            ),
            any(_on_sinks(arm) for arm in inspection.arms),
        ),
        *_first_tokens(inspection),
    ]
    panels = [panel for panel, there in measured if there]
    return figures.layers(panels) if panels else None


def _on_sinks(arm: Arm) -> dict[int, float | None]:
    record = arm.records.get("visual_sinks")
    if record is None:
        return {}
    return dict(zip(record["layers"], record["attention"]["visual_sink"], strict=True))


def _first_tokens(inspection: Inspection) -> list[tuple[Panel, bool]]:
    """In how many heads the first token is a sink, by how much attention makes it one."""
    found = _attention_sinks(inspection)
    levels = next(iter(found.values()))["first_above"] if found else {}
    panels = []
    for eps in levels:
        curves = {
            name: dict(zip(record["layers"], record["first_above"][eps], strict=True))
            for name, record in found.items()
        }
        title = f"Heads in which the first token gets more than {eps} of the attention"
        panels.append((Panel(title, "share", curves), True))
    return panels


def draw_heads(inspection: Inspection) -> Figure | None:
    """The relative head divergence of every layer and head.

    Returns:
        None if it was not measured.
    """
    return _of_heads(inspection, "head_divergence")


def draw_looks(inspection: Inspection) -> Figure | None:
    """For how many tokens each head looked at a picture before everything else.

    Returns:
        None if `mmlm.VisualHeads` did not measure it.
    """
    return _of_heads(inspection, "visual_heads")


def draw_copies(inspection: Inspection) -> Figure | None:
    """For how many tokens each head looked at the same token in the prompt.

    Returns:
        None if `mmlm.RetrievalHeads` did not measure it.
    """
    return _of_heads(inspection, "retrieval_heads")


def draw_norms(inspection: Inspection) -> Figure | None:
    """How large each head's query was beside those of its layer.

    Returns:
        None if `mmlm.QueryNorms` did not measure it.
    """
    return _of_heads(inspection, "query_norms")


def draw_first(inspection: Inspection) -> Figure | None:
    """How much attention the first token gets in every head.

    Returns:
        None if `mmlm.AttentionSinks` did not measure it.
    """
    return _of_heads(inspection, "attention_sinks")


def _of_heads(inspection: Inspection, measures: str) -> Figure | None:
    return draw_records({arm.name: arm.records.get(measures) for arm in inspection.arms}, measures)


def draw_magnets(inspection: Inspection, model: Any, processor: Any) -> Figure | None:
    """Where the first picture draws attention from most queries: in how many heads a place does.

    Args:
        inspection: The answers.
        model: The model.
        processor: Its processor.

    Returns:
        None if `mmlm.AttentionSinks` did not look, or it is not known where tokens lie in the
        picture.
    """
    import torch

    counted = {}
    for name, record in _attention_sinks(inspection).items():
        pairs = [pair for layer in record["sinks"] for pair in layer[0]]
        heads = torch.zeros(record["keys"][0])
        for number, times in pairs:
            heads[number] += times
        every = len(record["map"]) * len(record["map"][0])
        tokens = int((heads > 0).sum())
        text = _tokens(tokens)
        if tokens:
            text += f"; the strongest in {int(heads.max())} of {every} heads"
        if record.get("agreement") is not None:
            text += f"; {record['agreement']:.0%} of them stand out in the states"
        counted[name] = (heads, text)
    return _in_picture(inspection, model, processor, counted)


def _attention_sinks(inspection: Inspection) -> dict[str, Any]:
    """Records of mmlm.AttentionSinks that had a query, by answer."""
    records = {arm.name: arm.records.get("attention_sinks") for arm in inspection.arms}
    return {name: r for name, r in records.items() if r is not None and r["queries"]}


def draw_sinks(inspection: Inspection, model: Any, processor: Any) -> Figure | None:
    """Where the sinks of the first picture are: in how many layers a place is one.

    Args:
        inspection: The answers.
        model: The model.
        processor: Its processor.

    Returns:
        None if sinks were not looked for, or it is not known where tokens lie in the picture.
    """
    import torch

    records = {arm.name: arm.records.get("visual_sinks") for arm in inspection.arms}
    counted = {}
    for name, record in records.items():
        if record is None:
            continue
        counts = torch.zeros(record["keys"][0])
        for layer in record["sinks"]:
            counts[layer[0]] += 1
        layers = sum(bool(layer[0]) for layer in record["sinks"])
        tokens = int((counts > 0).sum())
        text = f"{_tokens(tokens)}, in {layers} of {len(record['layers'])} layers"
        counted[name] = (counts, text)
    return _in_picture(inspection, model, processor, counted)


def _tokens(number: int) -> str:
    return {0: "no token", 1: "1 token"}.get(number, f"{number} tokens")


def _in_picture(
    inspection: Inspection, model: Any, processor: Any, counted: dict[str, tuple[Tensor, str]]
) -> Figure | None:
    """A row per answer: the first picture, and what was counted at its tokens with a caption."""
    from mmlm.token_brightness import KNOWN
    from mmlm.token_places import footprints

    if not counted or model.config.model_type not in KNOWN:
        return None
    picture = inspection.pictures[0].image
    places = footprints(model, processor, picture.size)
    rows = {}
    for name, (counts, text) in counted.items():
        drawn = figures.overlay(picture, places.spread(counts).numpy(), side=320)
        rows[name] = [Tile("the picture", picture.convert("RGB")), Tile("sinks", drawn, text)]
    return figures.sheet(rows)


def stage_table(inspection: Inspection) -> str:
    """Early, middle and late layers in numbers, as an HTML table; "" if nothing was measured."""
    from mmlm.engine.stages import stage_layers

    n_layers = next(
        (
            arm.records["text_dominance"]["n_layers"]
            for arm in inspection.arms
            if "text_dominance" in arm.records
        ),
        0,
    )
    if not n_layers:
        return ""
    rows = []
    for stage, numbers in stage_layers(n_layers).items():
        cells = []
        for arm in inspection.arms:
            for figure in ("mdi", "aei_text", "aei_image"):
                of = arm.dominance(figure)
                values = [of[n] for n in numbers if of.get(n) is not None]
                mean = sum(v for v in values if v is not None) / len(values) if values else None
                cells.append("<td>-</td>" if mean is None else f"<td>{mean:.2f}</td>")
        of_stage = ", ".join(map(str, numbers))
        rows.append(f"<tr><th>{stage} (layers {of_stage})</th>{''.join(cells)}</tr>")
    names = "".join(f'<th colspan="3">{escaped(arm.name)}</th>' for arm in inspection.arms)
    heads = "<th>MDI</th><th>AEI text</th><th>AEI image</th>" * len(inspection.arms)
    return (
        "<h2>Text dominance in numbers</h2>"
        '<p class="note">MDI is attention per text token over attention per image token; AEI is a '
        "side's share of the attention over its share of the tokens, 1 where both are equal.</p>"
        f'<div class="panel scroll"><table><thead><tr><th></th>{names}</tr>'
        f"<tr><th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
