"""The API pages: every name in every public ``__all__``, rendered by mkdocstrings.

They are made while the site is built (tools/docs_pages/hook.py) and not committed: on GitHub they
would show nothing, and the code next to them says the same. A name is rendered where it is defined;
where it is exported again, a link leads there.
"""

from __future__ import annotations

from collections import defaultdict

from docs_pages.source import Module, public_modules

NAMES = "<!-- names of mmlm -->"
ROOMS = "<!-- rooms -->"


def rooms() -> dict[str, list[Module]]:
    """The modules of each page: a package of the second level, or what stands beside those."""
    found = public_modules()
    packages = {".".join(m.name.split(".")[:2]) for m in found if m.name.count(".") >= 2}
    packages |= {m.name for m in found if m.path.name == "__init__.py" and m.name.count(".") == 1}
    grouped: dict[str, list[Module]] = defaultdict(list)
    for module in found:
        first_two = ".".join(module.name.split(".")[:2])
        grouped[first_two if first_two in packages else module.name.split(".")[0]].append(module)
    return dict(sorted(grouped.items()))


def room_pages() -> dict[str, str]:
    """The text of every API page by its path below docs/."""
    return {f"api/{room}.md": _room(room, members) for room, members in rooms().items()}


def front(markdown: str) -> str:
    """docs/api.md with its two tables in place of their marks."""
    (mmlm,) = (module for module in public_modules() if module.name == "mmlm")
    names = ["| name | stands in |", "| --- | --- |"]
    for name in sorted(mmlm.public, key=str.lower):
        origin = mmlm.origin(name)
        names.append(f"| [`mmlm.{name}`][{origin}.{name}] | `{origin}` |")
    pages = ["| page | modules | public names |", "| --- | --- | --- |"]
    for room, members in rooms().items():
        count = sum(len(module.public) for module in members)
        pages.append(f"| [`{room}`](api/{room}.md) | {len(members)} | {count} |")
    return markdown.replace(NAMES, "\n".join(names)).replace(ROOMS, "\n".join(pages))


def _room(room: str, members: list[Module]) -> str:
    # A search should find the guides first: the names of everything match everything.
    lines = ["---", "search: {boost: 0.2}", "---", f"# {room}"]
    for module in members:
        lines += ["", *_module(module)]
    return "\n".join(lines) + "\n"


def _module(module: Module) -> list[str]:
    """The rendered names of a module, then links to what it only passes on."""
    known = {m.name: set(m.public) for m in public_modules()}
    own = [name for name in module.public if module.origin(name) == module.name]
    passed = [name for name in module.public if name not in own]
    linked = [name for name in passed if name in known.get(module.origin(name), ())]
    together = [name for name in own if name in module.set_together]
    rendered = [name for name in own if name not in together]
    lines = [f"::: {module.name}", "    options:"]
    lines += ["      members:", *(f"        - {name}" for name in rendered)]
    lines[-1] += "" if rendered else " []"
    for name in together:  # Griffe does not see these
        heading = f"### {name} {{ #{module.name}.{name} }}"
        lines += ["", heading, "", f"`{module.set_together[name]}`"]
    for name in passed:
        if name not in linked:  # its own module says nothing of what is public: here is its place
            lines += ["", f"::: {module.origin(name)}.{name}", "    options: {heading_level: 3}"]
    if linked:
        links = ", ".join(f"[`{name}`][{module.origin(name)}.{name}]" for name in linked)
        lines += ["", f"Also importable from `{module.name}`: {links}."]
    return lines
