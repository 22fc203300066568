"""Pictures of visitors: a field to drop one, and a check that says in our words what is wrong."""

from __future__ import annotations

from abc import ABCMeta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmlm.errors import ImageReadError
from mmlm.images import load_image

if TYPE_CHECKING:
    from PIL import Image

    from mmlm.web.models import Limits

__all__ = ["checked", "picture_field"]


def picture_field(elem_id: str, *, height: int = 280) -> gr.Image:
    """A field for one picture; events get the path of the file, unread. Read it with `checked`.

    Args:
        elem_id: Id on the page.
        height: In pixels.
    """
    return _Field(
        label="Picture",
        show_label=False,
        format="png",
        type="filepath",
        sources=["upload", "clipboard"],
        buttons=[],
        height=height,
        elem_id=elem_id,
        placeholder="Drop a picture here\n- or -\nclick to choose one",
        alt_text="the picture that the model is asked about",
    )


def checked(path: str, limits: Limits) -> Image.Image:
    """A visitor's picture, decoded.

    Args:
        path: What the field gave.
        limits: Of the page.

    Raises:
        ImageReadError: If it cannot be read safely or is too large. It names the file as the
            visitor does: where it is stored here is nobody's business.
    """
    try:
        return load_image(path, limits.pixels)
    except ImageReadError as error:
        raise ImageReadError(
            str(error).replace(path, Path(path).name),
            advice="Try another picture: PNG, JPEG, WebP, GIF, BMP or TIFF.",
        ) from error


def _path(self: gr.Image, payload: Any) -> str | None:
    """The file that a visitor gave, unread: Gradio would open it and fail in its own words."""
    return payload.path if payload is not None else None


# A class, for Gradio makes a component anew when one of its properties is updated. It is made past
# Gradio's metaclass, which would write a .pyi file beside this module.
_Field: type[gr.Image] = ABCMeta.__new__(
    type(gr.Image),
    "PictureField",
    (gr.Image,),
    {"__module__": __name__, "is_template": True, "preprocess": _path},
)
