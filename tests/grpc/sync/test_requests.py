"""The replayable request stream, by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.grpc._requests import Payload, RequestSource, payload_serializer

serialize = payload_serializer(lambda message: str(message).encode())


def read(requests: Iterator[Payload], count: int | None = None) -> list[bytes]:
    read: list[bytes] = []
    for payload in requests:
        read.append(serialize(payload))
        if len(read) == count:
            break
    return read


@given(total=st.integers(0, 20), reads=st.lists(st.integers(0, 25), max_size=5))
def test_every_attempt_sees_everything(total: int, reads: list[int]) -> None:
    source = RequestSource(iter(range(total)))
    expected = [str(number).encode() for number in range(total)]
    for count in reads:
        assert read(source.attempt(), count or None)[: count or None] == expected[: count or None]
        assert source.replayable
    assert read(source.attempt()) == expected


@given(
    total=st.integers(1, 20),
    limit=st.integers(0, 3000),
    commit_at=st.integers(0, 25),
)
def test_the_current_attempt_sees_everything_whatever_is_forgotten(total: int, limit: int, commit_at: int) -> None:
    source = RequestSource(iter(range(total)), limit)
    read(source.attempt(), 2)
    if not source.replayable:
        return  # then there is no other attempt
    requests = source.attempt()
    got = read(requests, commit_at) if commit_at else []
    source.commit()
    assert not source.replayable
    got += read(requests)
    assert got == [str(number).encode() for number in range(total)]
    assert source._kept == []


def test_beyond_the_limit_nothing_is_kept() -> None:
    source = RequestSource(iter(["x" * 100] * 100), limit=1000)
    requests = source.attempt()
    for count in range(1, 101):
        serialize(next(requests))
        assert source.replayable == (count <= 7)  # 100 bytes and 64 for remembering each, without the last one
        assert len(source._kept) <= 7


def test_endless_empty_messages_are_not_kept_either() -> None:
    source = RequestSource(iter([""] * 100_000))
    requests = source.attempt()
    for payload in requests:
        serialize(payload)
    assert not source.replayable


def test_an_earlier_attempt_ends_and_its_pull_is_not_lost() -> None:
    proceed, pulling = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        yield "a"
        pulling.set()
        assert proceed.wait(10)
        yield "b"

    source = RequestSource(slow())
    first, got = source.attempt(), []
    thread = threading.Thread(target=lambda: got.extend(read(first)))
    thread.start()
    assert pulling.wait(10)
    second = source.attempt()
    assert serialize(next(second)) == b"a"
    waiting, late = threading.Event(), []

    def read_on() -> None:
        waiting.set()
        late.extend(read(second))

    reader = threading.Thread(target=read_on)
    reader.start()
    assert waiting.wait(10)
    proceed.set()
    thread.join(10)
    reader.join(10)
    assert (got, late) == ([b"a"], [b"b"])


def test_close_releases_who_waits() -> None:
    proceed, pulling = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        pulling.set()
        assert proceed.wait(10)
        yield "a"

    source = RequestSource(slow())
    first = source.attempt()
    thread = threading.Thread(target=lambda: read(first))
    thread.start()
    assert pulling.wait(10)
    second = source.attempt()
    ended = threading.Event()
    waiter = threading.Thread(target=lambda: (read(second), ended.set()))
    waiter.start()
    source.close()
    assert ended.wait(10)
    proceed.set()
    thread.join(10)
    waiter.join(10)


def test_the_callers_error_reaches_every_attempt() -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise KeyError("no")

    source = RequestSource(broken())
    for _ in range(2):
        requests = source.attempt()
        assert serialize(next(requests)) == b"a"
        with pytest.raises(KeyError):
            next(requests)


def test_a_payload_is_serialised_once() -> None:
    calls: list[str] = []
    serialize = payload_serializer(lambda message: calls.append(message) or b"data")
    payload = Payload("m")
    assert [serialize(payload), serialize(payload)] == [b"data", b"data"]
    assert calls == ["m"]
    assert payload.message is None
    assert payload_serializer(None)(Payload(b"raw")) == b"raw"
