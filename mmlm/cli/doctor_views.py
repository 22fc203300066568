"""The reports of `mmlm doctor` as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["of_installation", "of_model"]


def of_model(report: Mapping[str, Any]) -> list[Any]:
    """What `mmlm.cli.doctor.examine` found, and the methods."""
    from rich.table import Table

    guessed = " (no row in the family table: parts are found by common names)"
    family = report["family"] + ("" if report["family_known"] else guessed)
    heads = f"{report['heads']} heads, {report['key_value_heads']} for keys and values"
    template = "yes" if report["chat_template"] else "none: give --model.chat_template simple"
    what = Table(show_header=False)
    for name, value in {
        "model": report["model"],
        "class": report["class"],
        "family": family,
        "parameters": f"{report['parameters'] / 1e6:,.1f} million",
        "decoder": f"{report['decoder']}: {report['layers']} layers of {heads}",
        "image tokens": ", ".join(map(str, report["image_token_ids"])),
        "chat template": template,
        **{name: _in_words(part) for name, part in report["parts"].items()},
        **({"weights": report["weights"]} if "weights" in report else {}),
    }.items():
        what.add_row(name, value)
    methods = Table("method", "runs", "why not")
    for name, reasons in report["methods"].items():
        methods.add_row(name, "[red]no" if reasons else "[green]yes", "\n".join(reasons))
    return [what, methods]


def _in_words(part: Mapping[str, Any]) -> str:
    if part["class"] is None:
        return f"[red]none[/red]: {part['missing']}"
    return f"{part['count']} of {part['class']}" if "count" in part else part["class"]


def of_installation(report: Mapping[str, Any]) -> list[Any]:
    """What `mmlm.cli.doctor_self.installation` found: what is here, packages, extras."""
    from rich.markup import escape
    from rich.table import Table

    own, devices = report["mmlm"], report["devices"]
    assets = {
        name: asset["state"] or f"[red]{escape(asset['error'])}"
        for name, asset in report["assets"].items()
    }
    hub = report["hub"]
    away = f"{hub['address']}: {hub['why']}; only what is here can be used"
    variables = "\n".join(f"{name}={value}" for name, value in report["variables"].items())
    what = Table(show_header=False)
    for name, value in {
        "mmlm": escape(f"{own['version']}, {own['folder']}"),
        "Python": escape(f"{own['python']}, {own['executable']}"),
        "system": own["system"],
        **_device_rows(devices),
        **assets,
        "hub": "reachable" if hub["reachable"] else escape(away),
        **{name: _folder_row(folder) for name, folder in report["folders"].items()},
        "variables": escape(variables),
    }.items():
        what.add_row(name, value)
    packages = Table("package", "installed", "wanted")
    for name, package in report["packages"].items():
        colour = "green" if package["ok"] else "bold red"
        packages.add_row(name, f"[{colour}]{package['installed'] or 'missing'}", package["wanted"])
    extras = Table("extra", "for", "missing", "install with")
    for name, extra in report["extras"].items():
        missing = ", ".join(extra["missing"]) or "[green]nothing"
        extras.add_row(name, extra["for"], missing, escape(extra["install"] or ""))
    return [what, packages, extras]


def _device_rows(devices: Mapping[str, Any]) -> dict[str, str]:
    from rich.markup import escape

    if "error" in devices:
        return {"torch": f"[red]{escape(devices['error'])}"}
    gpus = [f"{one['name']}, {one['memory_gib']} GiB" for one in devices["gpus"]]
    kinds = {"bfloat16": devices["bfloat16"], "flash attention 2": devices["flash_attention_2"]}
    usable = ", ".join(name for name, there in kinds.items() if there)
    return {
        "processors": f"{devices['processors']}; torch uses {devices['threads']}",
        "torch for": devices["built_for"],
        "GPUs": "\n".join(gpus) or devices["accelerator"] or "none",
        **({"with": usable} if usable else {}),
    }


def _folder_row(folder: Mapping[str, Any]) -> str:
    from rich.markup import escape

    room = f"{folder['free_gib']} GiB free"
    state = room if folder["writable"] else "[red]cannot be written[/red]"
    holds = f"\n{', '.join(folder['holds'])}" if folder["holds"] else ""
    return f"{escape(folder['folder'])} ({state}){escape(holds)}"
