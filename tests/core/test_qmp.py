"""QMP's bytes, against docs/interop/qmp-spec.rst of QEMU, and against whatever somebody may send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iohang_fuse.qmp import MESSAGE_BYTES, Argument, Call, QmpError, Session, string

COMMANDS = {
    "query-it": {},
    "act": {"image": Argument(string), "count": Argument(lambda value: int(str(value)), required=True)},
}
NEGOTIATE = b'{"execute": "qmp_capabilities"}'


@pytest.fixture
def session() -> Session:
    return Session(COMMANDS, (0, 1, 2), "iohang-fuse")


@pytest.fixture
def ready(session: Session) -> Session:
    assert answers(session, NEGOTIATE) == [{"return": {}}]
    return session


def fed(session: Session, *pieces: bytes) -> list[Call | bytes]:
    return [item for piece in pieces for item in session.feed(piece)]


def answers(session: Session, *pieces: bytes) -> list[Any]:
    """What is sent; a call is answered with its arguments."""
    return [
        json.loads(item if isinstance(item, bytes) else session.answer(item, item.arguments))
        for item in fed(session, *pieces)
    ]


def refusal(session: Session, *pieces: bytes) -> tuple[str, str]:
    (answer,) = answers(session, *pieces)
    return answer["error"]["class"], answer["error"]["desc"]


# ---- the beginning


def test_the_greeting_is_qemus(session: Session) -> None:
    """Platform fact 23: qmp-shell needs version.qemu.{major,minor,micro} in it."""
    greeting = session.greeting()
    assert json.loads(greeting) == {
        "QMP": {"version": {"qemu": {"major": 0, "minor": 1, "micro": 2}, "package": "iohang-fuse"}, "capabilities": []}
    }


def test_before_negotiation_there_is_no_command_and_no_event(session: Session) -> None:
    """Platform fact 23: "every other command is CommandNotFound, and no events are sent"."""
    kind, text = refusal(session, b'{"execute": "query-it"}')
    assert kind == "CommandNotFound"
    assert "qmp_capabilities" in text
    assert session.event("E", {}, 0) == b""


def test_negotiation_is_once_and_without_wishes(session: Session) -> None:
    assert refusal(session, b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')[0] == "GenericError"
    assert refusal(session, b'{"execute": "qmp_capabilities", "arguments": {"x": 1}}')[0] == "GenericError"
    assert answers(session, b'{"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": 1}') == [
        {"return": {}, "id": 1}
    ]
    assert refusal(session, NEGOTIATE)[0] == "CommandNotFound"


def test_an_event_has_its_time(ready: Session) -> None:
    line = ready.event("BLOCK_IO_HANG", {"set": True}, 1700000000.25)
    assert json.loads(line) == {
        "timestamp": {"seconds": 1700000000, "microseconds": 250000}, "event": "BLOCK_IO_HANG", "data": {"set": True},
    }  # fmt: skip


def test_each_message_is_one_ascii_line(ready: Session) -> None:
    """Platform fact 23: "one CRLF-ended ASCII line per message", whatever a file is called."""
    for line in (ready.greeting(), ready.event("E", {"image": "ä\n\udcff"}, 0), ready.answer(Call("x", {}), "ö")):
        assert line.endswith(b"\r\n")
        assert line.count(b"\n") == 1
        assert line.isascii()


# ---- a stream


def test_a_command_comes_out_checked(ready: Session) -> None:
    assert fed(ready, b'{"execute": "act", "arguments": {"count": 3, "image": "a"}, "id": [1]}') == [
        Call("act", {"count": 3, "image": "a"}, [1], has_id=True)
    ]


def test_no_newline_is_needed(ready: Session) -> None:
    """Platform fact 23: "qemu.qmp 0.0.6 sends JSON with no newline: parse a stream, not lines"."""
    assert len(fed(ready, b'{"execute":"query-it"}{"execute":"query-it"} {"execute":"query-it"}\r\n')) == 3


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 5))
def test_pieces_make_no_difference(sizes: list[int], count: int) -> None:
    """A message may come byte by byte, or several at once; strings may have braces, quotes and backslashes in them."""
    names = ['a"}{', "b\\", '\\"[', "ä", "\\\\}"]
    messages = b"".join(
        json.dumps(
            {"execute": "act", "arguments": {"count": n, "image": names[n % 5]}}, ensure_ascii=n % 2 == 0
        ).encode()
        for n in range(count)
    )
    pieces = []
    while messages:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(messages[:size])
        messages = messages[size:]
    session = Session(COMMANDS, (0, 0, 0), "")
    fed(session, NEGOTIATE)
    assert fed(session, *pieces) == [Call("act", {"count": n, "image": names[n % 5]}) for n in range(count)]


# ---- what is wrong


@pytest.mark.parametrize(
    ("sent", "kind", "says"),
    [
        (b'{"execute": "qury-it"}', "CommandNotFound", "'qury-it' has not been found"),
        (b'{"execute": 1}', "GenericError", "must be a string"),
        (b'{"id": 1}', "GenericError", "lacks member 'execute'"),
        (b'{"execute": "query-it", "arguments": []}', "GenericError", "must be an object"),
        (b'{"execute": "query-it", "argument": {}}', "GenericError", "'argument' is unexpected"),
        (b'{"exec-oob": "query-it"}', "GenericError", "'exec-oob' is unexpected"),
        (b'{"execute": "query-it", "arguments": {"x": 1}}', "GenericError", "Parameter 'x' is unexpected"),
        (b'{"execute": "act"}', "GenericError", "'count' is missing"),
        (b'{"execute": "act", "arguments": {"count": 1, "image": 2}}', "GenericError", "'image': expected: string"),
        (b'{"execute": "act", "arguments": {"count": "x"}}', "GenericError", "'count': invalid literal"),
        (b'{"execute": }', "GenericError", "JSON parse error"),
        (b'{"a": 1, "a": 2}', "GenericError", "twice"),
        (b'{"a": NaN}', "GenericError", "NaN"),
        (b'{"a": "\xff"}', "GenericError", "JSON parse error"),
        (b"[1]", "GenericError", "must be a JSON object"),
        (b"hello ", "GenericError", "expecting an object and not 'hello'"),
        (b"} ", "GenericError", "expecting an object"),
        (b"\x0b\x0c\x85 ", "GenericError", "expecting an object"),  # spaces to Python, not to JSON
        (b"[" * 5000 + b"]" * 5000, "GenericError", ""),
        (b'{"a": ' + b"9" * 5000 + b"}", "GenericError", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(ready: Session, sent: bytes, kind: str, says: str) -> None:
    """One line that names what is wrong; and the next command is taken."""
    got = refusal(ready, sent)
    assert got[0] == kind
    assert says in got[1]
    assert len(got[1]) < 200
    assert answers(ready, b'{"execute": "query-it", "id": 9}') == [{"return": {}, "id": 9}]


def test_an_answer_has_its_id_also_where_it_is_an_error(ready: Session) -> None:
    """Platform fact 23: "An error reply without the request's id makes the client drop the connection"."""
    for sent in (b'{"execute": "no", "id": null}', b'{"execute": "act", "id": null}', b'{"x": 1, "id": null}'):
        (answer,) = answers(ready, sent)
        assert "id" in answer
        assert "error" in answer
    call = Call("act", {}, {"a": 1}, has_id=True)
    assert json.loads(ready.refuse(call, QmpError("no")))["id"] == {"a": 1}
    assert "id" not in json.loads(ready.answer(Call("act", {}), 1))


# ---- bounds


@pytest.mark.parametrize("flood", [b"{" * 100, b'"', b"x" * 1000, b'{"a": "', b"[" * 1000, b"\\" * 999])
def test_who_sends_without_end_is_told_and_heard_no_more(ready: Session, flood: bytes) -> None:
    """Input is bounded, whatever it is."""
    heard: list[Call | bytes] = []
    for _ in range(3 * MESSAGE_BYTES // len(flood)):
        heard += ready.feed(flood)
        assert len(ready._stream.pending) <= MESSAGE_BYTES + len(flood)
    assert ready.ended
    assert b"more than" in heard[-1]  # type: ignore[operator]
    assert fed(ready, b'{"execute": "query-it"}') == []


_pieces = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            NEGOTIATE,
            b'{"execute": "query-it"}',
            b'{"execute": "act", "arguments": {"count": 1}}',
            b'"',
            b"\\",
            b"{",
            b"}",
        ]
    ),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["execute", "id", "arguments", "x"]), inner)
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)


@given(st.lists(_pieces, max_size=12))
def test_nothing_that_is_sent_does_harm(pieces: list[bytes]) -> None:
    """No crash, no hang, and whatever comes out is a call of ours or a message of QMP's."""
    session = Session(COMMANDS, (0, 0, 0), "")
    for item in fed(session, *pieces):
        if isinstance(item, Call):
            assert item.name in COMMANDS
            assert {*item.arguments} <= {*COMMANDS[item.name]}
        else:
            message = json.loads(item)
            assert ("return" in message) != ("error" in message)
