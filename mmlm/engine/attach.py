"""attach(): installs methods on a model, combines what they contribute, and removes everything.

Only hooks whose site somebody uses are installed. Nothing is written into the model's classes, its
configuration or the library; what changes while running is :class:`mmlm.engine.session.Session`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from mmlm.engine.anatomy import Anatomy, unwrap
from mmlm.engine.attention.editor import ROW_SITES, install_rows
from mmlm.engine.branches.template import known_processor
from mmlm.engine.guard import guarded_generate
from mmlm.engine.hooks import heads_hook, install_attended, layer_in_hook, layer_out_hook, mlp_hook
from mmlm.engine.layout import TokenLayout
from mmlm.engine.masks.openings import install_masks
from mmlm.engine.masks.turns import install_handing
from mmlm.engine.method import IN_BRANCHES, Method
from mmlm.engine.removal.compaction import install_compaction
from mmlm.engine.removal.pruning import install_deep_features, install_pruning
from mmlm.engine.session import Session
from mmlm.engine.vision.pooling_hooks import install_doors, install_pooling
from mmlm.engine.vision.sight import install_vision
from mmlm.engine.weights import lent
from mmlm.errors import IncompatibleMethods, UnsupportedAttention, UnsupportedModel

if TYPE_CHECKING:
    from mmlm.engine.build_in import Built

__all__ = ["BUILT", "MARK", "attach", "install", "measured", "refuse"]

#: Where a model keeps the session that is running, and what is built into it.
MARK, BUILT = "_mmlm_session", "_mmlm_built"
#: Sites whose mechanism is installed by this module.
_WORKING = frozenset(
    {
        "attended",
        "heads",
        "keys",
        "layer_in",
        "layer_out",
        "logits",
        "mask",
        "mlp",
        "patches",
        "pool",
        "scores",
        "search",
        "tokens",
        "vision_layer",
        "visual_tokens",
        "weights",
    }
)
#: Sites outside of decoder layers, or around one: they get all rows of a batch.
_BESIDE_LAYERS = frozenset(
    {
        "layer_in",
        "layer_out",
        "logits",
        "mask",
        "patches",
        "search",
        "tokens",
        "vision_layer",
        "visual_tokens",
    }
)


@contextmanager
def attach(
    model: nn.Module,
    *methods: Method,
    layout: TokenLayout | None = None,
    processor: Any = None,
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
        processor: The model's processor, for methods that rewrite the prompt's text and so must
            tell the user's words from the chat template. :func:`mmlm.load` remembers its own.

    Yields:
        The same model.

    Raises:
        IncompatibleMethods: If methods are already attached, two of these exclude each other, or
            one has weights that nobody trained.
        InputError, MissingTensors: If the file of a method's weights is unreadable or does not fit.
        UnsupportedModel: If the model lacks what a method needs.
    """
    if not methods:
        yield model
        return
    inner = unwrap(model)
    if hasattr(inner, MARK) and not _only_built(inner):
        held = ", ".join(m.label for m in getattr(inner, MARK).methods)
        raise IncompatibleMethods(
            f"{held} is already attached to this model, so "
            f"{', '.join(m.label for m in methods)} cannot be.",
            advice="Attach all methods in one call: attach(model, A(), B()).",
        )
    anatomy = Anatomy(inner)
    built: Built | None = getattr(inner, BUILT, None)
    lasting = () if built is None else built.methods
    methods = (*lasting, *methods)
    refuse(anatomy, methods, built=lasting)
    _warn_of_order(methods)
    if processor is None:
        processor = known_processor(inner)
    session = Session(anatomy, methods, layout, processor)
    session.lasting = lasting
    session.lent = lent(anatomy, methods, lasting)
    with ExitStack() as stack:
        if built is not None:
            built.pause()
            stack.callback(built.resume)
        install(session, stack)
        yield model


def measured(model: nn.Module, tokens: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """What the attached methods measured about the last prompt of this block.

        with attach(model, TextDominance()):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = measured(model)

    Args:
        model: The model, inside the block.
        tokens: New tokens of each row, the end token included. Rows of a batch run on until the
            longest has ended: without these numbers all that ran is counted.

    Returns:
        Per row: name of the measurement -> record. Empty if nothing attached measures anything.

    Raises:
        ValueError: If nothing is attached, or the numbers are not one per row.
    """
    session: Session | None = getattr(unwrap(model), MARK, None)
    if session is None:
        raise ValueError("Nothing is attached to this model; call measured() inside the block.")
    return session.measured(tokens)


def _only_built(model: Any) -> bool:
    """Whether what runs on a model is what is built into it, and nothing else."""
    built: Built | None = getattr(model, BUILT, None)
    return built is not None and built.running


def install(session: Session, stack: ExitStack) -> None:
    """Puts in the guard and the hooks; ``stack`` takes everything out again."""
    setattr(session.model, MARK, session)
    stack.callback(delattr, session.model, MARK)
    stack.callback(session.finish)
    guarded_generate(session, stack)
    anatomy, composite = session.anatomy, session.anatomy.composite

    def keep(handle: RemovableHandle) -> None:
        stack.callback(handle.remove)

    install_handing(session, stack)
    keep(composite.register_forward_pre_hook(session.on_inputs, with_kwargs=True))
    keep(composite.register_forward_hook(session.on_hidden))
    keep(anatomy.text.register_forward_pre_hook(session.on_decoder, with_kwargs=True))
    # In this order: what enters the decoder, what leaves between layers, who sees whom.
    install_compaction(session, stack)
    install_pruning(session, stack)
    install_masks(session, stack)
    for layer, block in enumerate(anatomy.layers):
        if acting := session.users("layer_in", layer):
            hook = layer_in_hook(session, layer, acting)
            keep(block.register_forward_pre_hook(hook, with_kwargs=True))
        if acting := session.users("heads", layer):
            hook = heads_hook(session, layer, acting)
            keep(anatomy.o_proj(layer).register_forward_pre_hook(hook))
        if acting := session.users("attended", layer):
            install_attended(session, layer, acting, stack)
        if acting := session.users("mlp", layer):
            hook = mlp_hook(session, layer, acting)
            keep(anatomy.mlp(layer).register_forward_hook(hook))
        if acting := session.users("layer_out", layer):
            hook = layer_out_hook(session, layer, acting)
            keep(block.register_forward_hook(hook))
    install_deep_features(session, stack)
    install_rows(session, stack)
    install_pooling(session, stack)
    install_vision(session, stack)
    install_doors(session, stack)
    if session.users("logits"):
        keep(anatomy.model.register_forward_hook(session.on_logits))


def refuse(
    anatomy: Anatomy, methods: tuple[Method, ...], *, built: tuple[Method, ...] = ()
) -> None:
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
            error = UnsupportedAttention if "mask" in method.sites else UnsupportedModel
            raise error(
                f"{method.label} cannot run on this model: {'; '.join(reasons)}.",
                advice="`mmlm doctor MODEL` lists what this model supports.",
            )
    _refuse_pruning(anatomy, methods)
    _refuse_auxiliary(methods, built)
    _refuse_equal_measures(methods)
    _refuse_company(methods)


def _refuse_company(methods: tuple[Method, ...]) -> None:
    """Methods that must be the only one at a site."""
    for method in methods:
        for other in methods:
            shared = sorted(method.alone_at & (other.sites - other.only_looks))
            if other is not method and shared:
                raise IncompatibleMethods(
                    f"{method.label} and {other.label} both act at {shared[0]}, where the first "
                    "must be alone.",
                    advice="Use one of them.",
                )


def _refuse_equal_measures(methods: tuple[Method, ...]) -> None:
    """Two methods whose records would be stored under one name."""
    for i, method in enumerate(methods):
        for other in methods[:i]:
            if method.measures and method.measures == other.measures:
                raise IncompatibleMethods(
                    f"{other.label} and {method.label} both measure {method.measures}.",
                    advice="Attach one of them.",
                )


def _refuse_auxiliary(methods: tuple[Method, ...], built: tuple[Method, ...]) -> None:
    """Auxiliary prompts of a model whose built-in methods know the main prompt only."""
    deep = [m for m in built if m.sites - m.only_looks - IN_BRANCHES]
    for method in methods:
        if deep and (method.branches or method.riders):
            sites = ", ".join(sorted(deep[0].sites - IN_BRANCHES))
            raise IncompatibleMethods(
                f"{method.label} runs auxiliary prompts, to which {deep[0].label} is not applied: "
                f"it is built in and acts at {sites}.",
                advice="Use one of them.",
            )


def _refuse_pruning(anatomy: Anatomy, methods: tuple[Method, ...]) -> None:
    """Methods that cannot be together because one of them removes positions."""
    for remover in methods:
        removes = sorted({"patches", "tokens", "visual_tokens"} & remover.sites)
        if not removes:
            continue
        for other in methods:
            if other is not remover and other.needs_all_visual:
                raise IncompatibleMethods(
                    f"{other.label} needs all image positions, and {remover.label} removes some "
                    f"({', '.join(removes)}).",
                    advice="Use one of them.",
                )
            if other is not remover and "patches" in removes and "patches" in other.sites:
                raise IncompatibleMethods(
                    f"{remover.label} and {other.label} both choose patches in the vision tower.",
                    advice="Use one of them.",
                )
            if "patches" in removes and "vision_layer" in other.sites:
                raise IncompatibleMethods(
                    f"{other.label} acts on all patches in the vision tower (vision_layer), of "
                    f"which {remover.label} removes some (patches).",
                    advice="Use one of them.",
                )
        acts_at = remover.acts_at
        layers = [x for x in range(anatomy.n_layers) if acts_at(anatomy, "tokens", x)]
        if "tokens" not in removes or not layers:
            continue
        for other in methods:
            # Scaled keys follow the positions that are left (mmlm.engine.attention.scaled_keys).
            rows = sorted(set(ROW_SITES) & other.sites - {"keys"})
            if rows == ["weights"] and other.sites <= other.only_looks and other.rows == "last":
                continue  # gets the last row in the sequence's positions
            behind = range(layers[0], anatomy.n_layers)
            after = [x for x in behind if other.acts_in(anatomy, x)]
            seen = [x for x in behind if any(other.acts_at(anatomy, site, x) for site in rows)]
            if seen:
                raise IncompatibleMethods(
                    f"{other.label} works on attention rows ({', '.join(rows)}) of layer "
                    f"{seen[-1]}, whose columns are no longer the sequence's positions: "
                    f"{remover.label} removes some from layer {layers[0]} on.",
                    advice="Use one of them, or keep the first to layers before the removal.",
                )
            inside = sorted(other.sites - _BESIDE_LAYERS)
            if remover.runs_apart is not None and other is not remover and inside and after:
                raise IncompatibleMethods(
                    f"{other.label} acts inside of layer {after[-1]} ({', '.join(inside)}), which "
                    f"{remover.label} runs twice, each time on a part of the rows.",
                    advice=f"Use one of them, or {type(remover).__name__}(batch='exact').",
                )
            if other.riders:
                raise IncompatibleMethods(
                    f"{other.label} lays rows into the prefill, of which {remover.label} would "
                    "remove positions.",
                    advice="Use one of them, or text_branch='plain'.",
                )


def _warn_of_order(methods: tuple[Method, ...]) -> None:
    """Says once that the order matters where two methods rewrite the same rows."""
    rewriting = [m for m in methods if "weights" in m.sites - m.only_looks]
    if len(rewriting) > 1:
        names = ", then ".join(m.label for m in rewriting)
        warnings.warn(
            f"Several methods rewrite attention weights; they act one after another: {names}.",
            stacklevel=5,
        )
