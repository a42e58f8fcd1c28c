"""The parser of QMP under whatever comes in: it neither crashes nor hangs nor grows, and answers with messages of QMP's alone.

Issue: "qmp input fuzzed (hypothesis or atheris): no crash, no hang, no memory growth".
"""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iohang_fuse.qmp import MESSAGE_BYTES, MOST_NESTED, Argument, Call, Session, string

COMMANDS = {"query-it": {}, "act": {"image": Argument(string)}}
NEGOTIATE = b'{"execute": "qmp_capabilities"}'
QUERY = b'{"execute": "query-it", "id": "still here"}'
STILL_HERE = [Call("query-it", {}, "still here", has_id=True)]


def ready() -> Session:
    session = Session(COMMANDS, (0, 1, 0), "x")
    assert [*session.feed(NEGOTIATE)] == [b'{"return": {}}\r\n']
    return session


def fed(session: Session, data: bytes, cuts: list[int]) -> list[Call | bytes]:
    """What comes of *data*, cut into pieces at *cuts*."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    found: list[Call | bytes] = []
    begin = 0
    for end in ends:
        found += session.feed(data[begin:end])
        begin = end
    return found


def check(items: list[Call | bytes], session: Session) -> None:
    """Whatever comes out is a call of ours, whose answer and refusal are messages, or a message."""
    for item in items:
        if isinstance(item, Call):
            assert item.name in COMMANDS
            assert {*item.arguments} <= {*COMMANDS[item.name]}
            message = strict(session.answer(item, {}))
            assert message["return"] == {}
            assert ("id" in message) == item.has_id
            assert message.get("id") == item.id
        else:
            message = strict(item)
            assert ("return" in message) != ("error" in message)
            if "error" in message:
                assert message["error"].keys() == {"class", "desc"}
                assert len(message["error"]["desc"]) < 300


def strict(line: bytes) -> dict[str, Any]:
    """A message as QMP has it: one line of ASCII, in JSON that has neither NaN nor Infinity."""
    assert line.endswith(b"\r\n")
    assert line.count(b"\n") == 1
    assert line.isascii()

    def none(name: str) -> object:
        raise AssertionError(f"{name} is no JSON")

    message: dict[str, Any] = json.loads(line, parse_constant=none)
    return message


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["execute", "id", "arguments", "image", "x", '"', "\\"]), inner, max_size=4)
    ),
    max_leaves=12,
)
_command = st.builds(
    lambda name, arguments, identity: json.dumps({"execute": name, "arguments": arguments, "id": identity}).encode(),
    st.sampled_from(["query-it", "act", "qmp_capabilities", "no", "", 7, None]),
    st.dictionaries(st.sampled_from(["image", "x"]), _json, max_size=2) | _json,
    _json,
)
_token = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"\\ud800", b":", b",", b" ", b"\r\n", b"\x00", b"\xff", b"\xc3", b"null", b"NaN",
     b"-Infinity", b"1e999", b"-1e999", b"1e-999", b"9" * 400, b"9" * 5000, b'{"execute":', b'"id":', b"\xef\xbb\xbf", QUERY]
)  # fmt: skip
_stream = st.lists(st.binary(max_size=30) | _command | _token, max_size=20).map(b"".join)
_cuts = st.lists(st.integers(0, 500), max_size=20)


@settings(max_examples=600, deadline=None)
@given(_stream, _cuts)
def test_any_bytes_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    """No crash, whatever is sent; and how it is cut makes no difference."""
    session = ready()
    items = fed(session, data, cuts)
    check(items, session)
    assert fed(ready(), data, []) == items
    assert fed(ready(), data, [*range(len(data))][:300]) == items


@settings(max_examples=200, deadline=None)
@given(st.lists(_command | _json.map(lambda value: json.dumps([value]).encode()), max_size=8))
def test_after_whole_messages_the_next_command_is_taken(messages: list[bytes]) -> None:
    """What is wrong with one message is nothing to the next."""
    session = ready()
    check([*session.feed(b"".join(messages))], session)
    assert [*session.feed(QUERY)] == STILL_HERE


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_has_a_limit_of_our_own(opening: str) -> None:
    """What goes in as an `id` comes out again, whatever Python's own limits are in either place."""
    closing = {"[": "]", '{"a":': "}"}[opening]
    for depth in (*range(1, 130), *range(900, 1010), 3000, 10_000):
        session = ready()
        nested = f"{opening * depth}1{closing * depth}"
        items = [*session.feed(f'{{"execute": "query-it", "id": {nested}}}'.encode())]
        check(items, session)
        assert isinstance(items[0], Call) == (depth < MOST_NESTED), depth
        assert [*session.feed(QUERY)] == STILL_HERE


@pytest.mark.parametrize(
    "number", ["1e999", "-1e999", "9" * 4000, "9" * 5000, "1e-9999", "-0", "0.1e308", "1E400", "01", "+1", "1.", ".5"]
)
def test_numbers_come_back_as_json(number: str) -> None:
    """A number that is too large for Python's floats would come back as Infinity, which is no JSON."""
    session = ready()
    check([*session.feed(f'{{"execute": "query-it", "id": {number}}}'.encode())], session)
    assert [*session.feed(QUERY)] == STILL_HERE


@pytest.mark.parametrize(
    "long",
    [
        {"x" * 60_000: 1},
        {"execute": "y" * 60_000},
        {"execute": "act", "arguments": {"z" * 60_000: 1}},
        {"execute": "act", "arguments": {"image": ["a" * 60_000]}},
    ],
)
def test_what_is_long_comes_back_short(long: dict[str, object]) -> None:
    """An answer is for people, and no client can make it long (but for its own `id`)."""
    session = ready()
    items = [*session.feed(json.dumps(long).encode())]
    assert len(items) == 1
    check(items, session)


@pytest.mark.parametrize(
    "half", [b"{", b'{"execute": "quer', b'{"execute": "query-it", "id": "\\', b"[[[[", b'"', b"hello", b"\xff"]
)
def test_half_a_message_does_nothing(half: bytes) -> None:
    """A client that goes in the middle of a word has said nothing."""
    assert [*ready().feed(half)] == []


def test_megabytes_of_anything_leave_no_trace() -> None:
    """No memory growth: whatever was sent, only what is not yet complete is kept."""
    dice = random.Random(1)
    kinds = [
        lambda: QUERY * 50,
        lambda: b'{"execute": "act", "arguments": {"image": "' + b"x" * dice.randrange(30_000) + b'"}}',
        lambda: dice.randbytes(2000).replace(b'"', b"") + b" }]" * 20,
        lambda: b"[" * 500 + b"]" * 500,
        lambda: b'{"id": ' + b"9" * dice.randrange(9000) + b"}",
    ]
    sessions = [ready() for _ in range(5)]

    def feed(times: int) -> None:
        for _ in range(times):
            for number, kind in enumerate(kinds):
                if sessions[number].ended:
                    sessions[number] = ready()
                for _item in sessions[number].feed(kind()):
                    pass

    feed(50)
    tracemalloc.start()
    try:
        feed(50)
        before, _ = tracemalloc.get_traced_memory()
        feed(400)  # some 14 MB
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 256 << 10
    assert peak - before < 20 * MESSAGE_BYTES
