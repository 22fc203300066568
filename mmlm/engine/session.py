"""One attachment of methods to one model: everything that changes while it lasts.

A :class:`Session` follows each prompt from its first forward pass to its last: it reads the layout,
asks the methods for their states, runs the auxiliary branches and edits the logits. It is reached
through hooks, i.e. it hangs on the modules and is seen from every thread that runs the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.auxiliary import Auxiliary, couple
from mmlm.engine.blocks import is_plain
from mmlm.engine.branches import Branch, BranchPrompt, Captured, Same, Source
from mmlm.engine.combine import edit_logits, total
from mmlm.engine.compaction import Compaction, choose_features
from mmlm.engine.layout import TokenLayout
from mmlm.engine.method import IN_BRANCHES, MODULES, Method
from mmlm.engine.prefix import Filled
from mmlm.engine.sizes import tell_images_apart
from mmlm.engine.vision import Sight, encode_first
from mmlm.errors import IncompatibleMethods, LayoutError

if TYPE_CHECKING:
    from mmlm.engine.attention import AttentionRows
    from mmlm.engine.masks import Openings
    from mmlm.engine.pruning import Pruning

__all__ = ["Session", "unstacked"]


#: Arguments of a main pass that an auxiliary one does not take over.
_OF_THE_MAIN_PASS = frozenset(
    {
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "return_dict",
        "use_cache",
    }
)


class _Reached(Exception):  # noqa: N818
    """Ends an auxiliary pass once everything wanted has been captured."""


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
        self.anatomy = anatomy
        self._given_layout = layout
        self._processor = processor
        self._layout: TokenLayout | None = None
        self._source: Source | None = None
        self.states: list[Any] = [None] * len(methods)
        self.parallel = False  # each new position is a last one: see mmlm.engine.search
        self.quiet = False  # an auxiliary pass is running: temporary methods are off
        self._deep: list[Tensor] = []  # what it adds to the outputs of the first layers
        self._captured: dict[tuple[Any, ...], Captured] = {}
        self._cache: Any = None
        self._positions: Tensor | None = None  # position ids of the current main pass
        self._new_ids: Tensor | None = None
        self._new_mask: Tensor | None = None  # 2-D, if the running pass has one
        self._prefilling = False  # the running main pass is a prompt's first
        self.past = 0  # positions before the running main pass
        self.keeps_weights = anatomy.text.config._attn_implementation == "eager"
        self.attending: AttentionRows | None = None  # the attention call that is being edited
        self._tail: Tensor | None = None  # int64 [B]: where the text after the last image begins
        self._tail_first = 0
        self._tail_ragged = False
        self._index: dict[tuple[int, int], Tensor] = {}  # positions, kept for one pass
        self._auxiliary: Auxiliary | None = None
        self._release: Callable[[], None] | None = None
        self.branches = tuple(dict.fromkeys(b for m in methods for b in m.branches))
        self.riders = tuple(dict.fromkeys(b for m in methods for b in m.riders))
        self.riding = 0  # auxiliary rows below the main ones in the pass that is running
        self.untouched: Tensor | None = None  # bool [B]: rows without an image, if there are any
        self._beta = max(m.plausibility for m in methods)
        self.openings: Openings | None = None  # what methods open in attention masks
        self.pruning: Pruning | None = None  # what left the prompt between layers
        self.compaction: Compaction | None = None  # what left it before the first layer
        self.branch_layout: TokenLayout | None = None  # of the auxiliary pass that is running
        self.repeating = False  # an auxiliary pass repeats the main one with its own arguments
        self.riding_real: Tensor | None = None  # bool [riding, N]: what the riding rows consist of
        self.copies = 1  # how often each of the caller's rows stands in the batch (beams)
        self._signature = inspect.signature(self.anatomy.composite.forward)
        self.parameters = self._signature.parameters  # of the inner model's forward
        self._inputs: dict[str, Any] | None = None  # of a prompt's first pass, while it begins
        self.seeing: Sight | None = None  # pictures are in the vision tower
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
            if site in method.sites and (layer is None or method.acts_in(self.anatomy, layer))
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
            self._captured[key] = self._capture(branch, heads, layers)
        return self._captured[key]

    def seen(self, method: Method) -> Any:
        """What ``begin_vision`` of this method returned for the prompt's pictures, or None."""
        return None if self.sight is None else self.sight.states[self.methods.index(method)]

    def merge_patches(self, values: Tensor) -> Tensor:
        """Values [T, P] of patches averaged over the patches that become one feature: [T, p]."""
        return self._sight().merge(values)

    def place(self, marks: Tensor) -> Tensor:
        """Marks [T, p, C] of image features at their positions: [B, N, C], 0 elsewhere."""
        packed = self._sight().pack(marks)
        copies, full = self.copies, self._full_layout
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

    def module(self, method: Method) -> nn.Module:
        """The weights of a method that is built into the model."""
        modules = getattr(self.model, MODULES, {})
        name = type(method).__name__
        if name not in modules:
            raise LayoutError(
                f"No weights of {name} are part of this model.",
                advice="build_in(model, ...) makes them one.",
            )
        module: nn.Module = modules[name]
        return module

    @property
    def kept(self) -> Tensor:
        """Positions [B, n] of the columns that the running layer gets; -1 where a row has none."""
        if self.pruning is None:
            index = torch.arange(self.layout.length, device=self.layout.seg.device)
            return torch.where(self.layout.real, index, -1)
        return self.pruning.kept()

    @property
    def _full_layout(self) -> TokenLayout:
        """Roles of all positions that were given, also of those that do not enter the decoder."""
        return self.layout if self.compaction is None else self.compaction.full

    def roles_of_new(self, n: int) -> TokenLayout:
        """Roles of the last ``n`` positions, which came in one pass: a new turn."""
        ids, mask = self._new_ids, self._new_mask
        if ids is None:
            raise LayoutError("A new turn needs input_ids.", advice="Pass token ids.")
        if mask is not None:
            mask = mask[:, mask.shape[1] - n :]
        return self._layout_of_ids(ids, mask)

    def _sight(self) -> Sight:
        if self.sight is None:
            raise LayoutError(
                "The prompt's pictures were not encoded inside this block.",
                advice="Pass the processor's pixel inputs to generate().",
            )
        return self.sight

    def _call_of(self, branch: Branch) -> dict[str, Any]:
        """The inner model's arguments for one auxiliary prefill without a cache."""
        if self._source is None or self._inputs is None:
            raise LayoutError("No prompt is beginning.", advice="Call run() in begin().")
        if branch == Same():
            kept = {k: v for k, v in self._inputs.items() if k not in _OF_THE_MAIN_PASS}
            mask = self._full_layout.real
            return {**kept, "attention_mask": None if bool(mask.all()) else mask.long()}
        with self.quietly():
            prompt = branch.build(self._source)
        main = self._main_positions(self._inputs) if prompt.positions is None else None
        prompt = self._for_decoder(prompt, main)
        positions = prompt.positions
        types = {} if prompt.types is None else {"token_type_ids": prompt.types}
        return {
            **types,
            "inputs_embeds": prompt.embeds,
            "attention_mask": None if bool(prompt.mask.all()) else prompt.mask.long(),
            "position_ids": main if positions is None else positions,
            "layout": self._roles_of(prompt),
        }

    def _for_decoder(self, prompt: BranchPrompt, main: Tensor | None) -> BranchPrompt:
        """An auxiliary prompt without the image features that do not enter the decoder."""
        return prompt if self.compaction is None else self.compaction.branch(prompt, main)

    def _roles_of(self, prompt: BranchPrompt) -> TokenLayout | None:
        """Roles of an auxiliary prompt's positions, if a method opens its attention."""
        if self.openings is None:
            return None
        if prompt.origin is None:
            return self.layout
        layout = self._full_layout.gather(prompt.origin)
        added = (prompt.origin < 0) & prompt.mask
        return layout.with_text(added)

    def _capture(self, branch: Branch, heads: tuple[int, ...], layers: tuple[int, ...]) -> Captured:
        call = self._call_of(branch)
        outputs: dict[int, Tensor] = {}
        states: dict[int, Tensor] = {}
        end = max(*heads, *layers, -1)

        def catch_heads(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                outputs[layer] = self.anatomy.split_heads(args[0][:, -1]).float()
                if layer == end and layer not in layers:
                    raise _Reached

            return hook

        def catch_layer(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                x = output[0] if isinstance(output, tuple) else output
                states[layer] = x[:, -1].float()
                if layer == end:
                    raise _Reached

            return hook

        with ExitStack() as stack:
            for layer in heads:
                part = self.anatomy.o_proj(layer)
                stack.callback(part.register_forward_pre_hook(catch_heads(layer)).remove)
            for layer in layers:
                block = self.anatomy.layers[layer]
                stack.callback(block.register_forward_hook(catch_layer(layer)).remove)
            self.repeating = branch == Same()
            try:
                self._call(**{**call, "use_cache": False, "logits_to_keep": 1})
            except _Reached:
                pass
            finally:
                self.repeating = False
        return Captured(heads=outputs, layers=states)

    def attend(self, a: Tensor) -> Tensor:
        """Weights [B, H, R, K] times the values of the running attention call: [B, R, H, d]."""
        if self.attending is None:
            raise RuntimeError("attend() works inside scores, survey and weights only.")
        return self.attending.attend(a)

    # ---- rows of attention ---------------------------------------------------------------------

    def surveys(self, i: int) -> bool:
        """Whether a method wants a look at all rows before it edits any."""
        return type(self.methods[i]).survey is not Method.survey

    def row_kind(self, i: int) -> str:
        """Which rows a method gets; scaled keys are scaled for every query."""
        method = self.methods[i]
        return "all" if "keys" in method.sites else method.rows

    def first_row(self, kind: str, new: int) -> int:
        """The first of ``new`` rows that a method asking for ``kind`` may get."""
        if kind == "all" or self.parallel:
            return 0
        if kind == "tail" and new > 1:
            return min(max(self._tail_first - self.past, 0), new)
        return new - 1

    def tail_begins(self, kind: str, new: int) -> Tensor | None:
        """int64 [B]: where each row's tail begins, if that differs within the running pass."""
        return self._tail if kind == "tail" and new > 1 and self._tail_ragged else None

    def positions(self, start: int, end: int) -> Tensor:
        """Sequence positions ``start`` to ``end`` for every main row, int64 [B, R]."""
        index = self._index.get((start, end))
        if index is None:
            device = self.layout.seg.device
            index = torch.arange(start, end, device=device).expand(self.rows, -1)
            self._index[start, end] = index
        return index

    def _call(self, *, layout: TokenLayout | None = None, **inputs: Any) -> Any:
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
        self._index.clear()
        if self._prefilling:
            encoded = self._start(inputs)
            if self.riders:
                return (), self._with_riders(encoded)
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
        self._layout = self._read_layout(ids, embeds, inputs.get("attention_mask"), copies)
        vision = self.vision if self.generating else self.vision_inputs(inputs)
        self._layout = tell_images_apart(self.anatomy, self._layout, vision, copies)
        types = inputs.get("token_type_ids") if self.anatomy.family.types else None
        self._source = Source(
            self.anatomy,
            self._layout,
            ids,
            embeds,
            vision,
            copies,
            processor=self._processor,
            types=types,
        )
        self._inputs = encoded = encode_first(self, inputs)
        if not (encoded.get("mm_encoder_outputs") or {}).get("image"):
            self.sight = None  # a prompt without pictures after one with
        self.compaction = choose_features(self, self._layout)
        if self.compaction is not None:
            self._layout = self.compaction.layout
        plain = ~self._layout.has_image()
        self.untouched = plain if bool(plain.any()) else None
        if any(m.rows == "tail" for m in self.methods):
            end = self._layout.last_image_end()
            self._tail = torch.where(plain, self._layout.length, end + 1)
            self._tail_first = int(self._tail.min())
            self._tail_ragged = bool((self._tail != self._tail_first).any())
        if self.pruning is not None:
            self.pruning.begin()
        for i, method in enumerate(self.methods):
            self.states[i] = method.begin(self)
        self._inputs = self.sight = None
        return encoded

    def _read_layout(
        self, ids: Tensor | None, embeds: Tensor | None, mask: Any, copies: int
    ) -> TokenLayout:
        if self._given_layout is not None:
            rows = (ids if ids is not None else embeds).shape[0]  # type: ignore[union-attr]
            layout = self._given_layout
            return layout.expand(rows // layout.rows) if rows != layout.rows else layout
        if ids is None:
            raise LayoutError(
                "The prompt came as inputs_embeds only, so the image's positions are unknown.",
                advice="Pass input_ids, or attach(model, ..., layout=TokenLayout(...)).",
            )
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            # A static cache: generate() made a 4-D mask, or one per kind of layer.
            if self.mask is None:
                raise LayoutError(
                    "A prompt without a 2-D attention mask cannot be told from its padding.",
                    advice="Pass the processor's attention_mask to generate().",
                )
            mask = self.mask.repeat_interleave(copies, dim=0)
        return self._layout_of_ids(ids, mask)

    def _layout_of_ids(self, ids: Tensor, mask: Tensor | None) -> TokenLayout:
        return TokenLayout.from_ids(
            ids,
            mask,
            image_ids=self.anatomy.image_ids,
            wrapper_ids=self.anatomy.wrapper_ids,
            framing=self.anatomy.family.framing,
        )

    def _with_riders(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Lays the riders' rows below the main ones, padded on the left to the same length."""
        source = self._source
        if source is None or source.input_ids is None:
            raise LayoutError("Riding branches need input_ids.", advice="Pass token ids.")
        layout, changed = self._full_layout, dict(inputs)
        positions = self._main_positions(inputs)
        prompts = [branch.build(source) for branch in self.riders]
        # Rows below the main ones hold text only; their embeddings equal those of their ids.
        ids, masks, places = [source.input_ids], [layout.real], [positions]
        for prompt in prompts:
            if prompt.ids is None:
                raise LayoutError("A riding branch must be text.", advice="Use NoImage().")
            short = layout.length - prompt.embeds.shape[1]
            own = functional.pad(prompt.mask, (short, 0))
            ids.append(torch.where(own, functional.pad(prompt.ids, (short, 0)), prompt.ids[:, -1:]))
            masks.append(own)
            place = functional.pad(prompt.positions, (short, 0))  # type: ignore[arg-type]
            three = positions.ndim == 3
            places.append(place.expand(positions.shape[0], -1, -1) if three else place)
        changed["input_ids"] = torch.cat(ids)
        changed["attention_mask"] = torch.cat(masks).long()
        changed["position_ids"] = torch.cat(places, dim=-2)
        changed.pop("mm_token_type_ids", None)
        if source.types is not None:
            changed["token_type_ids"] = functional.pad(
                source.types, (0, 0, 0, len(self.riders) * layout.rows)
            )
        self.riding = len(self.riders) * layout.rows
        self.riding_real = torch.cat(masks[1:])
        return changed

    def _main_positions(self, inputs: dict[str, Any]) -> Tensor:
        given = inputs.get("position_ids")
        if given is not None:
            rows = self.rows
            return given if given.shape[-2] == rows else given.expand(rows, -1)
        composite = self.anatomy.composite
        if "rope_deltas" in self.anatomy.family.remembered:
            names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
            grids = {name: inputs.get(name) for name in names}
            place, _ = composite.get_rope_index(
                inputs["input_ids"], attention_mask=self._full_layout.real.long(), **grids
            )
            return place
        first = self.anatomy.family.first_position
        return (self._full_layout.real.long().cumsum(-1) - 1).clamp(min=0) + first

    def on_decoder(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook of the text decoder: notes position ids and merged embeddings of the prompt.

        Deep-stacked features of an auxiliary prompt go in here: the inner model has no argument
        for them.
        """
        if self.quiet:
            return (args, {**kwargs, **_stacked(self._deep)}) if self._deep else None
        self._positions = kwargs.get("position_ids")
        merged = kwargs.get("inputs_embeds")
        if self._prefilling and merged is not None and self._source is not None and self.branches:
            deep = unstacked(kwargs, merged)
            features = torch.cat([merged, *deep], dim=-1) if deep else merged
            self._source = replace(self._source, features=features[: self.rows])
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
        if self._source is None:
            raise LayoutError("No prompt is running.", advice="Call generate() first.")
        with self.quietly():
            prompts = [branch.build(self._source) for branch in self.branches]
        main = self._spelled_out(self._positions)
        prompts = [self._for_decoder(prompt, main) for prompt in prompts]
        # Large, and never needed again.
        self._source = replace(self._source, features=None, memo={})
        config = self.anatomy.config.get_text_config()
        roles = [self._roles_of(prompt) for prompt in prompts]
        return Auxiliary(self.branches, prompts, self._call, self.rows, config, roles)

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
        """Forgets the current prompt."""
        self._drop_auxiliary()
        self._captured.clear()
        self._layout = self._source = self._cache = self._positions = self._new_ids = None
        self.seeing = self.sight = self._inputs = self.compaction = None
        self.states = [None] * len(self.methods)


def _stacked(deep: list[Tensor]) -> dict[str, Any]:
    """The decoder's arguments for what is added to its first layers' outputs, [B, n, D] each."""
    everywhere = deep[0].new_ones(deep[0].shape[:2], dtype=torch.bool)
    return {
        "visual_pos_masks": everywhere,
        "deepstack_visual_embeds": [level.flatten(0, 1) for level in deep],
    }


def unstacked(kwargs: dict[str, Any], like: Tensor) -> list[Tensor]:
    """The same from the decoder's arguments: dense, zero outside the images; empty without any."""
    deep, where = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if not deep or where is None:
        return []
    zero = torch.zeros_like(like)
    return [zero.masked_scatter(where[..., None], level.to(like.dtype)) for level in deep]


def _trim(output: Any, rows: int) -> None:
    """Cuts auxiliary rows off the optional per-layer outputs."""
    for name in ("hidden_states", "attentions"):
        value = getattr(output, name, None)
        if value is not None:
            setattr(output, name, tuple(t[:rows] for t in value))
