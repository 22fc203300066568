"""TRL's columns as raw strings: rendered for one model, nothing left for TRL to template.

``prompt`` is the model's own template with picture placeholders, and behind it the context in a
turn that stays open; ``chosen`` and ``rejected`` go on from there. TRL adds neither a beginning
nor an end to raw strings, so both are written here: the beginning if the model's tokenizer puts one
before every text and the template does not, the end behind answers that end their turn.

TRL tokenises prompt and answers by themselves. Where that gives other tokens than the whole text
would, the first token of an answer differs from what the model says itself; a collator that
tokenises them together does not have this.
"""

from __future__ import annotations

from typing import Any

from data_tools.convert.preference import Message, PreferenceRecord, Unwritable
from mmlm.answers import answer_frame

__all__ = ["FORMS", "SUMMARY", "Renderer"]

SUMMARY = "TRL's columns as raw strings, rendered for the model of --model"
FORMS = ("jsonl", "parquet", "folder")


class Renderer:
    """Writes records for one model.

    Args:
        processor: Its processor, with a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        tokenizer = processor.tokenizer
        ids = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token
        starts = bos is not None and len(ids) > 0 and ids[0] == tokenizer.bos_token_id
        self._beginning = bos if starts else ""

    def row(self, record: PreferenceRecord) -> dict[str, Any]:
        """Writes one record.

        Raises:
            Unwritable: If it has no worse answer.
            InputError: If the template refuses the prompt.
        """
        if record.rejected is None:
            raise Unwritable(
                f"The record {record.id!r} has no rejected answer.",
                advice="Preferences need two answers; write --to llava for supervised training.",
            )
        prompt: list[Message] = [dict(message) for message in record.prompt]
        text, joiner, closing = answer_frame(self._processor, prompt)
        if self._beginning and not text.startswith(self._beginning):
            text = self._beginning + text
        if record.context:
            text, joiner = f"{text}{joiner}{record.context}", " "
        ends = [
            closing if complete else ""
            for complete in (record.chosen_complete, record.rejected_complete)
        ]
        return {
            "id": record.id,
            "images": list(record.images),
            "prompt": text,
            "chosen": f"{joiner}{record.chosen}{ends[0]}",
            "rejected": f"{joiner}{record.rejected}{ends[1]}",
        }
