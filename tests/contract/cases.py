"""Which methods and families the contract matrix covers: every exported method, by itself."""

from __future__ import annotations

import mmlm

FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl")
METHODS = tuple(getattr(mmlm, name) for name in mmlm.method_names())

#: A setting that must change the logits of a random tiny model. Defaults are strong enough for
#: every method so far; a method whose default is too weak names a stronger one here.
STRONG: dict[str, str] = {}


def strong(cls):
    """The method at a setting that visibly changes a tiny random model."""
    return mmlm.parse_method(STRONG.get(cls.__name__, cls.__name__))
