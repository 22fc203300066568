"""The errors that mmlm raises on purpose, each with one line of advice.

Constructors of methods and configurations raise plain ``ValueError``; everything that concerns a
model, a prompt, a file or a request raises one of the classes below. The command line prints the
message and the advice, and turns every one of them into an exit code (2: nothing was done).
"""

__all__ = [
    "HiddenAttention",
    "ImageReadError",
    "IncompatibleMethods",
    "InputError",
    "LayoutError",
    "MissingTensors",
    "MmlmError",
    "NeedsDynamicCache",
    "RefusedMode",
    "UnknownPlaceholder",
    "UnknownTower",
    "UnsupportedAttention",
    "UnsupportedModel",
    "raise_for",
]


class MmlmError(Exception):
    """Base class: what was given and what is allowed, plus ``advice``: what to do now.

    Args:
        message: What was given, and what is allowed.
        advice: One line that tells the user what to do.
    """

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(message)
        self.advice = advice


class InputError(MmlmError):
    """A request that cannot be carried out as given; found before any work was done."""


class UnsupportedModel(MmlmError, TypeError):  # noqa: N818  (the name says what it is)
    """A model lacks a part that a method needs; names the part, the class and what was tried."""


class UnknownTower(UnsupportedModel, NotImplementedError):  # noqa: N818
    """A vision tower is built in a way that a method on its patches does not know."""


class HiddenAttention(UnsupportedModel, NotImplementedError):  # noqa: N818
    """A layer's attention does not go through the library's interface, so no probe can see it."""


class UnsupportedAttention(UnsupportedModel, ValueError):  # noqa: N818
    """A model's attention, as it is set now, cannot be told what a method opens in its mask."""


class IncompatibleMethods(MmlmError, RuntimeError):  # noqa: N818
    """Two methods, or a method and a generation mode, cannot work together."""


class NeedsDynamicCache(IncompatibleMethods, NotImplementedError):  # noqa: N818
    """A method makes caches shorter, and the cache given has a fixed size."""


class RefusedMode(IncompatibleMethods, ValueError):  # noqa: N818
    """A way of generating that would silently give methods something else than the prompt."""


class LayoutError(MmlmError, ValueError):
    """The positions of image, prompt and answer cannot be told from the inputs."""


class ImageReadError(MmlmError):
    """A picture cannot be read safely; names the file and the reason."""


class MissingTensors(MmlmError):  # noqa: N818
    """A checkpoint lacks tensors or holds unexpected ones; lists their names."""


class UnknownPlaceholder(UnsupportedModel, ValueError):  # noqa: N818
    """A model's configuration does not say which token stands where a picture is."""


def raise_for(
    kinds: dict[str, list[str]],
    what: str,
    advice: str = "The files do not belong together or are incomplete; save or copy them again.",
) -> None:
    """Raises if any tensor is out of place, naming all of them."""
    found = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if found:
        raise MissingTensors(f"{what}; tensors {'; '.join(found)}", advice=advice)
