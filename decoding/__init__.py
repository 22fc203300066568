"""Training-free methods, one file each."""

from decoding.dola import DoLa
from decoding.inter import INTER
from decoding.m3id import M3ID
from decoding.vcd import VCD
from decoding.vhr import VHR

__all__ = [
    "DoLa",
    "INTER",
    "M3ID",
    "VCD",
    "VHR",
]
