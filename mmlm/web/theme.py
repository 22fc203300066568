"""How the pages look: system fonts only, the colours of our reports, light and dark."""

from __future__ import annotations

from importlib import resources

import gradio as gr

__all__ = ["head", "script", "stylesheet", "theme"]

_SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace")


def theme() -> gr.themes.Base:
    """The theme: paper and ink, one accent; fonts that the visitor's system has anyway."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        font=[gr.themes.Font(name) for name in _SANS],
        font_mono=[gr.themes.Font(name) for name in _MONO],
    ).set(
        body_background_fill="#fbfaf7",
        body_background_fill_dark="#15171c",
        body_text_color="#20242c",
        body_text_color_dark="#e8e6e1",
        body_text_color_subdued="#666d7a",
        body_text_color_subdued_dark="#a0a6b2",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1e2128",
        background_fill_secondary="#f6f4ef",
        background_fill_secondary_dark="#1a1d23",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1e2128",
        block_border_color="#e3e1da",
        block_border_color_dark="#343842",
        border_color_primary="#e3e1da",
        border_color_primary_dark="#343842",
        input_background_fill="#ffffff",
        input_background_fill_dark="#15171c",
        button_primary_background_fill="#3b5bdb",
        button_primary_background_fill_hover="#2f4bc0",
        button_primary_background_fill_dark="#4263eb",
        button_primary_background_fill_hover_dark="#5c7cfa",
        button_primary_text_color="#ffffff",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0",
        block_title_text_weight="600",
        block_shadow="none",
        input_border_color="#d9d6cd",
        input_border_color_dark="#3d424d",
        input_border_width="1px",
        input_shadow="none",
        input_shadow_focus="0 0 0 2px #3b5bdb55",
        slider_color="#3b5bdb",
        slider_color_dark="#748ffc",
        button_large_text_size="0.95rem",
        button_large_text_weight="500",
        button_large_padding="8px 14px",
        button_small_text_weight="500",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_hover="#f1efe9",
        button_secondary_background_fill_dark="#262a32",
        button_secondary_background_fill_hover_dark="#30353f",
        button_secondary_border_color="#d9d6cd",
        button_secondary_border_color_dark="#3d424d",
        button_border_width="1px",
        button_secondary_text_color="#20242c",
        button_secondary_text_color_dark="#e8e6e1",
        color_accent="#3b5bdb",
        color_accent_soft="#eef1fd",
        color_accent_soft_dark="#252d4a",
    )


def stylesheet() -> str:
    """Our own rules, behind the theme's."""
    return _file("web.css")


def script(name: str) -> str:
    """A script of ours, to be given to an event or a component.

    Args:
        name: Of a file in this package.
    """
    return _file(name)


def head() -> str:
    """What stands in every page's head: no icon is asked for elsewhere, no address goes out."""
    return '<meta name="referrer" content="no-referrer">'


def _file(name: str) -> str:
    return resources.files("mmlm.web").joinpath(name).read_text("utf-8")
