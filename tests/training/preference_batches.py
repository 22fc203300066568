"""Preference batches of every family, written by hand: what collators emit, without one."""

from __future__ import annotations

import tiny
import torch
from transformers import PaliGemmaProcessor

#: (question, begun answer, chosen, rejected, number of pictures); the first tokens of some answers
#: agree, and lengths differ everywhere.
PAIRS = (
    ("describe the image in detail .", "", "a cat sits on a red couch", "a cat and a dog .", 1),
    (
        "what is shown here ?",
        " the quick brown fox .",
        "people watch",
        "the train , the station",
        2,
    ),
    ("is there a dog ? answer yes or no .", "", "no", "yes , near two remote controls", 0),
)


def batch(processor, pairs=PAIRS):
    """Rows [chosen; rejected] with pictures doubled, padded on the right."""
    if isinstance(processor, PaliGemmaProcessor):  # it refuses prompts without a picture
        pairs = [pair for pair in pairs if pair[4]]
    draws = iter(range(100))
    sizes = ((64, 64), (100, 50), (50, 120))
    pictures = [[tiny.picture(n := next(draws), sizes[n % 3]) for _ in range(p[4])] for p in pairs]
    prompts = tiny.inputs(processor, [pair[0] for pair in pairs] * 2, pictures * 2)
    end = processor.tokenizer.eos_token_id
    rows, scored, types = [], [], {n: [] for n in prompts if n.endswith("token_type_ids")}
    for row, pair in enumerate(2 * list(pairs)):
        begun, *answers = (
            processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in pair[1:4]
        )
        answer = answers[row >= len(pairs)] + [end]
        real = prompts["attention_mask"][row].bool()
        prompt = prompts["input_ids"][row][real].tolist() + begun
        rows.append(prompt + answer)
        scored.append([0] * len(prompt) + [1] * len(answer))
        for name, found in types.items():
            # PaliGemma: 0 is the prefix that sees itself both ways, 1 is the answer.
            kind = int(isinstance(processor, PaliGemmaProcessor))
            own = prompts[name][row][real].tolist() + [0] * len(begun)
            found.append(own + [kind] * len(answer))
    ids = _padded(rows, processor.tokenizer.pad_token_id)
    mask = _padded([[1] * len(row) for row in rows], 0)
    more = {name: _padded(found, 0) for name, found in types.items()}
    return {
        **prompts,
        **more,
        "input_ids": ids,
        "attention_mask": mask,
        "completion_mask": _padded(scored, 0),
    }


def _padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
