"""Sphinx: the pages as HTML, and the manual pages.

    sphinx-build -W -n --keep-going -b html docs build/html
    sphinx-build -W -n --keep-going -b man docs build/man

A link in a page is written as GitHub reads it: `semantics.rst <semantics.rst>`_. `_resolve` makes it one that works in what is
built, and warns where there is no such page, file or heading. A link to a file that is no page (`../contrib/iohang.yaml`) becomes a
download of it: `_bring`.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urlsplit

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
log = logging.getLogger(__name__)

# ---- what Sphinx reads

project = "iohang-fuse"
author = "the iohang-fuse authors"
project_copyright = author
release = version = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["version"]

nitpicky = True
highlight_language = "none"  # commands and their output, which no lexer understands
html_theme = "alabaster"
html_theme_options = {"description": "failed disk I/O waits until the storage is back", "page_width": "1100px"}

man_pages = [
    ("iohang-mount", "iohang-mount", "mirror a directory of disk images, and hold its failed I/O", "", 8),
    ("iohang-mount", "mount.iohang", "mirror a directory of disk images, and hold its failed I/O", "", 8),
    ("umount.fuse.iohang-mount", "umount.fuse.iohang-mount", "unmount, and wait for the server to end", "", 8),
    ("iohangctl", "iohangctl", "ask which images of an iohang-fuse mount hang, and say what to do", "", 8),
    ("iohang-flaky", "iohang-flaky", "mirror a directory, and fail when told to", "", 8),
    ("iohang.yaml", "iohang.yaml", "configuration of iohang-mount", "", 5),
]

# ---- links


def _links(page: nodes.document, name: str) -> Iterator[tuple[nodes.reference, SplitResult, str]]:
    """Each link of the page *name* that leads to a file of this tree: its node, what is written, and the file, from docs/ on."""
    for link in [*page.findall(nodes.reference)]:
        url = urlsplit(link.get("refuri", ""))
        if url.path and not (url.scheme or url.netloc or link.get("internal")):
            yield link, url, os.path.normpath(os.path.join(os.path.dirname(name), url.path))


def _bring(app: Sphinx, page: nodes.document) -> None:
    for link, url, target in _links(page, app.env.docname):
        is_page = target.removesuffix(".rst") in app.env.found_docs
        if not is_page and (DOCS / target).is_file():
            link.replace_self(
                addnodes.download_reference("", "", *link.children, reftarget=url.path, refdoc=app.env.docname)
            )


def _resolve(app: Sphinx, page: nodes.document, name: str) -> None:
    for link, url, target in _links(page, name):
        other = target.removesuffix(".rst")
        if other == target or other not in app.env.found_docs:
            log.warning("no page and no file %s", target, location=link)
        elif url.fragment and url.fragment not in app.env.get_doctree(other).ids:
            log.warning("%s has no heading #%s", target, url.fragment, location=link)
        else:
            anchor = f"#{url.fragment}" if url.fragment else ""
            link["refuri"] = app.builder.get_relative_uri(name, other) + anchor


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("doctree-read", _bring, priority=400)  # before Sphinx looks for downloads
    app.connect("doctree-resolved", _resolve)
