"""Training-free methods, one file each."""

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

__all__ = [
    "ACT",
    "ICD",
    "INTER",
    "M3ID",
    "ONLY",
    "OPERA",
    "PAI",
    "PH3",
    "VAR",
    "VCD",
    "VHR",
    "VISTA",
    "DoLa",
    "HeadAblation",
    "ImbalancedAttention",
    "SeeingKnowing",
    "StreamingHeads",
    "ZeroTuning",
]
