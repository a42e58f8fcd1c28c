"""The TCP connections of this host to one server, as sock_diag(7) shows them, and how one is closed.

Those of the kernel's NFS client are among them: they are sockets like any other. Closing one takes CAP_NET_ADMIN and a kernel with
CONFIG_INET_DIAG_DESTROY, which distributions have for `ss -K`. Layouts: linux/inet_diag.h, linux/sock_diag.h, linux/tcp.h.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address, IPv6Address

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 1, 4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3

_NLMSGHDR = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI")  # family, protocol, extensions, states; then a socket's id
_ID = struct.Struct("!HH16s16s")  # ports and addresses; then interface and cookie
_MESSAGE = struct.Struct("=BBBB48sIIIII")
_ATTRIBUTE = struct.Struct("=HH")

_INET_DIAG_INFO = 2
_TCP_INFO = struct.Struct("=56xI60xQ")  # of struct tcp_info: last_ack_recv, in milliseconds, and bytes_acked

_ANY_COOKIE = b"\xff" * 8
_ALL_STATES = 0xFFF

ESTABLISHED, SYN_SENT = 1, 2
_RETRANSMITTING = 1  # idiag_timer

_ANSWER_BYTES = 1 << 16
_ANSWER_S = 5


@dataclass(frozen=True, slots=True)
class Connection:
    """One TCP connection.

    *retransmits*: how often in a row what is not acknowledged was sent again. *silence_s*: since the last ACK. *waiting_bytes*:
    written, and not acknowledged; *acked_bytes*: acknowledged in all.
    """

    family: int
    state: int
    retransmits: int
    silence_s: float
    waiting_bytes: int
    acked_bytes: int
    identity: bytes


def connections(server: IPv4Address | IPv6Address, port: int) -> list[Connection]:
    """Those to *server*. Raises OSError."""
    family = socket.AF_INET if server.version == 4 else socket.AF_INET6
    identity = _ID.pack(0, port, b"", b"") + bytes(4) + _ANY_COOKIE
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INET_DIAG_INFO - 1), _ALL_STATES) + identity
    packed = server.packed.ljust(16, b"\0")
    # The kernel compares the port, and leaves the address to us.
    found = [_parse(payload) for payload in _ask(_SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP, request)]
    return [each for each in found if each.identity[2:4] == port.to_bytes(2, "big") and each.identity[20:36] == packed]


def close(connection: Connection) -> None:
    """Have the kernel close it, with what it has not got rid of. Raises OSError; that it is gone already is none."""
    request = _REQUEST.pack(connection.family, socket.IPPROTO_TCP, 0, _ALL_STATES) + connection.identity
    try:
        list(_ask(_SOCK_DESTROY, _NLM_F_ACK, request))
    except FileNotFoundError:
        return


def _parse(payload: bytes) -> Connection:
    family, state, timer, retransmits, identity, _expires, _received, waiting, *_ = _MESSAGE.unpack_from(payload)
    silence_ms = acked = 0
    at = _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, at)
        if kind == _INET_DIAG_INFO and length - _ATTRIBUTE.size >= _TCP_INFO.size:
            silence_ms, acked = _TCP_INFO.unpack_from(payload, at + _ATTRIBUTE.size)
        at += max((length + 3) & ~3, _ATTRIBUTE.size)
    again = retransmits if timer == _RETRANSMITTING else 0
    return Connection(family, state, again, silence_ms / 1000, waiting, acked, identity)


def _ask(kind: int, flags: int, request: bytes) -> Iterator[bytes]:
    """The payloads of the answer to one request. Raises OSError with the kernel's errno."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_ANSWER_S)
        netlink.send(_NLMSGHDR.pack(_NLMSGHDR.size + len(request), kind, _NLM_F_REQUEST | flags, 1, 0) + request)
        while True:
            data = netlink.recv(_ANSWER_BYTES)
            while data:
                length, what, _, _, _ = _NLMSGHDR.unpack_from(data)
                payload, data = data[_NLMSGHDR.size : length], data[(length + 3) & ~3 :]
                if what == _NLMSG_DONE:
                    return
                if what == _NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", payload)
                    if number:
                        raise OSError(-number, os.strerror(-number))
                    return
                yield payload
