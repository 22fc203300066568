"""Training-free methods, one file each."""

from decoding.vcd import VCD
from decoding.vhr import VHR

__all__ = ["VCD", "VHR"]
