"""Changes of the pages for the site (mkdocs.yml), where the checkout around them is missing."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

_DOCS = Path(__file__).parent
_LINK = re.compile(r"\[([^\]]*)\]\(((?:\.\./)[^)\s#]*)(?:#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):(<code>)(?:~|\.)?")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links to files beside docs/ into their text: the site does not have them."""
    folder = _DOCS / PurePosixPath(page.file.src_uri).parent

    def kept(link: re.Match[str]) -> str:
        inside = (folder / link[2]).resolve().is_relative_to(_DOCS)
        return link[0] if inside else link[1]

    return _LINK.sub(kept, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Take Sphinx's roles away from docstrings: :class:`X` is X."""
    return _ROLE.sub(r"\1", html)
