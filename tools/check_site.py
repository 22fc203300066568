"""Checks the built site: links, anchors, offline, and a place for every public name.

python tools/check_site.py site

mkdocs checks links between Markdown pages; this reads what a browser reads, so links that plugins
and the API pages make are checked as well. Nothing is requested: the site must not need a network.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from docs_pages.source import public_modules

#: What makes a browser load something by itself, and the attribute that says what.
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
#: Kinds of <link> that load nothing.
ONLY_NAMED = {"canonical", "prev", "next", "alternate", "edit"}


@dataclass
class Page(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called by the parser for every tag."""
        values = {name: value for name, value in attrs if value}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in LOADS and LOADS[tag] in values and values.get("rel") not in ONLY_NAMED:
            self.loads.append(values[LOADS[tag]])


def read(site: Path) -> dict[Path, Page]:
    """Every page of a site."""
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def faults(site: Path) -> list[str]:
    """What is wrong with a site; empty if nothing is."""
    pages = read(site)
    found = []
    for path, page in pages.items():
        here = path.relative_to(site)
        found += [f"{here}: loads {url} from elsewhere" for url in page.loads if _elsewhere(url)]
        targets = [url for url in page.links + page.loads if not _elsewhere(url)]
        if here.name == "404.html":  # shown below any address, so its links start at the root
            continue
        broken = [url for url in targets if not _leads_somewhere(path, url, pages)]
        found += [f"{here}: {url} leads nowhere" for url in broken]
    anchors = set().union(*(page.anchors for page in pages.values()))
    return found + [
        f"no place for {module.origin(name)}.{name}, which {module.name} offers"
        for module in public_modules()
        for name in module.public
        if f"{module.origin(name)}.{name}" not in anchors
    ]


def _elsewhere(url: str) -> bool:
    return bool(urlsplit(url).scheme or urlsplit(url).netloc)


def _leads_somewhere(path: Path, url: str, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(url)
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.exists():
        return False
    page = pages.get(target)
    return not parts.fragment or page is None or unquote(parts.fragment) in page.anchors


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]).resolve())
    print("\n".join(wrong) or f"{sys.argv[1]}: every link leads somewhere, every name has a place")
    sys.exit(1 if wrong else 0)
