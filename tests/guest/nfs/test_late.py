"""Writes that a soft mount has failed, and whose bytes wait in a socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from contrib.guest.nfs.guest import Guest

pytestmark = pytest.mark.slow


def test_what_was_given_up_never_lands(guest: Guest) -> None:
    """P5: "Once a write has been answered with an error, it never reaches the file", also with `nconnect=4`.

    On a bare version 3 mount with `nconnect` it does: three of six blocks, as this was written, and one of six on iohang-fuse with
    reconnect=never.
    """
    guest.set_up()
    for story in json.loads(guest.python("late")):
        assert story["failed"], f"nothing was given up: {story}"
        assert any(story["unsent_bytes"].values()) or story["way"] == "iohang", f"nothing waited in a socket: {story}"
        if story["way"] == "iohang":
            assert story["overwritten"] == 0, story
