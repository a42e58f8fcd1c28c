"""What a file system on NFS must do beside outages: users, locks, open files without a name, other hosts, and our own words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from contrib.guest.nfs.functions import CHECKS

if TYPE_CHECKING:
    from contrib.guest.nfs.guest import Guest

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def seen(guest: Guest) -> list[dict[str, Any]]:
    guest.set_up()
    found: list[dict[str, Any]] = json.loads(guest.python("functions"))["checks"]
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_as_on_nfs(seen: list[dict[str, Any]], name: str) -> None:
    """Each check's own docstring says what is promised (contrib/guest/nfs/functions.py, functions_held.py)."""
    made = {check["kind"]: check for check in seen if check["name"] == name}
    assert set(made) == set(CHECKS[name][1])
    assert not [f"{kind}: {check['why']}" for kind, check in made.items() if not check["ok"]]
