"""A hook of MkDocs: adds the pages that are made of the whole source while the site is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs_pages import api


def on_config(config: Any) -> Any:
    """Puts the API pages below their front page in the navigation."""
    below = [{room: f"api/{room}.md"} for room in api.rooms()]
    config.nav = [
        {"API": [{"Overview": entry["API"]}, *below]} if "API" in entry else entry
        for entry in config.nav
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages themselves."""
    from mkdocs.structure.files import File

    made = api.room_pages() | {"error-messages.md": messages.messages_page()}
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fills the tables of the front page."""
    return api.front(markdown) if page.file.src_uri == "api.md" else markdown
