"""TRL's columns in chat form: ``images``, ``prompt``, ``chosen``, ``rejected``, all as messages.

What ``DPOTrainer`` of TRL 1.16 renders with the model's own chat template. The template closes
every answer and opens every turn, so an answer that continues a caption cannot be said: with the
context as an assistant's turn in ``prompt`` the answer would become a second turn with a header of
its own. Such pairs are refused here and written by `data_tools.convert.formats.trl_text`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import images, rest
from data_tools.convert.formats.ours import messages_of
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, RecordError, Unwritable

__all__ = ["FORMS", "SUMMARY", "record", "recognises", "row"]

SUMMARY = "TRL's columns as messages: images, prompt, chosen, rejected"
FORMS = ("jsonl", "parquet", "folder")


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    return all(
        isinstance(row.get(name), list) and row[name] and "role" in row[name][0]
        for name in ("prompt", "chosen", "rejected")
    )


def record(row: Mapping[str, Any], place: int, pictures: Pictures) -> PreferenceRecord:
    """Reads one row.

    Args:
        row: The row.
        place: Number of the row: the identifier of an entry without one.
        pictures: Finds the pictures.

    Raises:
        RecordError: If a field is missing or wrong.
    """
    paths = images(row.get("images", row.get("image")), pictures)
    prompt = list(row["prompt"])
    if prompt and isinstance(prompt[0].get("content"), str):
        # TRL puts all pictures before a first turn that is text only.
        blocks = [{"type": "image"}] * len(paths)
        first = [*blocks, {"type": "text", "text": prompt[0]["content"]}]
        prompt[0] = {**prompt[0], "content": first}
    return PreferenceRecord(
        id=str(row.get("id") or f"row-{place}"),
        images=paths,
        prompt=messages_of([{**one, "content": _blocks(one.get("content"))} for one in prompt]),
        chosen=_answer(row["chosen"]),
        rejected=_answer(row["rejected"]),
        meta=rest(row, "id", "images", "image", "prompt", "chosen", "rejected"),
    )


def _blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _answer(messages: list[Mapping[str, Any]]) -> str:
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        raise RecordError("an answer must be one turn of the assistant")
    parts = _blocks(messages[0].get("content"))
    if not isinstance(parts, list) or any(part.get("type") != "text" for part in parts):
        raise RecordError("an answer must be text")
    return "".join(part["text"] for part in parts)


def row(record: PreferenceRecord) -> dict[str, Any]:
    """Writes one record.

    Raises:
        Unwritable: If it has no worse answer, a context, or answers that do not end their turn.
    """
    if record.rejected is None:
        raise Unwritable(
            f"The record {record.id!r} has no rejected answer.",
            advice="Preferences need two answers; write --to llava for supervised training.",
        )
    if record.context or not record.complete:
        what = (
            "continues a caption (context)" if record.context else "does not end the caption it is"
        )
        raise Unwritable(
            f"The record {record.id!r} {what}, which TRL's chat form cannot express: its template "
            "would open another turn, or close this one, and train on that.",
            advice="Write --to trl-text with --model.",
        )
    return {
        "id": record.id,
        "images": list(record.images),
        "prompt": [dict(message) for message in record.prompt],
        "chosen": [{"role": "assistant", "content": record.chosen}],
        "rejected": [{"role": "assistant", "content": record.rejected}],
    }
