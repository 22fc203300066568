"""A hook of MkDocs: adds the pages that are made of the whole source while the site is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs_pages import api, messages

MESSAGES = "error-messages.md"


def on_config(config: Any) -> Any:
    """Puts these pages where a reader looks for them."""
    packages: dict[str, list[dict[str, str]]] = {}
    for room in api.rooms():
        packages.setdefault(room.split(".")[0], []).append({room: f"api/{room}.md"})
    below = [{package: pages} for package, pages in packages.items()]
    nav = []
    for entry in config.nav:
        if "API" in entry:
            nav.append({"API": [{"Overview": entry["API"]}, *below]})
        elif "Start" in entry:
            nav.append({"Start": [*entry["Start"], {"Error messages": MESSAGES}]})
        else:
            nav.append(entry)
    config.nav = nav
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages themselves."""
    from mkdocs.structure.files import File

    for name, text in (api.room_pages() | {MESSAGES: messages.messages_page()}).items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills the tables of the API's front page; leads from troubleshooting to the messages."""
    if page.file.src_uri == "api.md":
        return api.front(markdown)
    if page.file.src_uri == "troubleshooting.md":
        return markdown.replace("**Error messages**", f"[Error messages]({MESSAGES})")
    return markdown
