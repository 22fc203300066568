"""Conversations that the tests of supervised fine-tuning share."""

from training.sft.data import Example
from training.sft.rows import Conversation


def text(words):
    return {"type": "text", "text": words}


def row(n_images, *turns, name="r"):
    """A conversation whose pictures all stand at its beginning."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        pictures = [{"type": "image"}] * (0 if number else n_images)
        messages.append({"role": "user", "content": [*pictures, text(question)]})
        messages.append({"role": "assistant", "content": [text(answer)]})
    paths = tuple(f"{name}{n}.png" for n in range(n_images))
    return Conversation(name, paths, tuple(messages), f"rows.jsonl:{name}")


def example(*pairs):
    """(row, pictures) pairs as one packed example."""
    return Example(tuple(r for r, _ in pairs), tuple(tuple(p) for _, p in pairs))
