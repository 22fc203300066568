"""What lmms-eval asks of the task `world_pope`: pictures, question, score."""

from benchmarks.pope import PARSERS
from mmlm.inputs import load_image


def pictures(doc):
    """The picture of a question."""
    return [load_image(doc["image"])]


def question(doc, lmms_eval_specific_kwargs=None):
    """What the model is asked."""
    return doc["text"]


def score(doc, answers):
    """Reads the answer as `pope/strict` does; one that is neither yes nor no is wrong."""
    said = PARSERS["strict"].read(answers[0], doc["label"])
    return {
        "accuracy": float(said is not None and said == (doc["label"] == "yes")),
        "yes_ratio": float(said is True),
    }
