"""Node ids, lookup counts and names, without a file system."""

from __future__ import annotations

import pytest

from iohang_fuse.inodes import ROOT, Inodes, Key

DEVICE = 7


def key(number: int, handle: bytes = b"first", device: int = DEVICE) -> Key:
    return Key(device, number, handle)


@pytest.fixture
def inodes() -> Inodes:
    return Inodes(key(2), 3)


def test_an_inode_has_its_own_number_where_that_is_free(inodes: Inodes) -> None:
    node, new = inodes.looked_up(key(100), 10, ROOT, b"a")
    assert (node.id, new) == (100, True)
    number_one, _ = inodes.looked_up(key(ROOT), 11, ROOT, b"one")
    assert number_one.id != ROOT
    elsewhere, _ = inodes.looked_up(key(100, device=8), 12, ROOT, b"b")
    assert elsewhere.id not in {100, ROOT, number_one.id}


def test_two_names_of_one_inode_are_one_node(inodes: Inodes) -> None:
    node, _ = inodes.looked_up(key(100), 10, ROOT, b"a")
    again, new = inodes.looked_up(key(100), 11, ROOT, b"b")
    assert again is node
    assert not new
    assert (node.fd, node.lookups) == (10, 2)


def test_a_number_used_again_is_another_node(inodes: Inodes) -> None:
    """The handle tells: on NFS a server may use a number again while we still know the old file."""
    old, _ = inodes.looked_up(key(100), 10, ROOT, b"a")
    new, is_new = inodes.looked_up(key(100, b"second"), 11, ROOT, b"a")
    assert is_new
    assert new.id != old.id
    assert inodes[old.id] is old
    assert inodes.named(ROOT, b"a") is new


def test_an_id_given_again_has_another_generation(inodes: Inodes) -> None:
    old, _ = inodes.looked_up(key(100), 10, ROOT, b"a")
    inodes.forget(100, 1)
    new, _ = inodes.looked_up(key(100, b"second"), 11, ROOT, b"a")
    assert new.id == old.id
    assert new.generation != old.generation


def test_a_node_is_gone_when_all_its_lookups_are_taken_back(inodes: Inodes) -> None:
    for name in (b"a", b"b", b"a"):
        inodes.looked_up(key(100), 10, ROOT, name)
    assert inodes.forget(100, 2) is None
    gone = inodes.forget(100, 1)
    assert gone is not None
    assert gone.fd == 10
    with pytest.raises(KeyError):
        inodes[100]
    assert inodes.named(ROOT, b"a") is None
    assert inodes.forget(100, 1) is None
    assert len(inodes) == 1


def test_the_root_stays(inodes: Inodes) -> None:
    assert inodes.forget(ROOT, 1000) is None
    assert inodes[ROOT].fd == 3


def test_names_follow_what_happens(inodes: Inodes) -> None:
    folder, _ = inodes.looked_up(key(50), 9, ROOT, b"folder")
    node, _ = inodes.looked_up(key(100), 10, folder.id, b"a")
    assert inodes.path(node) == b"folder/a"
    inodes.renamed(folder.id, b"a", ROOT, b"b", exchange=False)
    assert inodes.path(node) == b"b"
    inodes.renamed(ROOT, b"folder", ROOT, b"moved", exchange=False)
    inodes.renamed(ROOT, b"b", folder.id, b"c", exchange=False)
    assert inodes.path(node) == b"moved/c"
    inodes.looked_up(key(100), 10, ROOT, b"second")
    inodes.unlinked(folder.id, b"c")
    assert inodes.path(node) == b"second"
    inodes.unlinked(ROOT, b"second")
    assert inodes.path(node) == b"(inode 100)"


def test_exchange_moves_both_names(inodes: Inodes) -> None:
    one, _ = inodes.looked_up(key(100), 10, ROOT, b"one")
    other, _ = inodes.looked_up(key(101), 11, ROOT, b"other")
    inodes.renamed(ROOT, b"one", ROOT, b"other", exchange=True)
    assert (inodes.path(one), inodes.path(other)) == (b"other", b"one")


def test_the_parent_of_a_directory(inodes: Inodes) -> None:
    folder, _ = inodes.looked_up(key(50), 9, ROOT, b"folder")
    inner, _ = inodes.looked_up(key(51), 10, folder.id, b"inner")
    assert (inodes.parent(inner), inodes.parent(folder), inodes.parent(inodes[ROOT])) == (50, ROOT, ROOT)


def test_who_is_asked_to_be_forgotten(inodes: Inodes) -> None:
    """Each in its turn, and none twice; directories and the root never."""
    for number in range(100, 110):
        inodes.looked_up(key(number), number, ROOT, b"%d" % number)
    inodes[103].directory = True
    asked = []
    for _ in range(4):
        for node in inodes.to_forget(4):
            node.asked = True
            asked.append(node.id)
    assert asked == [100, 101, 102, 104, 105, 106, 107, 108, 109]
    inodes.looked_up(key(100), 100, ROOT, b"100")
    assert [node.id for _ in range(3) for node in inodes.to_forget(4)] == [100]
