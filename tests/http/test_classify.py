"""The table of verdicts, a row at a time. What brings these errors about for real is in test_faults.py."""

from __future__ import annotations

import errno
import importlib
import time
from email.utils import formatdate
from types import ModuleType

import anyio
import pytest

from meshlb._http.classify import ErrorTable, outcome_of_response, parse_retry_after
from meshlb.model import OutcomeKind, Sent

FAILURE, OVERLOAD, IGNORED, OK = OutcomeKind.FAILURE, OutcomeKind.OVERLOAD, OutcomeKind.IGNORED, OutcomeKind.OK


@pytest.fixture
def module(package: str) -> ModuleType:
    return importlib.import_module(package)


@pytest.mark.parametrize(
    ("name", "kind", "sent", "retryable"),
    [
        ("ConnectError", FAILURE, Sent.NOT_SENT, True),
        ("ConnectTimeout", FAILURE, Sent.NOT_SENT, True),
        ("ProxyError", FAILURE, Sent.NOT_SENT, True),
        ("PoolTimeout", IGNORED, Sent.NOT_SENT, False),
        ("ReadTimeout", FAILURE, Sent.MAYBE, True),
        ("WriteTimeout", FAILURE, Sent.MAYBE, True),
        ("ReadError", FAILURE, Sent.MAYBE, True),
        ("WriteError", FAILURE, Sent.MAYBE, True),
        ("CloseError", FAILURE, Sent.MAYBE, True),
        ("RemoteProtocolError", FAILURE, Sent.MAYBE, True),
        ("LocalProtocolError", IGNORED, Sent.MAYBE, False),
        ("UnsupportedProtocol", IGNORED, Sent.MAYBE, False),
        ("DecodingError", IGNORED, Sent.MAYBE, False),
    ],
)
def test_exceptions_of_the_package(module: ModuleType, name: str, kind: OutcomeKind, sent: Sent, retryable: bool):
    outcome = ErrorTable(module).outcome(getattr(module, name)("it happened"))
    assert (outcome.kind, outcome.sent, outcome.retryable, outcome.reason) == (kind, sent, retryable, name)


def test_subclasses_are_judged_as_their_base(module: ModuleType):
    class Mine(module.ConnectTimeout):
        pass

    outcome = ErrorTable(module).outcome(Mine("it happened"))
    assert (outcome.kind, outcome.sent, outcome.reason) == (FAILURE, Sent.NOT_SENT, "Mine")


@pytest.mark.parametrize(
    ("error", "kind", "sent", "retryable"),
    [
        (ConnectionRefusedError(), FAILURE, Sent.NOT_SENT, True),
        (ConnectionResetError(), FAILURE, Sent.MAYBE, True),
        (OSError(errno.EMFILE, "no more files"), IGNORED, Sent.NOT_SENT, False),
        (RuntimeError("a bug"), IGNORED, Sent.MAYBE, False),
        (KeyboardInterrupt(), IGNORED, Sent.MAYBE, False),
        (GeneratorExit(), IGNORED, Sent.MAYBE, False),
    ],
)
def test_other_exceptions(module: ModuleType, error: BaseException, kind: OutcomeKind, sent: Sent, retryable: bool):
    outcome = ErrorTable(module).outcome(error)
    assert (outcome.kind, outcome.sent, outcome.retryable) == (kind, sent, retryable)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize("grouped", [False, True])
def test_exhausted_local_resources_under_an_exception(module: ModuleType, number: int, grouped: bool):
    cause: BaseException = OSError(number, "exhausted")
    if grouped:  # as anyio and trio do when a name has several addresses
        cause = OSError("All connection attempts failed")
        cause.__cause__ = ExceptionGroup("tried", [ConnectionRefusedError(), OSError(number, "exhausted")])
    error = module.ConnectError("it happened")
    error.__cause__ = RuntimeError(cause)  # of another library
    outcome = ErrorTable(module).outcome(error)
    assert (outcome.kind, outcome.sent, outcome.retryable) == (IGNORED, Sent.NOT_SENT, False)
    innocent = module.ConnectError("it happened")
    innocent.__context__ = cause  # what the caller was busy with
    assert ErrorTable(module).outcome(innocent).kind is FAILURE


def test_endless_chain_of_causes(module: ModuleType):
    error, other = module.ReadError("one"), OSError("other")
    error.__cause__, other.__cause__ = other, error
    assert ErrorTable(module).outcome(error).kind is FAILURE


def test_what_the_callers_own_body_raised(module: ModuleType):
    error = module.ReadError("of the response that is the body of this request")
    outcome = ErrorTable(module).outcome(error, body_error=error)
    assert (outcome.kind, outcome.sent, outcome.retryable) == (IGNORED, Sent.MAYBE, False)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_cancellation(module: ModuleType, backend: str):
    async def cancelled() -> BaseException:
        with anyio.CancelScope() as scope:
            scope.cancel()
            try:
                await anyio.sleep(1)
            except BaseException as error:
                caught = error
                raise
        return caught

    outcome = ErrorTable(module).outcome(anyio.run(cancelled, backend=backend))
    assert (outcome.kind, outcome.retryable) == (IGNORED, False)


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        *((status, OK, False) for status in (101, 200, 204, 301, 304, 400, 401, 404, 408, 409, 412, 421, 425, 499)),
        *((status, OK, False) for status in (501, 505, 600, 999)),
        *((status, FAILURE, False) for status in (500, 507, 508, 511, 520, 599)),
        *((status, FAILURE, True) for status in (502, 503, 504)),
        (429, OVERLOAD, True),
    ],
)
def test_statuses(status: int, kind: OutcomeKind, retryable: bool):
    outcome = outcome_of_response(status, {})
    assert (outcome.kind, outcome.retryable, outcome.sent) == (kind, retryable, Sent.ANSWERED)
    assert outcome.retry_after is None
    assert outcome.reason == ("" if kind is OK else str(status))


def test_hint_of_a_503_is_for_the_instance_and_of_a_429_for_the_service():
    unavailable = outcome_of_response(503, {"retry-after": "7"})
    assert (unavailable.kind, unavailable.retry_after, unavailable.hint_binds) == (FAILURE, 7.0, False)
    overloaded = outcome_of_response(429, {"retry-after": "7"})
    assert (overloaded.kind, overloaded.retry_after, overloaded.hint_binds) == (OVERLOAD, 7.0, True)
    assert outcome_of_response(502, {"retry-after": "7"}).retry_after is None
    assert outcome_of_response(301, {"retry-after": "7"}).retry_after is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        ("120", 120.0),
        (" 3 ", 3.0),
        ("1000000000", 86_400.0),
        ("9" * 5000, 86_400.0),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),  # a digit, but not one of HTTP's
        ("5, 7", None),
        ("Fri, 99 Dec 1999 99:99:99 GMT", None),
    ],
)
def test_retry_after(value: str | None, seconds: float | None):
    assert parse_retry_after(value) == seconds


def test_retry_after_as_a_date():
    seconds = parse_retry_after(formatdate(time.time() + 100, usegmt=True))
    assert seconds is not None
    assert 90 < seconds < 101
