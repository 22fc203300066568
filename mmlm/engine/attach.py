"""attach(): installs methods on a model, combines what they contribute, and removes everything.

One :class:`_Run` holds everything that changes while methods are attached: their states, the
layout of the current prompt and the auxiliary branches. It is reached through the hooks, i.e. it
hangs on the modules and is seen from every thread that runs the model. Only hooks whose site
somebody uses are installed. Nothing is written into the model's classes, its configuration or the
library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.engine.anatomy import Anatomy, unwrap
from mmlm.engine.auxiliary import Auxiliary, couple
from mmlm.engine.branches import Branch, Captured, Source
from mmlm.engine.combine import chain, edit_logits, product, total
from mmlm.engine.guard import guarded_generate
from mmlm.engine.layout import TokenLayout
from mmlm.engine.method import Method
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedModel

__all__ = ["attach"]

_MARK = "_mmlm_run"
#: Sites whose mechanism is installed by this module.
_WORKING = frozenset({"heads", "layer_in", "layer_out", "logits"})


@contextmanager
def attach(
    model: nn.Module, *methods: Method, layout: TokenLayout | None = None
) -> Iterator[nn.Module]:
    """Attaches methods to a model for the length of a ``with`` block.

        with attach(model, VHR(alpha=2.0), VCD()):
            model.generate(**inputs)

    Without methods nothing is installed at all. Inside the block every prompt starts afresh: the
    first forward pass without past begins it, later ones continue it. Logits of the last position
    are the edited ones, for ``generate`` and for a plain call alike.

    Args:
        model: A Hugging Face vision-language model with its language-modelling head, or a PEFT
            wrapper around one.
        *methods: In the order in which order-dependent edits are applied.
        layout: Roles of the positions, for prompts that come as ``inputs_embeds`` only; otherwise
            they are read from ``input_ids``.

    Yields:
        The same model.

    Raises:
        IncompatibleMethods: If methods are already attached, or two of these exclude each other.
        UnsupportedModel: If the model lacks what a method needs.
    """
    if not methods:
        yield model
        return
    inner = unwrap(model)
    if hasattr(inner, _MARK):
        held = ", ".join(m.label for m in getattr(inner, _MARK).methods)
        raise IncompatibleMethods(
            f"{held} is already attached to this model, so "
            f"{', '.join(m.label for m in methods)} cannot be.",
            advice="Attach all methods in one call: attach(model, A(), B()).",
        )
    run = _Run(inner, methods, layout)
    with ExitStack() as stack:
        setattr(inner, _MARK, run)
        stack.callback(delattr, inner, _MARK)
        run.install(stack)
        yield model


class _Reached(Exception):  # noqa: N818
    """Ends an auxiliary pass once everything wanted has been captured."""


class _Run:
    """Everything that changes while methods are attached. Also the ``Prompt`` they see."""

    def __init__(
        self, model: nn.Module, methods: tuple[Method, ...], layout: TokenLayout | None
    ) -> None:
        self.model = model
        self.methods = methods
        self.anatomy = Anatomy(model)
        _refuse(self.anatomy, methods)
        self._given_layout = layout
        self._layout: TokenLayout | None = None
        self._source: Source | None = None
        self._states: list[Any] = [None] * len(methods)
        self._quiet = False  # an auxiliary pass is running: temporary methods are off
        self._captured: dict[tuple[Branch, tuple[int, ...]], Captured] = {}
        self._cache: Any = None
        self._positions: Tensor | None = None  # position ids of the current main pass
        self._new_ids: Tensor | None = None
        self._auxiliary: Auxiliary | None = None
        self._release: Callable[[], None] | None = None
        self.branches = tuple(dict.fromkeys(b for m in methods for b in m.branches))
        self.riders = tuple(dict.fromkeys(b for m in methods for b in m.riders))
        self._riding = 0  # auxiliary rows below the main ones in the pass that is running
        self._untouched: Tensor | None = None  # bool [B]: rows without an image, if there are any
        self._beta = max(m.plausibility for m in methods)
        self._signature = inspect.signature(self.anatomy.composite.forward)
        # Set by the guard around generate().
        self.generating = False
        self.vision: dict[str, Any] = {}
        self.mask: Tensor | None = None
        self.given_rows: int | None = None

    def vision_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Those inputs that the model's image encoder takes."""
        names = inspect.signature(self.anatomy.composite.get_image_features).parameters
        wanted = {*names, "pixel_values_videos"} - {"kwargs"}
        return {k: v for k, v in inputs.items() if k in wanted and v is not None}

    # ---- Prompt: what methods may ask for ------------------------------------------------------

    @property
    def layout(self) -> TokenLayout:
        if self._layout is None:
            raise LayoutError("No prompt is running.", advice="Call generate() first.")
        return self._layout

    @property
    def rows(self) -> int:
        return self.layout.rows

    def run(self, branch: Branch, *, heads: tuple[int, ...]) -> Captured:
        key = (branch, heads)
        if key not in self._captured:
            self._captured[key] = self._capture(branch, heads)
        return self._captured[key]

    def _capture(self, branch: Branch, layers: tuple[int, ...]) -> Captured:
        if self._source is None:
            raise LayoutError("No prompt is running.", advice="Call generate() first.")
        prompt = branch.build(self._source)
        if prompt.positions is None:
            raise LayoutError(
                f"{branch} shares the main prompt's positions, which are not known yet.",
                advice="Ask for it as a `logits` branch instead.",
            )
        found: dict[int, Tensor] = {}

        def catch(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                found[layer] = self.anatomy.split_heads(args[0][:, -1]).float()
                if layer == max(layers):
                    raise _Reached

            return hook

        whole = bool(prompt.mask.all())
        with ExitStack() as stack:
            for layer in layers:
                handle = self.anatomy.o_proj(layer).register_forward_pre_hook(catch(layer))
                stack.callback(handle.remove)
            try:
                self._call(
                    inputs_embeds=prompt.embeds,
                    attention_mask=None if whole else prompt.mask.long(),
                    position_ids=prompt.positions,
                    use_cache=False,
                    logits_to_keep=1,
                )
            except _Reached:
                pass
        return Captured(heads=found)

    def _call(self, **inputs: Any) -> Any:
        """Runs the model with all temporary methods off, leaving its own memory as it was."""
        composite, names = self.anatomy.composite, self.anatomy.family.remembered
        kept = {name: getattr(composite, name, None) for name in names}
        self._quiet = True
        try:
            return self.model(**inputs, return_dict=True)
        finally:
            self._quiet = False
            for name, value in kept.items():
                setattr(composite, name, value)

    # ---- installing ----------------------------------------------------------------------------

    def install(self, stack: ExitStack) -> None:
        """Puts in the guard and the hooks; ``stack`` takes everything out again."""
        stack.callback(self.finish)
        guarded_generate(self, stack)
        a = self.anatomy
        hooks = [
            a.composite.register_forward_pre_hook(self._on_inputs, with_kwargs=True),
            a.composite.register_forward_hook(self._on_hidden),
            a.text.register_forward_pre_hook(self._on_decoder, with_kwargs=True),
        ]
        for handle in hooks:
            stack.callback(handle.remove)
        for layer, block in enumerate(a.layers):
            for site, install in (
                ("layer_in", self._install_layer_in),
                ("heads", self._install_heads),
                ("layer_out", self._install_layer_out),
            ):
                users = [
                    i for i in self._users(site) if self.methods[i].acts_in(self.anatomy, layer)
                ]
                if users:
                    stack.callback(install(layer, block, users).remove)
        if self._users("logits"):
            stack.callback(self.model.register_forward_hook(self._on_logits).remove)

    def _users(self, site: str) -> list[int]:
        return [i for i, method in enumerate(self.methods) if site in method.sites]

    def _install_layer_in(self, layer: int, block: nn.Module, users: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._quiet:
                return None
            x = args[0] if args else kwargs["hidden_states"]
            new = self._edit_states("layer_in", layer, users, x)
            if new is x:
                return None
            if args:
                return (new, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": new}

        return block.register_forward_pre_hook(hook, with_kwargs=True)

    def _install_layer_out(self, layer: int, block: nn.Module, users: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self._quiet:
                return None
            x = output[0] if isinstance(output, tuple) else output
            new = self._edit_states("layer_out", layer, users, x)
            if new is x:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return block.register_forward_hook(hook)

    def _edit_states(self, site: str, layer: int, users: list[int], x: Tensor) -> Tensor:
        rows = self.rows
        main = x[:rows] if x.shape[0] != rows else x

        def edit(i: int) -> Callable[[Tensor], Tensor | None]:
            function = getattr(self.methods[i], site)
            return lambda y: function(self._states[i], layer, y)

        new = chain((edit(i) for i in users), main)
        if new is main:
            return x
        if self._untouched is not None:
            new = torch.where(self._untouched[:, None, None], main, new)
        return new if main is x else torch.cat([new, x[rows:]])

    def _install_heads(self, layer: int, block: nn.Module, users: list[int]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if self._quiet:
                return None
            x = args[0]
            y = self.anatomy.split_heads(x)
            gain = product(self._head_gain(i, layer, y) for i in users)
            if gain is None:
                return None
            rest = x.shape[0] - gain.shape[0]
            if rest:
                gain = torch.cat([gain, gain.new_ones(rest, *gain.shape[1:])])
            return ((y * gain.to(y.dtype)).flatten(-2), *args[1:])

        return self.anatomy.o_proj(layer).register_forward_pre_hook(hook)

    def _head_gain(self, i: int, layer: int, y: Tensor) -> Tensor | None:
        method, rows = self.methods[i], self.rows
        whole = y.shape[0]
        if not (self._riding and method.riders) and whole != rows:
            y = y[:rows]
        gain = method.heads(self._states[i], layer, y)
        if gain is None:
            return None
        if self._untouched is not None:
            copies = gain.shape[0] // rows
            gain = gain.masked_fill(self._untouched.repeat(copies)[:, None, None, None], 1)
        if gain.shape[0] == whole or not self._riding:
            return gain
        # Another method's riders are in this pass too: their rows stay as they are.
        return torch.cat([gain, gain.new_ones(whole - gain.shape[0], *gain.shape[1:])])

    # ---- one forward pass ----------------------------------------------------------------------

    def _on_inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._quiet:
            return None
        inputs = self._signature.bind(*args, **kwargs).arguments if args else kwargs
        inputs = {**inputs, **inputs.pop("kwargs", {})} if args else inputs
        self._riding = 0
        self._new_ids = inputs.get("input_ids")
        past = inputs.get("past_key_values")
        if past is None or int(past.get_seq_length()) == 0:
            self._start(inputs)
            return ((), self._with_riders(inputs)) if self.riders else None
        if self._layout is None or past is not self._cache:
            raise LayoutError(
                "A forward pass continues a cache that was not filled inside this block.",
                advice="Start with the whole prompt; a method must see it from the first token.",
            )
        if self._auxiliary is not None and self._auxiliary.fused:
            positions = self._spelled_out(inputs.get("position_ids"))
            return (), self._auxiliary.fused_inputs(dict(inputs), positions)
        return None

    def _start(self, inputs: dict[str, Any]) -> None:
        """Begins a prompt: reads its layout and asks every method for its state."""
        self._drop_auxiliary()
        self._captured.clear()
        self._cache = inputs.get("past_key_values")
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        rows = (ids if ids is not None else embeds).shape[0]  # type: ignore[union-attr]
        copies = rows // self.given_rows if self.given_rows else 1
        self._layout = self._read_layout(ids, embeds, inputs.get("attention_mask"), copies)
        plain = ~self._layout.has_image()
        self._untouched = plain if bool(plain.any()) else None
        vision = self.vision if self.generating else self.vision_inputs(inputs)
        self._source = Source(self.anatomy, self._layout, ids, embeds, vision, copies)
        for i, method in enumerate(self.methods):
            self._states[i] = method.begin(self)

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
        family = self.anatomy.family
        return TokenLayout.from_ids(
            ids,
            mask,
            image_ids=self.anatomy.image_ids,
            wrapper_ids=self.anatomy.wrapper_ids,
            wrapped_by_neighbours=family.wrapped_by_neighbours,
        )

    def _with_riders(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Lays the riders' rows below the main ones, padded on the left to the same length."""
        source = self._source
        if source is None or source.input_ids is None:
            raise LayoutError("Riding branches need input_ids.", advice="Pass token ids.")
        layout, changed = self.layout, dict(inputs)
        positions = self._main_positions(inputs)
        prompts = [branch.build(source) for branch in self.riders]
        # Rows below the main ones hold text only; their embeddings equal those of their ids.
        ids, masks, places = [source.input_ids], [layout.real], [positions]
        for prompt in prompts:
            short = layout.length - prompt.embeds.shape[1]
            keep = layout.real & ~layout.visual & ~layout.frame
            index = keep.long().argsort(dim=1, stable=True)
            moved = source.input_ids.gather(1, index)
            own = torch.nn.functional.pad(prompt.mask, (short, 0))
            ids.append(moved.masked_fill(~own, int(moved[0, -1])))
            masks.append(own)
            place = torch.nn.functional.pad(prompt.positions, (short, 0))  # type: ignore[arg-type]
            three = positions.ndim == 3
            places.append(place.expand(positions.shape[0], -1, -1) if three else place)
        changed["input_ids"] = torch.cat(ids)
        changed["attention_mask"] = torch.cat(masks).long()
        changed["position_ids"] = torch.cat(places, dim=-2)
        changed.pop("mm_token_type_ids", None)
        self._riding = len(self.riders) * layout.rows
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
                inputs["input_ids"], attention_mask=self.layout.real.long(), **grids
            )
            return place
        return (self.layout.real.long().cumsum(-1) - 1).clamp(min=0)

    def _on_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._quiet:
            self._positions = kwargs.get("position_ids")

    def _on_hidden(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._quiet:
            return None
        if self._cache is None and not isinstance(output, tuple):
            self._cache = output.past_key_values
        if self._riding:
            rows = torch.arange(self.rows, device=output.last_hidden_state.device)
            output.last_hidden_state = output.last_hidden_state[: self.rows]
            _trim(output, self.rows)
            if output.past_key_values is not None:
                output.past_key_values.batch_select_indices(rows)
            self._riding = 0
        return output

    # ---- logits --------------------------------------------------------------------------------

    def _on_logits(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._quiet:
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
        delta = total(self.methods[i].logits(self._states[i], z) for i in self._users("logits"))
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
            z = auxiliary.prefill(self._spelled_out(self._positions))
            if self._cache is not None:
                self._auxiliary = auxiliary
                if self.generating and self._positions is not None:
                    # Inside generate nobody else sees the cache, so its rows are ours to add.
                    auxiliary.fuse(self._cache, self.layout.real)
                self._release = couple(self._cache, auxiliary)
            return z
        if auxiliary.fused:
            return auxiliary.split(auxiliary.branches, logits[self.rows :, -1])
        if self._new_ids is None:
            raise LayoutError("A decoding step needs input_ids.", advice="Pass token ids.")
        return auxiliary.step(self._new_ids, self._spelled_out(self._positions))

    def _spelled_out(self, positions: Tensor | None) -> Tensor | None:
        """Position ids with one row per main row; the library may leave one for all."""
        if positions is None or positions.shape[-2] == self.rows:
            return positions
        return positions.expand(*positions.shape[:-2], self.rows, -1)

    def _new_auxiliary(self) -> Auxiliary:
        if self._source is None:
            raise LayoutError("No prompt is running.", advice="Call generate() first.")
        prompts = [branch.build(self._source) for branch in self.branches]
        config = self.anatomy.config.get_text_config()
        return Auxiliary(self.branches, prompts, self._call, self.rows, config)

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
        self._states = [None] * len(self.methods)


def _trim(output: Any, rows: int) -> None:
    """Cuts auxiliary rows off the optional per-layer outputs."""
    for name in ("hidden_states", "attentions"):
        value = getattr(output, name, None)
        if value is not None:
            setattr(output, name, tuple(t[:rows] for t in value))


def _refuse(anatomy: Anatomy, methods: tuple[Method, ...]) -> None:
    """Every refusal that needs no inputs, in one place."""
    for method in methods:
        missing = method.sites - _WORKING
        if missing:
            raise UnsupportedModel(
                f"{method.label} acts at {', '.join(sorted(missing))}; this version of the engine "
                f"works at {', '.join(sorted(_WORKING))}.",
                advice="Use a newer version of mmlm.",
            )
        reasons = anatomy.supports(method)
        if reasons:
            raise UnsupportedModel(
                f"{method.label} cannot run on this model: {'; '.join(reasons)}.",
                advice="`mmlm doctor MODEL` lists what this model supports.",
            )
