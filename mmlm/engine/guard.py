"""The guard around ``generate``: refuses modes that would silently change what methods compute.

Chunked prefill and assisted or prompt-lookup decoding run without any error on a model with hooks,
but hand a method its prompt in pieces or several guesses at once. They are refused by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mmlm.engine.search import searching, through_search
from mmlm.errors import IncompatibleMethods, LayoutError, NeedsDynamicCache, RefusedMode

if TYPE_CHECKING:
    from mmlm.engine.method import Method
    from mmlm.engine.session import Session

__all__ = ["guarded_generate", "refuse_static"]

_REFUSED: dict[str, str] = {
    "prefill_chunk_size": "chunked prefill",
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt-lookup decoding",
    "assistant_early_exit": "early-exit assisted decoding",
    "use_mtp": "multi-token-prediction decoding",
}
_ADVICE = "Leave that argument out, or generate without methods."


def guarded_generate(session: Session, stack: ExitStack) -> None:
    """Puts the guard on the model object; ``stack`` takes it off again."""
    model: Any = session.model
    original = model.generate
    before = vars(model).get("generate")
    search = searching(session)

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        _check(session, args, kwargs)
        _remember(session, original, args, kwargs)
        try:
            if search is not None:
                return through_search(session, search, original, args, kwargs)
            return original(*args, **kwargs)
        finally:
            session.finish()
            session.generating, session.vision, session.mask, session.given_rows = (
                False,
                {},
                None,
                None,
            )

    def restore() -> None:
        if before is None:
            del model.generate
        else:
            model.generate = before

    model.generate = generate
    stack.callback(restore)


def _check(session: Session, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    names = " + ".join(m.label for m in session.methods)
    config = kwargs.get("generation_config") or getattr(session.model, "generation_config", None)
    for key, what in _REFUSED.items():
        if kwargs.get(key) is not None or getattr(config, key, None) is not None:
            raise RefusedMode(f"{names} cannot run with {what} ({key}).", advice=_ADVICE)
    use_cache = kwargs.get("use_cache", getattr(config, "use_cache", True))
    if use_cache is False:
        raise IncompatibleMethods(
            f"{names} cannot run with use_cache=False: every step would look like a new prompt.",
            advice="Leave use_cache at True.",
        )
    beams = kwargs.get("num_beams") or getattr(config, "num_beams", None) or 1
    # What depends on the prompt alone is equal for all beams of a prompt.
    measuring = [m.label for m in session.methods if m.measures and not m.rewinds]
    if measuring and beams > 1:
        raise IncompatibleMethods(
            f"{' + '.join(measuring)} cannot run with beam search (num_beams={beams}): beams "
            "change places, and what was measured would belong to no answer.",
            advice="Generate with num_beams=1.",
        )
    kind = kwargs.get("cache_implementation") or getattr(config, "cache_implementation", None)
    if kind not in (None, "dynamic", "dynamic_full"):
        refuse_static(session.methods, f"a {kind} cache")
    if session.riders and kind not in (None, "dynamic", "dynamic_full"):
        raise IncompatibleMethods(
            f"{names} lays rows into the prefill, which a {kind} cache cannot hold.",
            advice="Leave cache_implementation out, or use text_branch='plain'.",
        )
    past = kwargs.get("past_key_values")
    if past is not None and int(past.get_seq_length()) > 0:
        raise IncompatibleMethods(
            f"{names} cannot continue a cache that was filled before (past_key_values).",
            advice="Pass the whole prompt and no cache.",
        )


def refuse_static(methods: Iterable[Method], what: str) -> None:
    """Refuses a cache of fixed size beside methods that need one that grows.

    Raises:
        NeedsDynamicCache: If there is such a method; names it.
    """
    needing = [method.label for method in methods if method.needs_dynamic_cache]
    if needing:
        raise NeedsDynamicCache(
            f"{' + '.join(needing)} cannot run with {what}: it holds every position in every "
            "layer, whatever leaves the prompt.",
            advice="Leave cache_implementation out: a dynamic cache gets shorter by what left.",
        )


def _remember(
    session: Session, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Keeps what ``generate`` will hide from the forward pass: pixels, 2-D mask, row count."""
    given = inspect.signature(original).bind_partial(*args, **kwargs).arguments
    inputs = {**kwargs, "input_ids": kwargs.get("input_ids", given.get("inputs"))}
    if "mm_encoder_outputs" in inputs and session.branches:
        raise LayoutError(
            "Images came as mm_encoder_outputs, but a method needs the pictures themselves.",
            advice="Pass pixel_values.",
        )
    ids = inputs.get("input_ids")
    rows = ids if isinstance(ids, Tensor) and ids.numel() else inputs.get("inputs_embeds")
    session.generating = True
    session.vision = session.vision_inputs(inputs)
    session.mask = inputs.get("attention_mask")
    session.given_rows = None if rows is None else rows.shape[0]
