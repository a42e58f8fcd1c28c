"""One guest with an NFS server for all tests here: it takes a minute to boot, and half a minute to set up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contrib.guest.nfs.guest import Guest

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="package")
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    assert isinstance(request.node, pytest.Package), "without __init__.py here the guest runs until the session's end"
    found = Guest(tmp_path_factory.mktemp("nfs"))
    with found.debian:
        yield found
