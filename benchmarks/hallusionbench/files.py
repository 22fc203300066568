"""HallusionBench in the file of the authors' evaluation.py: answers and verdicts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from benchmarks.hallusionbench.questions import Entry, entries_of, entry_of
from benchmarks.hallusionbench.verdicts import judge_verdicts, read_same
from benchmarks.judges import judged
from benchmarks.stored import answer_text
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Line = Mapping[str, Any]

__all__ = ["read_answers", "write_official"]

_ANSWER = "model_prediction"
_VERDICT = "gpt4v_output_gpt_check"


def write_official(path: Path, lines: Sequence[Line]) -> None:
    """Writes answers, and verdicts if there are any, as the authors' evaluation.py reads them.

    Raises:
        InputError: If an answer is missing.
    """
    entries = entries_of(lines)
    verdicts = judge_verdicts(lines)
    codes = {"correct": "1", "incorrect": "0", "unclear": "2"}
    records = []
    for number, line in enumerate(lines, start=1):
        entry, text = entries[line["id"]], answer_text(line, number)
        if text is None:
            raise InputError(
                f"Line {number} ({line['id']!r}) has no answer.",
                advice="Repeat the failed questions; the official script cannot skip any.",
            )
        record: dict[str, Any] = {
            name: getattr(entry, name) for name in Entry.__dataclass_fields__ if name != "label"
        }
        record["gt_answer_details"] = record.pop("reference")
        record["gt_answer"] = "1" if entry.label == "yes" else "0"
        record["filename"] = f"./{entry.image}" if entry.image else None
        record[_ANSWER] = text
        if verdict := verdicts[line["id"]]:
            record[_VERDICT] = codes[verdict]
            # Where the flag decides nothing the authors' script still wants one.
            record["same"] = str(int(read_same(judged.reply(line, "same") or "")))
        records.append(record)
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_answers(path: Path, judge: str = "official-file") -> list[dict[str, Any]]:
    """Reads stored answers, or the authors' result file with its verdicts.

    Args:
        path: Answers of `mmlm bench hallusionbench`, or records with ``model_prediction`` and
            perhaps ``gpt4v_output_gpt_check`` and ``same``.
        judge: Name of the judge in the authors' file, for the name of the result.

    Raises:
        InputError: If the file cannot be read or a record is damaged.
    """
    records = read_records(path)
    if _ANSWER not in records[0]:
        return judged.read_answers(path)
    lines = []
    for number, record in enumerate(records, start=1):
        entry = entry_of(record, f"{path}, entry {number}")
        line = {"id": entry.id, **asdict(entry), "image": entry.image}
        line["text"] = record.get(_ANSWER)
        if _VERDICT in record:
            words = {"0": "incorrect", "1": "correct", "2": "unclear"}
            word = words.get(str(record[_VERDICT]))
            if word is None:
                raise InputError(
                    f"{path}, entry {number}: the verdict is {record[_VERDICT]!r}.",
                    advice="Verdicts are 0 (incorrect), 1 (correct) and 2 (unclear).",
                )
            line |= {"judge": judge, "judged": {"correctness": {"reply": word}}}
            if "same" in record:
                flag = "same" if str(record["same"]) == "1" else "different"
                line["judged"]["same"] = {"reply": flag}
        lines.append(line)
    return lines
