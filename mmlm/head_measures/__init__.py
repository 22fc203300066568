"""Measures which heads of a model are visual heads, and which are retrieval heads.

    found = visual_heads(model, processor, samples)  # pictures whose objects have places
    found.save("heads.json")
    with mmlm.HeadAblation(heads_file="heads.json", top=20)(model): ...

Answers are generated, not forced: what counts is what the model itself writes. Everything comes
from the run that wrote the answer, by :class:`mmlm.VisualHeads` and :class:`mmlm.RetrievalHeads`.
"""

from mmlm.head_measures.text import Needle, retrieval_heads, rouge_1_recall
from mmlm.head_measures.visual import (
    Grounded,
    Named,
    Observed,
    observed,
    tokens_of_boxes,
    tokens_of_mask,
    visual_heads,
)

__all__ = [
    "Grounded",
    "Named",
    "Needle",
    "Observed",
    "observed",
    "retrieval_heads",
    "rouge_1_recall",
    "tokens_of_boxes",
    "tokens_of_mask",
    "visual_heads",
]
