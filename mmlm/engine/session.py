"""One attachment of methods to one model: everything that changes while it lasts.

A :class:`Session` follows each prompt from its first forward pass to its last: it reads the layout,
asks the methods for their states, runs the auxiliary branches and edits the logits. It is reached
through hooks, i.e. it hangs on the modules and is seen from every thread that runs the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.attention.wanted import Wanted
from mmlm.engine.branches.auxiliary import Auxiliary, couple
from mmlm.engine.branches.blocks import is_plain
from mmlm.engine.branches.branch import Branch, BranchPrompt, Captured, Source
from mmlm.engine.branches.capture import capture
from mmlm.engine.branches.prefix import Filled
from mmlm.engine.branches.riders import with_riders
from mmlm.engine.combine import edit_logits, total
from mmlm.engine.layout import TokenLayout
from mmlm.engine.masks.turns import Handed
from mmlm.engine.method import IN_BRANCHES, MODULES, Method
from mmlm.engine.reading import Reader
from mmlm.engine.removal.compaction import Compaction, choose_features
from mmlm.engine.vision.deepstack import stacked, unstacked
from mmlm.engine.vision.sight import Sight, encode_first
from mmlm.engine.vision.tower_pass import kept_by_row
from mmlm.engine.weights import worn
from mmlm.errors import IncompatibleMethods, LayoutError

if TYPE_CHECKING:
    from mmlm.engine.attention.rows import AttentionRows
    from mmlm.engine.masks.openings import Openings
    from mmlm.engine.removal.pruning import Pruning
    from mmlm.engine.vision.originals import Originals
    from mmlm.engine.vision.pooling import Pooling

__all__ = ["Moment", "Session"]


@dataclass(frozen=True)
class Moment:
    """Where a session stood when a layer ran, for when its activations are computed again.

    Attributes:
        states: The methods' states.
        layout: Roles of the prompt's positions.
        past: Positions before the pass.
        kept: Positions of the columns that the layer got.
        untouched: Rows without an image, if there are any.
    """

    states: list[Any]
    layout: TokenLayout
    past: int
    kept: Tensor
    untouched: Tensor | None


class Session:
    """Everything that changes while methods are attached. Also the ``Prompt`` they see."""

    def __init__(
        self,
        anatomy: Anatomy,
        methods: tuple[Method, ...],
        layout: TokenLayout | None,
        processor: Any = None,
    ) -> None:
        self.model = anatomy.model
        self.methods = methods
        self.lasting: tuple[Method, ...] = ()  # those that are built into the model
        self.lent: dict[str, nn.Module] = {}  # weights of the others, for this block only
        self.anatomy = anatomy
        self._reader = Reader(self, layout, processor)
        self._layout: TokenLayout | None = None
        self.source: Source | None = None
        self.states: list[Any] = [None] * len(methods)
        self.finished: list[Any] = list(self.states)  # of the last prompt, for what was measured
        self._back: Moment | None = None  # the moment that a layer is computed for again
        self.quiet = False  # an auxiliary pass is running: temporary methods are off
        self._deep: list[Tensor] = []  # what it adds to the outputs of the first layers
        self._captured: dict[tuple[Any, ...], Captured] = {}
        self._cache: Any = None
        self._positions: Tensor | None = None  # position ids of the current main pass
        self._new_ids: Tensor | None = None
        self._new_mask: Tensor | None = None  # 2-D, if the running pass has one
        self._prefilling = False  # the running main pass is a prompt's first
        self.past = 0  # positions before the running main pass
        self.attending: AttentionRows | None = None  # the attention call that is being edited
        self.wanted = Wanted(methods)  # which rows of attention they get
        self._auxiliary: Auxiliary | None = None
        self._release: Callable[[], None] | None = None
        self.branches = tuple(dict.fromkeys(b for m in methods for b in m.branches))
        self.riders = tuple(dict.fromkeys(b for m in methods for b in m.riders))
        self.riding = 0  # auxiliary rows below the main ones in the pass that is running
        self.untouched: Tensor | None = None  # bool [B]: rows without an image, if there are any
        self._beta = max(m.plausibility for m in methods)
        self.openings: Openings | None = None  # what methods open in attention masks
        self.handed = Handed()  # what a collator said about the running batch
        self.pruning: Pruning | None = None  # what left the prompt between layers
        self.compaction: Compaction | None = None  # what left it before the first layer
        self.pooling: Pooling | None = None  # what pools features, and keeps the originals
        self.branch_layout: TokenLayout | None = None  # of the auxiliary pass that is running
        self.repeating = False  # an auxiliary pass repeats the main one with its own arguments
        self.riding_real: Tensor | None = None  # bool [riding, N]: what the riding rows consist of
        self.copies = 1  # how often each of the caller's rows stands in the batch (beams)
        self._signature = inspect.signature(self.anatomy.composite.forward)
        self.parameters = self._signature.parameters  # of the inner model's forward
        self.beginning: dict[str, Any] | None = None  # of a prompt's first pass, while it begins
        self.seeing: Sight | None = None  # pictures are in the vision tower
        self.filming = False  # a video is in the vision tower
        self.sight: Sight | None = None  # the last pictures that were, until their prompt begins
        # Set by the guard around generate().
        self.generating = False
        self.vision: dict[str, Any] = {}
        self.mask: Tensor | None = None
        self.given_rows: int | None = None

    def users(self, site: str, layer: int | None = None) -> list[int]:
        """Numbers of the methods that act at a site (of a layer), in the user's order."""
        return [
            i
            for i, method in enumerate(self.methods)
            if site in method.sites and (layer is None or method.acts_at(self.anatomy, site, layer))
        ]

    def vision_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Those inputs that the model's image encoder takes."""
        names = inspect.signature(self.anatomy.composite.get_image_features).parameters
        # What a prompt with videos needs for its positions comes along.
        videos = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        wanted = {*names, *videos} - {"kwargs"}
        return {k: v for k, v in inputs.items() if k in wanted and v is not None}

    # ---- Prompt: what methods may ask for ------------------------------------------------------

    @property
    def layout(self) -> TokenLayout:
        """Roles of the running prompt's positions."""
        if self._layout is None:
            raise LayoutError("No prompt is running.", advice="Call generate() first.")
        return self._layout

    @property
    def rows(self) -> int:
        """Number of main rows B."""
        return self.layout.rows

    def run(
        self, branch: Branch, *, heads: tuple[int, ...] = (), layers: tuple[int, ...] = ()
    ) -> Captured:
        """One auxiliary prefill; the same request of several methods runs once."""
        key = (branch, heads, layers)
        if key not in self._captured:
            self._captured[key] = capture(self, branch, heads, layers)
        return self._captured[key]

    def seen(self, method: Method) -> Any:
        """What ``begin_vision`` of this method returned for the prompt's pictures, or None."""
        return None if self.sight is None else self.sight.states[self.methods.index(method)]

    def originals(self, method: Method) -> Originals | None:
        """The unpooled image states that a method asks for; None without pictures."""
        if self.pooling is None:
            return None
        survivors = None if self.compaction is None else self.compaction.survivors
        return self.pooling.originals(method.originals, survivors)

    def merge_patches(self, values: Tensor) -> Tensor:
        """Values [T, P] of patches averaged over the patches that become one feature: [T, p]."""
        return self._sight().merge(values)

    def place(self, marks: Tensor) -> Tensor:
        """Marks [T, p, C] of image features at their positions: [B, N, C], 0 elsewhere."""
        packed = self._sight().pack(marks)
        copies, full = self.copies, self.full_layout
        visual = full.visual[::copies]
        if int(visual.sum()) != packed.shape[0]:
            raise LayoutError(
                f"The pictures give {packed.shape[0]} features but the prompts hold "
                f"{int(visual.sum())} placeholders.",
                advice="Pass pictures only, and the processor's input_ids and pixels together.",
            )
        placed = packed.new_zeros(*visual.shape, packed.shape[-1])
        placed[visual] = packed
        placed = placed.repeat_interleave(copies, dim=0)
        return placed if self.compaction is None else self.compaction.survivors.take(placed)

    def beside(self, method: Method) -> tuple[str, ...]:
        """Text forms of the other methods, without those that only look."""
        others = (m for m in self.methods if m is not method and m.sites - m.only_looks)
        return tuple(m.text for m in others)

    def module(self, method: Method) -> nn.Module:
        """The weights of a method: part of the model, or lent for the length of a block."""
        name = type(method).__name__
        modules = self.lent if method not in self.lasting else getattr(self.model, MODULES, {})
        if name not in modules:
            raise LayoutError(
                f"{method.label} has no weights.",
                advice="Its modules() must return them for every setting that asks for them.",
            )
        return worn(modules[name])

    @property
    def kept(self) -> Tensor:
        """Positions [B, n] of the columns that the running layer gets; -1 where a row has none."""
        if self._back is not None:
            return self._back.kept
        if self.pruning is None:
            index = torch.arange(self.layout.length, device=self.layout.seg.device)
            return torch.where(self.layout.real, index, -1)
        return self.pruning.kept()

    @property
    def keeps_weights(self) -> bool:
        """Whether the model's own attention returns its weights."""
        return (self.anatomy.text.config._attn_implementation or "eager").endswith("eager")

    @property
    def full_layout(self) -> TokenLayout:
        """Roles of all positions that were given, also of those that do not enter the decoder."""
        return self.layout if self.compaction is None else self.compaction.full

    def entered(self, values: Tensor) -> Tensor:
        """Values [B, N, ...] of all given positions, for those that enter the decoder."""
        return values if self.compaction is None else self.compaction.survivors.take(values)

    def roles_of_new(self, n: int) -> TokenLayout:
        """Roles of the last ``n`` positions, which came in one pass: a new turn."""
        ids, mask = self._new_ids, self._new_mask
        if ids is None:
            raise LayoutError("A new turn needs input_ids.", advice="Pass token ids.")
        if mask is not None:
            mask = mask[:, mask.shape[1] - n :]
        return self._reader.of_ids(ids, mask)

    def _sight(self) -> Sight:
        if self.sight is None:
            raise LayoutError(
                "The prompt's pictures were not encoded inside this block.",
                advice="Pass the processor's pixel inputs to generate().",
            )
        return self.sight

    def for_decoder(self, prompt: BranchPrompt, main: Tensor | None) -> BranchPrompt:
        """An auxiliary prompt without the image features that do not enter the decoder."""
        return prompt if self.compaction is None else self.compaction.branch(prompt, main)

    def roles_of(self, prompt: BranchPrompt) -> TokenLayout | None:
        """Roles of an auxiliary prompt's positions, if a method opens its attention."""
        if self.openings is None:
            return None
        if prompt.origin is None:
            return self.layout
        layout = self.full_layout.gather(prompt.origin)
        added = (prompt.origin < 0) & prompt.mask
        return layout.with_text(added)

    def measured(self, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """What methods measured about each row of the running or else the last prompt."""
        states = self.finished if self._layout is None else self.states
        rows: list[dict[str, Any]] = []
        for method, state in zip(self.methods, states, strict=True):
            if method.measures and state is not None:
                found = method.record(state, tokens)
                rows = rows or [{} for _ in found]
                for row, record in zip(rows, found, strict=True):
                    row[method.measures] = record
        return rows

    def attend(self, a: Tensor) -> Tensor:
        """Weights [B, H, R, K] times the values of the running attention call: [B, R, H, d]."""
        if self.attending is None:
            raise RuntimeError("attend() works inside scores, survey and weights only.")
        return self.attending.attend(a)

    def values(self) -> Tensor:
        """Values of the running attention call, a column per position: [B, H, K, d]."""
        if self.attending is None:
            raise RuntimeError("values() works inside scores, survey and weights only.")
        return self.attending.values()

    def patches_kept(self) -> Callable[[], list[list[list[int]]]]:
        """Tells the patches that are left, for each row, for each of its tiles."""
        sight, copies = self.sight, self.copies
        if sight is None or sight.tower is None or sight.before is None:
            empty: list[list[list[int]]] = [[] for _ in range(self.rows)]
            return lambda: empty
        tower = sight.tower
        packed = sight.pack(tower.owners(sight.before)[..., None].float() + 1)[:, 0]
        return partial(kept_by_row, tower, packed, self.full_layout.visual[::copies], copies)

    def call(self, *, layout: TokenLayout | None = None, **inputs: Any) -> Any:
        """Runs the model with all temporary methods off, leaving its own memory as it was.

        Raises:
            IncompatibleMethods: If a built-in method would have to act in this pass.
        """
        for method in self.lasting:
            if method.sites - method.only_looks - IN_BRANCHES:
                raise IncompatibleMethods(
                    f"A method runs an auxiliary prompt, to which {method.label} is not applied: "
                    "it is built in and knows the main prompt only.",
                    advice="Use one of them.",
                )
        self.branch_layout = self.layout if self.repeating else layout
        composite, names = self.anatomy.composite, self.anatomy.family.remembered
        kept = {name: getattr(composite, name, None) for name in names}
        embeds = inputs.get("inputs_embeds")
        if embeds is not None:
            inputs["inputs_embeds"], *self._deep = embeds.split(self.anatomy.width, dim=-1)
        try:
            with self.quietly():
                return self.model(**inputs, return_dict=True)
        finally:
            self._deep, self.branch_layout = [], None
            for name, value in kept.items():
                setattr(composite, name, value)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """All temporary methods are off inside."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    def moment(self) -> Moment:
        """Where the session stands now."""
        return Moment(list(self.states), self.layout, self.past, self.kept, self.untouched)

    @contextmanager
    def at(self, moment: Moment | None) -> Iterator[None]:
        """Back at an earlier moment inside; None: as it is."""
        if moment is None:
            yield
            return
        before = (self.states, self._layout, self.past, self.untouched, self._back)
        self.states, self._layout, self.past = moment.states, moment.layout, moment.past
        self.untouched, self._back = moment.untouched, moment
        try:
            yield
        finally:
            self.states, self._layout, self.past, self.untouched, self._back = before

    def prompt_positions(self) -> Tensor | None:
        """Position ids [..., B, N] of the running pass, one row per main row."""
        return self._spelled_out(self._positions)

    # ---- one forward pass ----------------------------------------------------------------------

    def on_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook of the inner model: begins a prompt, or lays the branches' rows in."""
        if self.quiet:
            return None
        inputs = self._signature.bind(*args, **kwargs).arguments if args else kwargs
        inputs = {**inputs, **inputs.pop("kwargs", {})} if args else inputs
        self.riding, self.riding_real = 0, None
        self._new_ids = inputs.get("input_ids")
        mask = inputs.get("attention_mask")
        self._new_mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        past = inputs.get("past_key_values")
        self.past = 0 if past is None else int(past.get_seq_length())
        if self.past and self.pruning is not None:
            self.past += self.pruning.missing(0)
        self._prefilling = self.past == 0
        self.wanted.begin_pass(self.past)
        if self._prefilling:
            encoded = self._start(inputs)
            if self.riders:
                return (), with_riders(self, encoded)
            return None if encoded is inputs else ((), encoded)
        if self._layout is None or past is not self._cache:
            raise LayoutError(
                "A forward pass continues a cache that was not filled inside this block.",
                advice="Start with the whole prompt; a method must see it from the first token.",
            )
        if self._auxiliary is not None and self._auxiliary.fused:
            positions = self._spelled_out(inputs.get("position_ids"))
            return (), self._auxiliary.fused_inputs(dict(inputs), positions)
        return None

    def _start(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Begins a prompt: reads its layout and asks every method for its state.

        Returns:
            The inputs with the pictures encoded.
        """
        self._drop_auxiliary()
        self._captured.clear()
        self._cache = inputs.get("past_key_values")
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        rows = (ids if ids is not None else embeds).shape[0]  # type: ignore[union-attr]
        self.copies = copies = rows // self.given_rows if self.given_rows else 1
        self.compaction = None
        vision = self.vision if self.generating else self.vision_inputs(inputs)
        self._layout = self._reader.read(inputs, vision)
        types = inputs.get("token_type_ids") if self.anatomy.family.types else None
        self.source = Source(
            self.anatomy,
            self._layout,
            ids,
            embeds,
            vision,
            copies,
            processor=self._reader.processor,
            types=types,
        )
        self.beginning = encoded = encode_first(self, inputs)
        given = encoded.get("mm_encoder_outputs") or {}
        if not given.get("image"):
            self.sight = None  # a prompt without pictures after one with
        if self.pooling is not None:
            self.pooling.only(given)
        self.compaction = choose_features(self, self._layout)
        if self.compaction is not None:
            self._layout = self.compaction.layout
        plain = ~self._layout.has_image()
        self.untouched = plain if bool(plain.any()) else None
        self.wanted.begin(self._layout)
        if self.pruning is not None:
            self.pruning.begin(self._cache)
        for i, method in enumerate(self.methods):
            self.states[i] = method.begin(self)
        self.beginning = self.sight = None
        if self.pooling is not None:
            self.pooling.forget()
        return encoded

    def main_positions(self, inputs: dict[str, Any]) -> Tensor:
        """Position ids of the main prompt, as the model will count them if nobody gave them."""
        given = inputs.get("position_ids")
        if given is not None:
            rows = self.rows
            return given if given.shape[-2] == rows else given.expand(rows, -1)
        composite = self.anatomy.composite
        if "rope_deltas" in self.anatomy.family.remembered:
            names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
            grids = {name: inputs.get(name) for name in names}
            place, _ = composite.get_rope_index(
                inputs["input_ids"], attention_mask=self.full_layout.real.long(), **grids
            )
            return place
        first = self.anatomy.family.first_position
        return (self.full_layout.real.long().cumsum(-1) - 1).clamp(min=0) + first

    def on_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook of the text decoder: notes position ids and merged embeddings of the prompt.

        Deep-stacked features of an auxiliary prompt go in here: the inner model has no argument
        for them.
        """
        if self.quiet:
            return (args, {**kwargs, **stacked(self._deep)}) if self._deep else None
        self._positions = kwargs.get("position_ids")
        merged = kwargs.get("inputs_embeds")
        if self._prefilling and merged is not None and self.source is not None and self.branches:
            deep = unstacked(kwargs, merged)
            features = torch.cat([merged, *deep], dim=-1) if deep else merged
            self.source = replace(self.source, features=features[: self.rows])
        return None

    def on_hidden(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook of the inner model: notes the cache, cuts riding rows off."""
        if self.quiet:
            return None
        if self._cache is None and not isinstance(output, tuple):
            self._cache = output.past_key_values
        if self.riding:
            rows = torch.arange(self.rows, device=output.last_hidden_state.device)
            output.last_hidden_state = output.last_hidden_state[: self.rows]
            _trim(output, self.rows)
            if output.past_key_values is not None:
                output.past_key_values.batch_select_indices(rows)
            self.riding = 0
        return output

    # ---- logits --------------------------------------------------------------------------------

    def on_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook of the outer model: runs the branches and edits the last position's logits."""
        if self.quiet:
            return None
        if isinstance(output, tuple):
            raise LayoutError(
                "The model returned a tuple; methods on logits need a ModelOutput.",
                advice="Call the model with return_dict=True.",
            )
        rows, logits = self.rows, output.logits
        z: dict[Any, Tensor] = {"main": logits[:rows, -1].float()}
        if self.branches:
            z.update(self._branch_logits(logits))
        delta = total(self.methods[i].logits(self.states[i], z) for i in self.users("logits"))
        if delta is not None or self._beta > 0:
            edited = edit_logits(z["main"], delta, self._beta, self.layout.has_image())
            last = edited.to(logits.dtype)[:, None]
            logits = torch.cat([logits[:rows, :-1], last], dim=1)
        output.logits = logits[:rows]
        if logits.shape[0] != rows or (self._auxiliary is not None and self._auxiliary.fused):
            _trim(output, rows)
        return output

    def _branch_logits(self, logits: Tensor) -> dict[Branch, Tensor]:
        if not bool(self.layout.has_image().any()):  # nothing to contrast with
            main = logits[:, -1].float()
            return dict.fromkeys(self.branches, main)
        auxiliary = self._auxiliary
        if auxiliary is None:
            auxiliary = self._new_auxiliary()
            z = auxiliary.prefill(
                self._spelled_out(self._positions),
                main=self._main_beginning(),
                share=self.compaction is None,
            )
            if self._cache is not None:
                self._auxiliary = auxiliary
                if self.generating and self._positions is not None and self.pruning is None:
                    # Inside generate nobody else sees the cache, so its rows are ours to add.
                    auxiliary.fuse(self._cache, self.layout.real)
                self._release = couple(self._cache, auxiliary)
            return z
        if auxiliary.fused:
            return auxiliary.split(auxiliary.branches, logits[self.rows :, -1])
        if self._new_ids is None:
            raise LayoutError("A decoding step needs input_ids.", advice="Pass token ids.")
        return auxiliary.step(self._new_ids, self._spelled_out(self._positions))

    def _main_beginning(self) -> Filled | None:
        """The main prompt's cache for prompts that begin alike, if no method changed what it holds.

        Such a method would reach the auxiliary prompt through the cache.
        """
        cache, places = self._cache, self._spelled_out(self._positions)
        if not is_plain(cache):
            return None
        changing = any(m.sites - m.only_looks - {"logits"} for m in self.methods)
        if changing or self.compaction is not None or places is None:
            return None
        real = self.layout.real
        columns = torch.arange(self.layout.length, device=real.device)
        return Filled(
            layers=[(layer.keys, layer.values) for layer in cache.layers],
            mask=real,
            positions=places[-3:] if places.ndim == 3 else places,
            origin=torch.where(real, columns, -1),
        )

    def _spelled_out(self, positions: Tensor | None) -> Tensor | None:
        """Position ids with one row per main row; the library may leave one for all."""
        if positions is None or positions.shape[-2] == self.rows:
            return positions
        return positions.expand(*positions.shape[:-2], self.rows, -1)

    def _new_auxiliary(self) -> Auxiliary:
        if self.source is None:
            raise LayoutError("No prompt is running.", advice="Call generate() first.")
        with self.quietly():
            prompts = [branch.build(self.source) for branch in self.branches]
        main = self._spelled_out(self._positions)
        prompts = [self.for_decoder(prompt, main) for prompt in prompts]
        # Large, and never needed again.
        self.source = replace(self.source, features=None, memo={})
        config = self.anatomy.config.get_text_config()
        roles = [self.roles_of(prompt) for prompt in prompts]
        return Auxiliary(self.branches, prompts, self.call, self.rows, config, roles)

    def _drop_auxiliary(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None
        if self._auxiliary is not None and self._auxiliary.fused:
            # Give the cache back with the rows that its owner knows.
            rows = torch.arange(self.rows, device=self.layout.seg.device)
            self._cache.batch_select_indices(rows)
        self._auxiliary = None

    def finish(self) -> None:
        """Forgets the current prompt, but for what was measured about it."""
        self._drop_auxiliary()
        if self._layout is not None:
            pairs = zip(self.methods, self.states, strict=True)
            self.finished = [state if method.measures else None for method, state in pairs]
        self._captured.clear()
        self._layout = self.source = self._cache = self._positions = self._new_ids = None
        self.seeing = self.sight = self.beginning = self.compaction = None
        if self.pooling is not None:
            self.pooling.forget()
        self.states = [None] * len(self.methods)


def _trim(output: Any, rows: int) -> None:
    """Cuts auxiliary rows off the optional per-layer outputs."""
    for name in ("hidden_states", "attentions"):
        value = getattr(output, name, None)
        if value is not None:
            setattr(output, name, tuple(t[:rows] for t in value))
