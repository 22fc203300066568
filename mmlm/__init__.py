"""mmlm: stop vision-language models from describing what is not in the image.

    import mmlm

    model, processor = mmlm.load("llava-hf/llava-1.5-7b-hf")
    with mmlm.VHR(alpha=2.0)(model):
        model.generate(**inputs)

Every name below is loaded when it is first used, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmlm import _torchvision_guard

__version__ = "0.1.0"

_METHODS = {
    "ACT": "decoding.act",
    "ClsPruner": "mmlm.methods.cls_pruner",
    "CrossLMM": "mmlm.methods.crosslmm",
    "DARA": "mmlm.methods.dara",
    "DoLa": "decoding.dola",
    "DyVTE": "mmlm.methods.dyvte",
    "FlowCut": "mmlm.methods.flowcut",
    "HeadAblation": "decoding.head_ablation",
    "ICD": "decoding.icd",
    "INTER": "decoding.inter",
    "ImbalancedAttention": "decoding.imbalanced_attention",
    "M3ID": "decoding.m3id",
    "MMA": "mmlm.methods.mma",
    "ONLY": "decoding.only",
    "OPERA": "decoding.opera",
    "PAI": "decoding.pai",
    "PH3": "decoding.ph3",
    "RandomPruner": "mmlm.methods.random_pruner",
    "SeeingKnowing": "decoding.ph3",
    "StreamingHeads": "decoding.streaming_heads",
    "VAR": "decoding.var",
    "VCD": "decoding.vcd",
    "VHR": "decoding.vhr",
    "VISTA": "decoding.vista",
    "ZeroTuning": "decoding.zerotuning",
}
_PROBES = {
    "AttentionMap": "mmlm.probes.attention_map",
    "AttentionSinks": "mmlm.probes.attention_sinks",
    "Confidence": "mmlm.probes.confidence",
    "HeadDivergence": "mmlm.probes.head_divergence",
    "ImageAttention": "mmlm.probes.image_attention",
    "QueryNorms": "mmlm.probes.query_norms",
    "RetrievalHeads": "mmlm.probes.retrieval_heads",
    "TextDominance": "mmlm.probes.dominance",
    "VisualHeads": "mmlm.probes.visual_heads",
    "VisualSinks": "mmlm.probes.visual_sinks",
}
_EXPORTS = {
    **_METHODS,
    **_PROBES,
    "Anatomy": "mmlm.engine.anatomy",
    "Method": "mmlm.engine.method",
    "TokenLayout": "mmlm.engine.layout",
    "attach": "mmlm.engine.attach",
    "build_in": "mmlm.engine.build_in",
    "compose": "mmlm.model.compose",
    "load": "mmlm.model.checkpoint",
    "measured": "mmlm.engine.attach",
    "method_names": "mmlm.text_form",
    "parse_method": "mmlm.text_form",
}

if TYPE_CHECKING:
    from decoding.act import ACT
    from decoding.dola import DoLa
    from decoding.head_ablation import HeadAblation
    from decoding.icd import ICD
    from decoding.imbalanced_attention import ImbalancedAttention
    from decoding.inter import INTER
    from decoding.m3id import M3ID
    from decoding.only import ONLY
    from decoding.opera import OPERA
    from decoding.pai import PAI
    from decoding.ph3 import PH3, SeeingKnowing
    from decoding.streaming_heads import StreamingHeads
    from decoding.var import VAR
    from decoding.vcd import VCD
    from decoding.vhr import VHR
    from decoding.vista import VISTA
    from decoding.zerotuning import ZeroTuning
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.attach import attach, measured
    from mmlm.engine.build_in import build_in
    from mmlm.engine.layout import TokenLayout
    from mmlm.engine.method import Method
    from mmlm.methods.cls_pruner import ClsPruner
    from mmlm.methods.crosslmm import CrossLMM
    from mmlm.methods.dara import DARA
    from mmlm.methods.dyvte import DyVTE
    from mmlm.methods.flowcut import FlowCut
    from mmlm.methods.mma import MMA
    from mmlm.methods.random_pruner import RandomPruner
    from mmlm.model.checkpoint import load
    from mmlm.model.compose import compose
    from mmlm.probes.attention_map import AttentionMap
    from mmlm.probes.attention_sinks import AttentionSinks
    from mmlm.probes.confidence import Confidence
    from mmlm.probes.dominance import TextDominance
    from mmlm.probes.head_divergence import HeadDivergence
    from mmlm.probes.image_attention import ImageAttention
    from mmlm.probes.query_norms import QueryNorms
    from mmlm.probes.retrieval_heads import RetrievalHeads
    from mmlm.probes.visual_heads import VisualHeads
    from mmlm.probes.visual_sinks import VisualSinks
    from mmlm.text_form import method_names, parse_method

__all__ = [
    "ACT",
    "DARA",
    "ICD",
    "INTER",
    "M3ID",
    "MMA",
    "ONLY",
    "OPERA",
    "PAI",
    "PH3",
    "VAR",
    "VCD",
    "VHR",
    "VISTA",
    "Anatomy",
    "AttentionMap",
    "AttentionSinks",
    "ClsPruner",
    "Confidence",
    "CrossLMM",
    "DoLa",
    "DyVTE",
    "FlowCut",
    "HeadAblation",
    "HeadDivergence",
    "ImageAttention",
    "ImbalancedAttention",
    "Method",
    "QueryNorms",
    "RandomPruner",
    "RetrievalHeads",
    "SeeingKnowing",
    "StreamingHeads",
    "TextDominance",
    "TokenLayout",
    "VisualHeads",
    "VisualSinks",
    "ZeroTuning",
    "attach",
    "build_in",
    "compose",
    "load",
    "measured",
    "method_names",
    "parse_method",
]

_torchvision_guard.install()


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
