"""Preference data of others and of ours, from one format into another.

Every format is one small module in ``formats/``. One that can be read has ``recognises(row)`` and
``record(row, place, pictures)``; one that can be written has ``FORMS`` (of files) and
``row(record)``. In between there is one type, `data_tools.convert.preference.PreferenceRecord`.
"""

from __future__ import annotations

from data_tools.convert.formats import (
    llama_factory,
    llava,
    mia_dpo,
    ours,
    povid,
    rlaif_v,
    rlhf_v,
    sentinel,
    trl,
)
from data_tools.convert.formats.trl_text import FORMS as TEXT_FORMS
from data_tools.convert.formats.trl_text import SUMMARY as TEXT_SUMMARY

__all__ = ["FORMS", "READERS", "SUMMARIES", "TRL_TEXT", "WRITERS"]

READERS = {
    "mmlm": ours,
    "sentinel": sentinel,
    "rlhf-v": rlhf_v,
    "rlaif-v": rlaif_v,
    "povid": povid,
    "mia-dpo": mia_dpo,
    "llava": llava,
    "llama-factory": llama_factory,
    "trl": trl,
}
"""Formats that can be read, by name."""

WRITERS = {
    "mmlm": ours,
    "trl": trl,
    "llava": llava,
    "llama-factory": llama_factory,
}
"""Formats that can be written without a model."""

TRL_TEXT = "trl-text"
"""The format that is rendered for one model (`data_tools.convert.formats.trl_text`)."""

FORMS = {name: module.FORMS for name, module in WRITERS.items()} | {TRL_TEXT: TEXT_FORMS}
"""What files a format can be written to: by ending, or a ``folder`` that ``datasets`` loads."""

SUMMARIES = {name: module.SUMMARY for name, module in READERS.items()} | {TRL_TEXT: TEXT_SUMMARY}
"""One line about every format."""
