"""StreamingHeads: some heads see only the first and the latest tokens, as a smaller cache would.

Paper: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
Xiao et al., ICLR 2025, arXiv 2410.10819. Sources read: the abstract and the authors' code
(mit-han-lab/duo-attention, commit fe93c31, MIT); nothing is copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.head_maps import Head, HeadMap
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import HeadSet, by_layer, check_heads, check_shape, read_heads

__all__ = ["StreamingHeads", "in_window", "streamed"]


def in_window(
    query: Int[Tensor, "*#B"], key: Int[Tensor, "*#B"], *, sink: int, recent: int
) -> Bool[Tensor, "*B"]:
    """Whether a streaming head's query may see a key; the model's own mask comes on top.

    Args:
        query: Positions, counted from the first real token.
        key: The same.
        sink: So many first keys.
        recent: So many latest keys, the query's own among them.
    """
    return (key < sink) | (query - key < recent)


def streamed(
    a: Float[Tensor, "B H R K"], inside: Bool[Tensor, "B #H R K"]
) -> Float[Tensor, "B H R K"]:
    """Rows without the keys outside; they sum to 1 again.

    A row that had nothing outside stays as it is, bit for bit, and so does one that has nothing
    else.
    """
    left = a.masked_fill(~inside, 0)
    total = left.sum(-1, keepdim=True)
    lost = (a - left).amax(-1, keepdim=True) > 0
    edited = left / total.clamp(min=torch.finfo(a.dtype).tiny)
    return torch.where(lost & (total > 0), edited, a)


@dataclass(frozen=True, eq=False)
class _State:
    """What is kept for one prompt.

    Attributes:
        prompt: Tells a prompt's first pass from later ones.
        first: int64 [B]; first real position.
        visual: Bool [B, N].
        heads: int64 [h] by layer; the streaming heads.
    """

    prompt: Prompt
    first: Tensor
    visual: Tensor
    heads: dict[int, Tensor]


@dataclass(frozen=True, kw_only=True)
class StreamingHeads(Method):
    """Lets heads see first and latest tokens only: an experiment, saves no memory.

    Idea:
        Most heads live on attention sinks and on what came last, so their cache could be short. Of
        a picture at the front they would soon see nothing. Does the answer still know it? This
        simulates the accuracy. It saves no memory and no time: keys stay in the cache, and rows of
        attention are computed a second time.
    Paper:
        "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
        arXiv 2410.10819, ICLR 2025.
    Equations:
        None is numbered in the sources read; from the code: query i sees key j if ``j <= i`` and
        (``j < sink`` or ``i - j < recent``): :func:`in_window`. Ours: the weights of all other
        keys are 0 and a row sums to 1 again, which is the same softmax: :func:`streamed`.
    Acts at:
        ``weights`` of streaming heads, in all rows from ``start`` on.
    Cost:
        No extra forward. Attention rows of layers with streaming heads are computed a second time
        wherever the sequence is longer than ``sink + recent``.
    Parameters:
        sink: Number of first tokens that stay visible, >= 0. Default 128 (published patterns).
        recent: Number of latest tokens, the query's own among them, >= 1. Default 256 (published
            patterns). None: all. Neutral None.
        keep_image: Whether image tokens stay visible, too. Default False.
        start: "prompt": all rows, as where the prompt is read with streaming heads (authors;
            default). "answer": the prompt is read in full, new tokens stream.
        heads_files: Files of `mmlm calibrate heads`, kind visual or text or both: the heads that
            they name see everything, all others stream.
        top: So many of each file's strongest heads, >= 1. None: those above its threshold.
        heads_by_layer: The streaming heads as ((layer, (head, ...)), ...) or ((layer, head), ...),
            instead of files. Neither: unknown, so that attaching is refused.
    Shapes:
        B rows, H query heads (h streaming ones), R query rows, K keys, N prompt positions.
    State:
        Per prompt: where it begins and which positions are image.
    Differs:
        No gates are trained: heads come from what was measured of them (``heads_files``). So
        there is no threshold by quantile, and no noise that breaks its ties.
        Each query head has its own kind; the authors' kinds are those of key-value heads.
        Left padding does not count as first tokens.
    Limits:
        Prompts without an image are left alone, like with every method here. Where images see
        themselves, keys behind a query stay visible.

    Raises:
        ValueError: for a parameter out of range; a head that the model does not have; a file that
            is missing, damaged, without heads, or of a model of another shape.
        UnsupportedModel: if no heads are given.

    Example:
        with StreamingHeads(heads_files=("visual.json",), sink=4, recent=64)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads"
        ),
        arxiv="2410.10819",
        year=2024,
        venue="ICLR 2025",
    )
    rewinds: ClassVar[bool] = True

    sink: int = 128
    recent: int | None = 256
    keep_image: bool = False
    start: Literal["prompt", "answer"] = "prompt"
    heads_files: tuple[str, ...] = ()
    top: int | None = None
    heads_by_layer: HeadSet | None = None

    def __post_init__(self) -> None:
        self._check_integer("sink", at_least=0)
        if self.recent is not None:
            self._check_integer("recent", at_least=1)
        self._check_choice("keep_image", (True, False))
        self._check_choice("start", ("prompt", "answer"))
        files = (self.heads_files,) if isinstance(self.heads_files, str) else self.heads_files
        object.__setattr__(self, "heads_files", tuple(files))
        if self.top is not None:
            self._check_integer("top", at_least=1)
            if not self.heads_files:
                raise ValueError("StreamingHeads: top chooses among the heads of heads_files.")
        if self.heads_by_layer is not None:
            if self.heads_files:
                raise ValueError("StreamingHeads: heads_by_layer excludes heads_files.")
            if isinstance(self.heads_by_layer, str):
                raise ValueError(
                    "StreamingHeads: heads_by_layer are those that stream; a file of heads that "
                    "see everything goes to heads_files."
                )
            given = read_heads("StreamingHeads", "heads_by_layer", self.heads_by_layer)
            object.__setattr__(self, "heads_by_layer", given)
        # Read once: what is wrong with a file is said here, and it cannot change while attached.
        maps = {name: self._read(name) for name in self.heads_files}
        object.__setattr__(self, "_maps", maps)
        object.__setattr__(self, "_streaming", self._others(maps))

    def _read(self, name: str) -> HeadMap:
        try:
            return HeadMap.load(name)
        except ValueError as error:
            raise ValueError(f"StreamingHeads: {error}.") from error

    def _others(self, maps: dict[str, HeadMap]) -> HeadSet:
        """The streaming heads: all that no file names."""
        full: set[Head] = set()
        for name, found in maps.items():
            try:
                chosen = found.heads if self.top is None else found.top(self.top)
            except ValueError as error:
                raise ValueError(f"StreamingHeads: {name!r}: {error}.") from error
            if not chosen:
                raise ValueError(
                    f"StreamingHeads: {name!r}: no head is above the threshold {found.threshold}; "
                    "give top."
                )
            full.update(chosen)
        if not maps:
            return self.heads_by_layer or ()
        shapes = {name: found.shape for name, found in maps.items()}
        if len(set(shapes.values())) > 1:
            raise ValueError(f"StreamingHeads: the files are of different models: {shapes}.")
        n_layers, n_heads = next(iter(shapes.values()))
        every = {(layer, head) for layer in range(n_layers) for head in range(n_heads)}
        return by_layer(every - full)

    def neutral(self) -> StreamingHeads:
        """A window without an end."""
        return type(self)(recent=None)

    @property
    def streaming(self) -> HeadSet:
        """The heads that stream."""
        heads: HeadSet = self._streaming  # type: ignore[attr-defined]
        return heads

    @property
    def rows(self) -> Rows:
        """All rows: what they write into the cache is used later."""
        return "all"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers with streaming heads."""
        return self.recent is not None and any(layer == at for at, _ in self.streaming)

    def acts_now(self, state: _State, layer: int) -> bool:
        """Not while the prompt is read, if only answers stream."""
        return self.start == "prompt" or state.prompt.past > 0

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs heads, of a model like this one."""
        maps: dict[str, HeadMap] = self._maps  # type: ignore[attr-defined]
        for name, found in maps.items():
            check_shape("StreamingHeads", name, found.shape, anatomy)
        check_heads("StreamingHeads", self.streaming, anatomy)
        if self.recent is not None and not (self.streaming or maps):
            return [
                "no heads are given; `mmlm calibrate heads --kind visual --output heads.json` "
                "finds those that must see everything"
            ]
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Notes where the prompt and its images are."""
        layout = prompt.layout
        heads = {
            layer: torch.tensor(chosen, device=layout.seg.device)
            for layer, chosen in self.streaming
        }
        return _State(prompt, layout.real.long().argmax(-1), layout.visual, heads)

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Rows of the streaming heads without the middle."""
        keys = a.shape[-1]
        if self.recent is None or keys <= self.sink + self.recent:
            return None
        first = state.first[:, None, None]
        key = torch.arange(keys, device=a.device) - first
        inside = in_window(rows[..., None] - first, key, sink=self.sink, recent=self.recent)
        if self.keep_image:
            n = state.visual.shape[1]
            inside[..., :n] |= state.visual[:, None]
        heads = state.heads[layer]
        return a.index_copy(1, heads, streamed(a[:, heads], inside[:, None]))
