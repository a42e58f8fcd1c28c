"""Node ids, lookup counts, names and hard links.

1. Pure: no trio, no os, no system call. Descriptors are numbers that somebody else closes.
2. A node is one inode of SOURCE, whatever its names: its identity is (device, inode number, file handle). The handle has
   the inode's generation, so a number that SOURCE uses again for another file is another node.
3. Each reply to the kernel that names a node is one lookup; FORGET takes lookups back. A node without lookups is gone.
4. Names are what this mount last saw. They serve messages; nothing is ever opened by them here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = 1
_FOREIGN = 1 << 62
"""Node ids from here on belong to inodes whose own number is taken: on another device, or used again."""


class Key(NamedTuple):
    """What makes two names the same file. *device* is 0 for SOURCE's own: mounted anew, it has another number."""

    device: int
    number: int
    handle: bytes


@dataclass(slots=True, eq=False)
class Node:
    """One inode that the kernel knows of. *fd* is an O_PATH descriptor that keeps it findable."""

    id: int
    generation: int
    key: Key
    fd: int
    lookups: int = 0
    directory: bool = False
    asked: bool = False  # whether the kernel has been asked to forget it, since it was last looked up
    names: dict[tuple[int, bytes], None] = field(default_factory=dict)  # (parent's id, name), oldest first


class Inodes:
    """All nodes of one mount. The root is there from the beginning and is never forgotten."""

    def __init__(self, root: Key, root_fd: int, *, handles_last: bool = True) -> None:
        """*handles_last*: whether a handle is still the same when SOURCE is mounted anew. FUSE's is its server's own."""
        self._device = root.device
        self._handles_last = handles_last
        root = self._own(root)
        self._next_foreign = _FOREIGN
        self._generation = 0
        node = Node(ROOT, 0, root, root_fd, lookups=1)
        self._by_id = {ROOT: node}
        self._by_key = {root: node}
        self._by_name: dict[tuple[int, bytes], Node] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __getitem__(self, node_id: int) -> Node:
        """Raises KeyError for a node that the kernel has forgotten."""
        return self._by_id[node_id]

    def __contains__(self, key: Key) -> bool:
        """Whether the kernel knows of an inode."""
        return self._own(key) in self._by_key

    def mounted_anew(self, root: Key) -> bool:
        """Whether SOURCE, whose top is *root* now, was mounted anew: what is on its new device is what was on the old one."""
        before, self._device = self._device, root.device
        return before != root.device

    def named(self, parent: int, name: bytes) -> Node | None:
        """The node that was last seen under *name*, if the kernel still knows it."""
        return self._by_name.get((parent, name))

    def looked_up(self, key: Key, fd: int, parent: int, name: bytes) -> tuple[Node, bool]:
        """Count one lookup of *key* under *name*. The second value says whether *fd* is now the node's own."""
        key = self._own(key)
        node = self._by_key.get(key)
        new = node is None
        if node is None:
            self._generation += 1
            node = Node(self._free_id(key), self._generation, key, fd)
            self._by_id[node.id] = self._by_key[key] = node
        node.lookups += 1
        node.asked = False
        if node.id != ROOT:
            self._give_name(node, parent, name)
        return node, new

    def forget(self, node_id: int, lookups: int) -> Node | None:
        """Take *lookups* back. Returns the node if it is gone: its descriptor is the caller's to close."""
        node = self._by_id.get(node_id)
        if node is None or node_id == ROOT:
            return None
        node.lookups -= lookups
        if node.lookups > 0:
            return None
        del self._by_id[node_id]
        del self._by_key[node.key]
        for name in node.names:
            del self._by_name[name]
        return node

    def unlinked(self, parent: int, name: bytes) -> None:
        """*name* is gone from *parent*."""
        self._take_name(parent, name)

    def renamed(self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, exchange: bool) -> None:
        """*name* has become *new_name*; with *exchange* also the other way round."""
        if self.named(parent, name) is not None and self.named(parent, name) is self.named(new_parent, new_name):
            return  # two links to one file: rename(2) leaves both
        moved = self._take_name(parent, name)
        target = self._take_name(new_parent, new_name)
        if moved is not None:
            self._give_name(moved, new_parent, new_name)
        if exchange and target is not None:
            self._give_name(target, parent, name)

    def path(self, node: Node) -> bytes:
        """A name of *node* relative to SOURCE, for messages: the oldest that still leads to the root."""
        parts, top = self._names_to_root(node)
        if top.id != ROOT:
            parts = [b"(inode %d)" % top.key.number, *parts]
        return b"/".join(parts) or b"."

    def whereabouts(self, node: Node) -> bytes | None:
        """The same for finding it again; None if no name leads to it."""
        parts, top = self._names_to_root(node)
        return b"/".join(parts) if parts and top.id == ROOT else None

    def _names_to_root(self, node: Node) -> tuple[list[bytes], Node]:
        parts: list[bytes] = []
        seen = set()
        while node.id != ROOT:
            step = next(((p, n) for p, n in node.names if p in self._by_id and p not in seen), None)
            if step is None:
                break
            seen.add(node.id)
            parts.append(step[1])
            node = self._by_id[step[0]]
        return parts[::-1], node

    def parent(self, node: Node) -> int:
        """The id of a directory that *node* was last seen in; the root is its own, as `..` has it."""
        return next(iter(node.names), (node.id, b""))[0]

    def to_forget(self, count: int) -> Iterator[Node]:
        """Of the *count* nodes whose turn it is, in the order of their first lookup, those that may be asked for."""
        for node in [*itertools.islice(self._by_id.values(), count)]:
            del self._by_id[node.id]
            self._by_id[node.id] = node
            if not (node.directory or node.asked or node.id == ROOT):
                yield node

    def _own(self, key: Key) -> Key:
        if key.device != self._device:
            return key
        return key._replace(device=0, handle=key.handle if self._handles_last else b"")

    def _free_id(self, key: Key) -> int:
        # The inode's own number where it is free, so that `ls -i` shows the same here as on SOURCE.
        if key.device == 0 and ROOT < key.number < _FOREIGN and key.number not in self._by_id:
            return key.number
        self._next_foreign += 1
        return self._next_foreign

    def _give_name(self, node: Node, parent: int, name: bytes) -> None:
        if self._by_name.get((parent, name)) is not node:
            self._take_name(parent, name)
            self._by_name[parent, name] = node
            node.names[parent, name] = None

    def _take_name(self, parent: int, name: bytes) -> Node | None:
        node = self._by_name.pop((parent, name), None)
        if node is not None:
            del node.names[parent, name]
        return node
