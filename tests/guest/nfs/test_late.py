"""Writes that a soft mount has failed, and whose bytes wait in a socket."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from contrib.guest.nfs.guest import Guest

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_what_was_given_up_never_lands(guest: Guest) -> None:
    """P5: "Once a write has been answered with an error, it never reaches the file", also with `nconnect=4`.

    Also where one connection is cut off, and the write has succeeded by another one (P4). On a bare version 3 mount with `nconnect`
    two or three blocks of six have the old data in the end, and one of six on iohang-fuse with reconnect=never.
    """
    guest.set_up()
    stories = json.loads(guest.python("late"))
    for story in stories:
        assert story["failed"] or story["cut"] == "one", f"nothing was given up: {story}"
        if story["way"] == "iohang":
            assert story["overwritten"] == 0, story
    (proof,) = [
        story for story in stories if (story["kind"], story["way"], story["cut"]) == ("late-v3-nconnect", "bare", "one")
    ]
    assert any(proof["unsent_bytes"].values()), f"nothing waited in a socket: {proof}"
