"""The documents are true: references lead to tests that quote the promise, commands and files exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SEMANTICS = (ROOT / "docs/semantics.rst").read_text()
PROMISES = dict(re.findall(r"^(P\d+) .*?\n=+\n(.*?)(?=^P\d+ |\Z)", SEMANTICS, flags=re.MULTILINE | re.DOTALL))


def references() -> list[tuple[str, str, str]]:
    return [
        (promise, file, test)
        for promise, text in PROMISES.items()
        for file, test in re.findall(r"``(tests/\S+\.py)::(\w+)``", text)
    ]


def test_all_promises_are_there() -> None:
    """Each promise "stands in docs/semantics.rst with the test that proves it", or says that it is not there yet."""
    assert [*PROMISES] == [f"P{number}" for number in range(1, 13)]
    for promise, text in PROMISES.items():
        assert "``tests/" in text or "Not yet." in text, promise


@pytest.mark.parametrize(("promise", "file", "test"), references())
def test_references(promise: str, file: str, test: str) -> None:
    """A test that is named as a proof exists and has a docstring."""
    functions = {
        node.name: ast.get_docstring(node)
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert functions.get(test), f"{promise}: {file} has no {test} with a docstring"


@pytest.mark.parametrize("document", ["README.rst", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.rst"))])
def test_links(document: str) -> None:
    """What a document links to or names as a file of this tree is there."""
    text = (ROOT / document).read_text()
    paths = re.findall(r"<((?:docs|contrib)/[^>]+)>`_", text)
    paths += re.findall(r"(?<![\w/.-])((?:iohang_fuse|tests|contrib)/[\w./-]*\w)", text)
    for path in paths:
        assert (ROOT / path).exists(), f"{document} names {path}"
