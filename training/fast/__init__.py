"""Preference training without doing the same work twice; TRL's loss code stays as it is.

Both answers of a pair share the prompt, the pictures and the answer's begun part. TRL's rows repeat
them: every picture passes the vision tower four times (chosen, rejected, and both again for the
reference), and every prompt token passes the decoder twice per model. Two switches, alone or
together, each tested equal to the plain rows in loss and gradients:

    install_features_once   each picture through tower and projector once per batch
    install_shared_prefix   prompt and pictures through the decoder once per model
"""

from training.fast.features_once import FeaturesOnce, install_features_once
from training.fast.lengths import install_length_guard
from training.fast.shared_prefix import SharedPrefix, install_shared_prefix

__all__ = [
    "FeaturesOnce",
    "SharedPrefix",
    "install_features_once",
    "install_length_guard",
    "install_shared_prefix",
]
