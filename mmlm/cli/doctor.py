"""``mmlm doctor``: what a model is, which methods it supports, and why not the others.

Only the small files of the checkpoint are read: the model is built from its configuration without
any weights, so a model of any size is examined in seconds. With ``--self`` the installation is
examined instead (`mmlm.cli.doctor_self`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmlm.cli import doctor_views
from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.cli.options import EMBEDDED, check_model_name
from mmlm.errors import InputError, UnsupportedModel
from mmlm.progress import library_bars

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.method import Method

__all__ = ["COMMAND", "Doctor", "examine", "run"]


@dataclass(frozen=True)
class Doctor:
    """Options of ``mmlm doctor``.

    Attributes:
        model: A Hugging Face id, a folder, or `embedded`.
        load: Also load the weights and check that every tensor is there.
        installation: Examine the installation and no model: versions, devices, folders, and what is
            missing.
    """

    model: str = EMBEDDED
    load: bool = False
    installation: bool = field(default=False, metadata={"alias": "--self"})


def run(settings: Doctor, terminal: Terminal) -> int:
    """Examines a model, or the installation.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if something is wrong with the installation.

    Raises:
        InputError: If there is no such model, or both are asked for.
        UnsupportedModel: If it is no vision-language model, or a part is missing.
        MissingTensors: With ``load``: if the weights do not fill the model.
    """
    if settings.installation:
        return _examine_installation(settings, terminal)
    check_model_name(settings.model)
    import mmlm
    from mmlm.model.checkpoint import skeleton

    library_bars(terminal.progress)
    report = {"model": settings.model, **examine(*skeleton(settings.model))}
    if settings.load:
        mmlm.load(settings.model)
        report["weights"] = "complete"
    if terminal.json:
        terminal.emit(report)
        return DONE
    for table in doctor_views.of_model(report):
        terminal.table(table)
    return DONE


def _examine_installation(settings: Doctor, terminal: Terminal) -> int:
    if settings.model != EMBEDDED or settings.load:
        raise InputError(
            "--self examines the installation, and a model was named as well.",
            advice="Ask twice: mmlm doctor --self, and mmlm doctor MODEL",
        )
    from mmlm.cli.doctor_self import installation

    report = installation()
    if terminal.json:
        terminal.emit(report)
    for table in doctor_views.of_installation(report):
        terminal.table(table)
    for problem in report["problems"]:
        terminal.error(problem["problem"], problem["advice"])
    terminal.say("" if report["problems"] else "Everything that mmlm needs is here.")
    return SOME_FAILED if report["problems"] else DONE


def examine(model: Any, processor: Any) -> dict[str, Any]:
    """What a model is and which methods it supports, as JSON values.

    Args:
        model: A Hugging Face LVLM; its weights are not looked at.
        processor: Its processor.

    Raises:
        UnsupportedModel: If a part is missing that every method needs.
    """
    import mmlm
    from mmlm.engine.families import FAMILIES
    from mmlm.inputs import has_chat_template

    anatomy = mmlm.Anatomy(model)
    methods = [getattr(mmlm, name)() for name in mmlm.method_names()]
    template = has_chat_template(processor)
    return {
        "class": type(model).__name__,
        "family": anatomy.family_name,
        "family_known": anatomy.family_name in FAMILIES,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "decoder": type(anatomy.text).__name__,
        "layers": anatomy.n_layers,
        "heads": anatomy.n_heads,
        "key_value_heads": anatomy.n_kv_heads,
        "image_token_ids": list(anatomy.image_ids),
        "chat_template": template,
        "parts": {name: _described(*part) for name, part in anatomy.parts().items()},
        "methods": {type(m).__name__: _reasons(anatomy, m, template) for m in methods},
    }


def _reasons(anatomy: Anatomy, method: Method, template: bool) -> list[str]:
    """Why a method at its defaults cannot run; empty if it can."""
    from mmlm.engine.weights import untrained

    try:
        reasons = anatomy.supports(method)
    except (UnsupportedModel, ValueError) as refusal:  # said with the default parameters
        reasons = [str(refusal)]
    if not reasons and (missing := untrained(anatomy, method)):
        reasons = [missing]
    rewrites = any(getattr(branch, "needs_template", False) for branch in method.branches)
    if rewrites and not template:
        reasons.append(
            "it changes the user's words in an auxiliary prompt, and the processor has no chat "
            "template to tell them by; give --model.chat_template simple"
        )
    return reasons


def _described(part: Any, tried: str) -> dict[str, Any]:
    """One part as JSON values: its class, how many there are, or why there is none."""
    if tried:
        return {"class": None, "missing": tried}
    if isinstance(part, Sequence) or type(part).__name__ == "ModuleList":
        return {"class": type(part[0]).__name__, "count": len(part)}
    return {"class": type(part).__name__}


COMMAND = Command(
    summary="what a model is, which methods it supports, and why not; --self: what is missing",
    settings=Doctor,
    run=run,
    positional=("model",),
    example=(
        "mmlm doctor llava-hf/llava-1.5-7b-hf\nmmlm doctor ./my-model --load --json\n"
        "mmlm doctor --self"
    ),
)
