"""Preference rows with pictures in memory, for tests of rows and batches."""

from tiny import picture

from training.preference.rows import PreferenceRow

CHOSEN = "a cat sits on a red couch ."
REJECTED = "people watch the train !"
SIZES = ((64, 64), (100, 50), (50, 120))


def asked(question, n_images):
    """A prompt of one turn, its pictures first."""
    return (
        {
            "role": "user",
            "content": [{"type": "image"}] * n_images + [{"type": "text", "text": question}],
        },
    )


def pair(number=0, n_images=1, *, question="what is shown here ?", context="", **fields):
    """A row; pictures of different rows have different sizes."""
    sizes = [SIZES[(number + n) % 3] for n in range(n_images)]
    given = {
        "id": f"r{number}",
        "images": tuple(picture(10 * number + n, size) for n, size in enumerate(sizes)),
        "prompt": asked(question, n_images),
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "context": context,
    }
    return PreferenceRow(**{**given, **fields})


def sizes(row):
    return [image.size for image in row.images]


def scored(batch, tokenizer):
    """The text of each row's answer, as scored."""
    pairs = zip(batch["input_ids"], batch["completion_mask"], strict=True)
    return [tokenizer.decode(ids[mask.bool()]) for ids, mask in pairs]


def read(batch, tokenizer):
    """The text of each row that is read and not scored, padding left out."""
    rows = zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True)
    return [tokenizer.decode(ids[(seen - mask).bool()]) for ids, mask, seen in rows]
