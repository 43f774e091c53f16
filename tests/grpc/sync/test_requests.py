"""The replayable request stream, by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshlb.grpc import _requests
from meshlb.grpc._requests import RequestSource, serialized


def source_of(messages: Iterator[object]) -> RequestSource:
    return RequestSource(messages, lambda message: str(message).encode())


def limited_to(size: int) -> AbstractContextManager[object]:
    return patch.object(_requests, "REPLAY_LIMIT", size)


def read(requests: Iterator[bytes], count: int | None = None) -> list[bytes]:
    read: list[bytes] = []
    for data in requests:
        read.append(data)
        if len(read) == count:
            break
    return read


@given(total=st.integers(0, 20), reads=st.lists(st.integers(0, 25), max_size=5))
def test_every_attempt_sees_everything(total: int, reads: list[int]) -> None:
    source = source_of(iter(range(total)))
    expected = [str(number).encode() for number in range(total)]
    for count in reads:
        assert read(source.attempt(), count or None)[: count or None] == expected[: count or None]
        assert source.rewind()
    assert read(source.attempt()) == expected


@given(
    total=st.integers(1, 20),
    limit=st.integers(0, 3000),
    commit_at=st.integers(0, 25),
)
def test_the_current_attempt_sees_everything_whatever_is_forgotten(total: int, limit: int, commit_at: int) -> None:
    source = source_of(iter(range(total)))
    with limited_to(limit):
        read(source.attempt(), 2)
        if not source.rewind():
            return  # then there is no other attempt
        requests = source.attempt()
        got = read(requests, commit_at) if commit_at else []
        source.commit()
        got += read(requests)
    assert got == [str(number).encode() for number in range(total)]
    assert source._kept == []
    assert not source.rewind()


def test_beyond_the_limit_nothing_is_kept() -> None:
    source = source_of(iter(["x" * 100] * 100))
    requests = source.attempt()
    with limited_to(1000):
        for count in range(1, 101):
            next(requests)
            assert source.keeping == (count <= 7)  # 100 bytes and 64 for remembering each, without the last one
            assert len(source._kept) <= 7


def test_beyond_the_limit_a_later_attempt_keeps_nothing_either() -> None:
    source = source_of(iter(["x" * 100] * 100))
    with limited_to(1000):
        read(source.attempt(), 3)
        assert source.rewind()
        requests = source.attempt()
        for count in range(1, 101):
            next(requests)
            assert source.keeping == (count <= 7)
            assert len(source._kept) <= 7
    assert not source.rewind()


def test_what_was_sent_is_forgotten_when_no_other_attempt_may_follow() -> None:
    source = source_of(iter("abcd"))
    requests = source.attempt()
    assert (next(requests), next(requests)) == (b"a", b"b")
    source.keeping = False
    assert (next(requests), source._kept, next(requests)) == (b"c", [], b"d")
    assert not source.rewind()


def test_endless_empty_messages_are_not_kept_either() -> None:
    source = source_of(iter([""] * 100_000))
    requests = source.attempt()
    assert sum(1 for _ in requests) == 100_000
    assert not source.rewind()


def test_an_earlier_attempt_ends_and_its_pull_is_not_lost() -> None:
    proceed, pulling = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        yield "a"
        pulling.set()
        assert proceed.wait(10)
        yield "b"

    source = source_of(slow())
    first, got = source.attempt(), []
    thread = threading.Thread(target=lambda: got.extend(read(first)))
    thread.start()
    assert pulling.wait(10)
    second = source.attempt()
    assert next(second) == b"a"
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

    source = source_of(slow())
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

    source = source_of(broken())
    for _ in range(2):
        requests = source.attempt()
        assert next(requests) == b"a"
        with pytest.raises(KeyError):
            next(requests)


def test_what_cannot_be_serialised_is_none_and_the_stream_goes_on() -> None:
    def picky(message: str) -> bytes:
        if message == "bad":
            raise ValueError
        return message.encode()

    source = RequestSource(iter(["a", "bad", "b"]), picky)
    assert list(source.attempt()) == [b"a", None, b"b"]
    assert list(source.attempt()) == [b"a", None, b"b"]
    assert serialized(picky, "bad") is None
    assert serialized(None, b"raw") == b"raw"
    assert list(RequestSource(iter([b"raw"])).attempt()) == [b"raw"]


def test_a_message_is_serialised_once() -> None:
    calls: list[str] = []

    def serialize(message: str) -> bytes:
        calls.append(message)
        return message.encode()

    source = RequestSource(iter("ab"), serialize)
    for _ in range(3):
        assert list(source.attempt()) == [b"a", b"b"]
    assert calls == ["a", "b"]


def test_what_is_no_iterator_fails_as_with_grpc() -> None:
    for wrong in ([b"a"], 7, None):
        with pytest.raises(TypeError):
            next(RequestSource(wrong).attempt())  # type: ignore[arg-type]


def test_a_message_pulled_while_the_attempt_ends_is_not_lost_to_the_limit() -> None:
    """What the last pull of a dead attempt brings may be beyond the limit when it was decided to send all again."""
    proceed, pulling = threading.Event(), threading.Event()

    def slow() -> Iterator[str]:
        yield "a" * 900
        yield "b" * 900
        pulling.set()
        assert proceed.wait(10)
        yield "c"
        yield "d"

    source = source_of(slow())
    with limited_to(1000):
        first = source.attempt()
        thread = threading.Thread(target=lambda: read(first))
        thread.start()
        assert pulling.wait(10)
        assert source.rewind()
        proceed.set()
        thread.join(10)
        second = source.attempt()
        assert [data[:1] for data in read(second)] == [b"a", b"b", b"c", b"d"]
    assert not source.rewind()
    assert source._kept == []


def test_attempts_racing_for_the_messages() -> None:
    """Threads of several attempts at once: the last one gets everything, once and in order."""
    for _ in range(30):
        source = source_of(iter(range(300)))
        passes: list[list[bytes]] = []
        threads = []
        for number in range(4):
            requests, got = source.attempt(), []
            passes.append(got)
            thread = threading.Thread(target=got.extend, args=[requests])
            thread.start()
            threads.append(thread)
            while number < 3 and len(got) < 20 * number and thread.is_alive():
                pass
        for thread in threads:
            thread.join(10)
        everything = [str(number).encode() for number in range(300)]
        assert passes[-1] == everything
        for got in passes[:-1]:
            assert got == everything[: len(got)]
