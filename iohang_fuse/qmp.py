"""QMP without I/O: bytes in, calls out; results and events in, bytes out (docs/interop/qmp-spec.rst of QEMU).

1. Pure. A `Session` is one client, from its greeting on; it does not know what a command does.
2. The input is a stream: nothing says that a message ends with a newline, or that it comes in one piece. The output has one
   message to a line, in ASCII, with CR LF at its end, as QEMU's has.
3. Everything is checked before a call comes out: syntax, the command's name, the names and kinds of its arguments.
4. Input is bounded (`MESSAGE_BYTES`): who sends more is told so, and has nothing more to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MESSAGE_BYTES = 64 << 10
"""One message of a client. The longest that makes sense has a file's name in it, of 4 KiB."""

PACKAGE = "iohang-fuse"
"""Who greets: a client can tell it from QEMU by this."""

MOST_NESTED = 100
"""Levels of one message; two make sense. An `id` goes back as it came, and Python's own limit is met earlier there than here."""

_STRUCTURE = re.compile(rb'["\\{}\[\]]')
_SPACES = re.compile(rb"[ \t\r\n]*")
_END_OF_GARBAGE = re.compile(rb"[ \t\r\n{\[]")


class QmpError(Exception):
    """What a client is told. *kind* is QMP's error class: GenericError, or CommandNotFound."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Argument:
    """*check* makes the value of what was given, or raises ValueError with what is wrong with it."""

    check: Callable[[object], Any]
    required: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A command that has been checked. *id* goes back with its answer."""

    name: str
    arguments: dict[str, Any]
    id: object = None
    has_id: bool = False


Commands = Mapping[str, Mapping[str, Argument]]
"""The arguments of each command, by name."""


def string(value: object) -> str:
    """A check."""
    if not isinstance(value, str):
        raise ValueError("expected: string")  # noqa: TRY004 - one exception for all that is wrong with a value
    return value


@dataclass(slots=True)
class _Stream:
    """Cuts the input into texts of whole JSON objects. What is no object comes out as it is, up to the next space."""

    pending: bytearray = field(default_factory=bytearray)
    scanned: int = 0  # so much of it has been looked at
    depth: int = 0
    deepest: int = 0  # of the text that is being looked at, or came out last
    in_string: bool = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        self.pending += data
        while (text := self._next()) is not None:
            yield text

    def _next(self) -> bytes | None:
        if not self.depth:
            self.deepest = 0
            if not self.scanned:
                del self.pending[: _SPACES.match(self.pending).end()]  # type: ignore[union-attr]  # of nothing, at least
            if self.pending and self.pending[0] not in b"{[":
                return self._garbage()
        while (match := _STRUCTURE.search(self.pending, self.scanned)) is not None:
            if self.in_string and match[0] == b"\\" and match.end() == len(self.pending):
                self.scanned = match.start()  # what it escapes is yet to come
                return None
            self.scanned = match.end()
            if self._ends(match[0]):
                return self._cut(match.end())
        self.scanned = len(self.pending)
        return None

    def _ends(self, char: bytes) -> bool:
        """Whether the object ends with *char*, the one that was looked at last."""
        if self.in_string:
            self.scanned += char == b"\\"
            self.in_string = char != b'"'
        elif char == b'"':
            self.in_string = True
        elif char in b"{[":
            self.depth += 1
            self.deepest = max(self.deepest, self.depth)
        elif char in b"}]":
            self.depth -= 1
            return self.depth == 0
        return False

    def _garbage(self) -> bytes | None:
        match = _END_OF_GARBAGE.search(self.pending, self.scanned)
        self.scanned = len(self.pending)
        return None if match is None else self._cut(match.start())

    def _cut(self, end: int) -> bytes:
        text = bytes(self.pending[:end])
        del self.pending[:end]
        self.scanned = 0
        return text


class Session:
    """One client of the monitor."""

    def __init__(self, commands: Commands, version: tuple[int, int, int], package: str) -> None:
        """*version* and *package*: of this program, for the greeting."""
        self.ended = False  # nothing more is read from this client
        self._commands = commands
        self._version = version
        self._package = package
        self._stream = _Stream()
        self._negotiated = False

    @property
    def version(self) -> dict[str, object]:
        """As the greeting and `query-version` have it: QEMU's clients look for its own field."""
        major, minor, micro = self._version
        return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": self._package}

    def greeting(self) -> bytes:
        """What the client gets before it says anything."""
        return _line({"QMP": {"version": self.version, "capabilities": []}})

    def feed(self, data: bytes) -> Iterator[Call | bytes]:
        """What *data* brings, in order: calls to be made, and answers to be sent."""
        if self.ended:
            return
        for text in self._stream.feed(data):
            if len(text) > MESSAGE_BYTES:
                break
            yield from self._message(text, self._stream.deepest)
        else:
            if len(self._stream.pending) <= MESSAGE_BYTES:
                return
        self.ended = True
        yield _error(QmpError(f"a message of more than {MESSAGE_BYTES} bytes; this connection ends"))

    def answer(self, call: Call, value: object) -> bytes:
        """*call* was made, and has led to *value*."""
        return _line({"return": value} | ({"id": call.id} if call.has_id else {}))

    def refuse(self, call: Call, error: QmpError) -> bytes:
        """*call* could not be made."""
        return _error(error, call)

    def event(self, name: str, data: Mapping[str, object], at_s: float) -> bytes:
        """Something has happened at *at_s* (seconds since the epoch). Nothing for a client that has not negotiated."""
        if not self._negotiated:
            return b""
        seconds, fraction = divmod(at_s, 1)
        stamp = {"seconds": int(seconds), "microseconds": int(fraction * 1e6)}
        return _line({"timestamp": stamp, "event": name, "data": data})

    def _message(self, text: bytes, nested: int) -> Iterator[Call | bytes]:
        try:
            if nested > MOST_NESTED:
                raise QmpError(f"JSON parse error, nested too deep: {nested} levels, and {MOST_NESTED} at most")
            message = _parsed(text)
        except QmpError as error:
            yield _error(error)
            return
        call = Call("", {}, message.get("id"), "id" in message)
        try:
            yield from self._called(message, call)
        except QmpError as error:
            yield _error(error, call)

    def _called(self, message: dict[str, Any], bare: Call) -> Iterator[Call | bytes]:
        unknown = sorted({*message} - {"execute", "arguments", "id"})
        if unknown:
            raise QmpError(f"QMP input member {_short(unknown[0])} is unexpected")
        name, given = message.get("execute"), message.get("arguments", {})
        if not isinstance(name, str):
            raise QmpError(
                "QMP input lacks member 'execute'" if name is None else "QMP input member 'execute' must be a string"
            )
        if not isinstance(given, dict):
            raise QmpError("QMP input member 'arguments' must be an object")
        if name == "qmp_capabilities":
            self._negotiate(given)
            yield self.answer(bare, {})
            return
        if not self._negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        if name not in self._commands:
            raise QmpError(f"The command {_short(name)} has not been found", "CommandNotFound")
        yield Call(name, checked(self._commands[name], given), bare.id, bare.has_id)

    def _negotiate(self, given: dict[str, object]) -> None:
        if self._negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        wanted = given.get("enable", [])
        if {*given} - {"enable"} or not isinstance(wanted, list):
            raise QmpError("qmp_capabilities takes one argument, 'enable', a list")
        if wanted:
            raise QmpError(f"Capability {_short(wanted[0])} is not available")
        self._negotiated = True


def checked(arguments: Mapping[str, Argument], given: Mapping[str, object]) -> dict[str, Any]:
    """The values of what was *given*. Raises QmpError with the first thing that is wrong."""
    for name in given:
        if name not in arguments:
            raise QmpError(f"Parameter {_short(name)} is unexpected")
    for name, argument in arguments.items():
        if argument.required and name not in given:
            raise QmpError(f"Parameter '{name}' is missing")
    values = {}
    for name, value in given.items():
        try:
            values[name] = arguments[name].check(value)
        except ValueError as error:
            raise QmpError(f"Invalid parameter '{name}': {error}") from None
    return values


def _parsed(text: bytes) -> dict[str, Any]:
    if text[:1] not in (b"{", b"["):
        raise QmpError(f"JSON parse error, expecting an object and not {_short(text.decode(errors='replace'))}")
    try:
        message = json.loads(
            text.decode(), object_pairs_hook=_no_doubles, parse_constant=_no_constant, parse_float=_finite
        )
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are among them
        raise QmpError(f"JSON parse error, {error}") from None
    if not isinstance(message, dict):
        raise QmpError("QMP input must be a JSON object")
    return message


def _no_doubles(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("the same member twice in one object")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{_short(text)} is too large a number")
    return number


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _error(error: QmpError, call: Call | None = None) -> bytes:
    message: dict[str, object] = {"error": {"class": error.kind, "desc": str(error)}}
    if call is not None and call.has_id:
        message["id"] = call.id
    return _line(message)


def _line(message: Mapping[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
