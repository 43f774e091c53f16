"""Every row of the error-text table, against a real server: what gRPC says, and what meshlb makes of it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import trustme

from meshlb import OutcomeKind, Sent, ServiceConfig
from meshlb.grpc._attempts import outcome_of
from meshlb.grpc._options import subchannel_options
from meshlb.grpc._status import classify, classify_local, pushback
from meshlb.model import CANCELLED, OK, Outcome
from meshlb.node import NOT_STARTED
from tests.grpc.sync.conftest import Serve
from tests.grpc.sync.servers import COLLECT, SAY, Reply, Request, refusing_address
from tests.support.backends import grpc_backend
from tests.support.ports import loopback_host
from tests.support.wait import eventually

Code = grpc.StatusCode
OPTIONS = subchannel_options((), ServiceConfig(connect_timeout=0.4), "echo")


@contextlib.contextmanager
def native(address: str, credentials: Any = None, options: Any = ()) -> Iterator[Any]:
    """What meshlb uses as a sub-channel."""
    target, every = f"ipv4:{address}" if address[0].isdigit() else address, (*OPTIONS, *options)
    channel = (
        grpc.insecure_channel(target, every) if credentials is None else grpc.secure_channel(target, credentials, every)
    )
    with channel:
        yield channel


def say(channel: Any, **options: Any) -> Any:
    multicallable = channel.unary_unary(SAY, Request.SerializeToString, Reply.FromString)
    return multicallable(options.pop("request", Request()), timeout=options.pop("timeout", 5), **options)


def error_of(function: Callable[[], Any]) -> Any:
    with pytest.raises(grpc.RpcError) as raised:
        function()
    return raised.value


def judged(error: Any) -> tuple[Any, ...]:
    outcome = outcome_of(error, channel_closed=False)
    return error.code(), outcome.kind, outcome.sent, outcome.retryable


@contextlib.contextmanager
def listener(serve: Callable[[socket.socket], object]) -> Iterator[str]:
    """A bare TCP server that does `serve(connection)` with each connection."""
    with socket.create_server((loopback_host(), 0)) as server:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                kept.append(connection)
                with contextlib.suppress(OSError):
                    serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield "{}:{}".format(*server.getsockname())
        finally:
            server.shutdown(socket.SHUT_RDWR)
            server.close()
            thread.join()
            for connection in kept:
                connection.close()


NOT_CONNECTED = (Code.UNAVAILABLE, OutcomeKind.FAILURE, Sent.NOT_SENT, True)


def test_refused() -> None:
    with native(refusing_address()) as channel:
        assert judged(error_of(lambda: say(channel))) == NOT_CONNECTED


@pytest.mark.parametrize(
    "behaviour",
    [
        pytest.param(lambda connection: connection.close(), id="closes at once"),
        pytest.param(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), id="speaks HTTP/1"),
        pytest.param(lambda connection: None, id="says nothing"),
    ],
)
def test_no_http2(behaviour: Callable[[socket.socket], object]) -> None:
    with listener(behaviour) as address, native(address) as channel:
        assert judged(error_of(lambda: say(channel))) == NOT_CONNECTED


def test_no_such_host() -> None:
    with native("dns:///nobody.invalid:1") as channel:
        assert judged(error_of(lambda: say(channel))) == NOT_CONNECTED


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_credentials(authority: trustme.CA, name: str) -> grpc.ServerCredentials:
    certificate = authority.issue_cert(name)
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    return grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])


@pytest.mark.parametrize("case", ["another name", "another authority", "no TLS at the server", "no TLS at the client"])
def test_tls_fails(case: str, authority: trustme.CA, serve: Serve) -> None:
    name = "another" if case == "another name" else "echo"
    secure = case != "no TLS at the server"
    [server] = serve(credentials=server_credentials(authority, name) if secure else None)
    trusted = trustme.CA() if case == "another authority" else authority
    credentials = grpc.ssl_channel_credentials(trusted.cert_pem.bytes()) if case != "no TLS at the client" else None
    with native(server.address, credentials) as channel:
        assert judged(error_of(lambda: say(channel))) == NOT_CONNECTED


def test_killed_in_the_middle() -> None:
    with grpc_backend(hang=True) as backend, native(backend.address) as channel:
        future = channel.unary_unary(SAY, Request.SerializeToString, Reply.FromString).future(Request(), timeout=20)
        eventually(lambda: backend.stats()["in_flight"])
        backend.kill()
        assert judged(error_of(future.result)) == (Code.UNAVAILABLE, OutcomeKind.FAILURE, Sent.MAYBE, True)


def test_the_application_says_unavailable(serve: Serve) -> None:
    [server] = serve()
    with native(server.address) as channel:
        error = error_of(lambda: say(channel, request=Request(fail_code=14, fail_details="warming up")))
    assert judged(error) == (Code.UNAVAILABLE, OutcomeKind.FAILURE, Sent.MAYBE, True)


def test_the_server_has_too_many_pending_requests(serve: Serve) -> None:
    options = (("grpc.server.max_pending_requests", 1), ("grpc.server.max_pending_requests_hard_limit", 1))
    [server] = serve(options=options)
    with native(server.address) as channel:
        multicallable = channel.unary_unary(SAY, Request.SerializeToString, Reply.FromString)

        def refused() -> Any:
            futures = [multicallable.future(Request(), timeout=10) for _ in range(300)]
            return next((future for future in futures if future.code() is not Code.OK), None)

        error = eventually(refused)
    assert judged(error) == (Code.CANCELLED, OutcomeKind.OVERLOAD, Sent.MAYBE, True)


def test_the_server_takes_no_more_at_once(serve: Serve) -> None:
    [server] = serve(maximum_concurrent_rpcs=1)
    with native(server.address) as channel:
        multicallable = channel.unary_unary(SAY, Request.SerializeToString, Reply.FromString)
        first = multicallable.future(Request(text="hang"), timeout=20)
        eventually(lambda: server.total)
        error = error_of(lambda: say(channel))
        first.cancel()
    assert judged(error) == (Code.RESOURCE_EXHAUSTED, OutcomeKind.OVERLOAD, Sent.ANSWERED, True)


def test_deadline(serve: Serve) -> None:
    [server] = serve()
    with native(server.address) as channel:
        passed = error_of(lambda: say(channel, request=Request(text="hang"), timeout=0.1))
        told = error_of(lambda: say(channel, request=Request(fail_code=4, fail_details="mine was")))
    assert judged(passed) == (Code.DEADLINE_EXCEEDED, OutcomeKind.FAILURE, Sent.MAYBE, True)
    assert judged(told) == (Code.DEADLINE_EXCEEDED, OutcomeKind.FAILURE, Sent.ANSWERED, False)


@pytest.mark.parametrize("code", [Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS])
def test_something_broke_at_the_server(code: grpc.StatusCode, serve: Serve) -> None:
    [server] = serve()
    with native(server.address) as channel:
        error = error_of(lambda: say(channel, request=Request(fail_code=code.value[0])))
    assert judged(error) == (code, OutcomeKind.FAILURE, Sent.ANSWERED, False)


@pytest.mark.parametrize(
    "code",
    [
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.ALREADY_EXISTS,
        Code.PERMISSION_DENIED,
        Code.FAILED_PRECONDITION,
        Code.ABORTED,
        Code.OUT_OF_RANGE,
        Code.UNIMPLEMENTED,
        Code.UNAUTHENTICATED,
    ],
)
def test_the_application_answers(code: grpc.StatusCode, serve: Serve) -> None:
    [server] = serve()
    with native(server.address) as channel:
        error = error_of(lambda: say(channel, request=Request(fail_code=code.value[0])))
    assert judged(error) == (code, OutcomeKind.OK, Sent.ANSWERED, False)


def test_the_request_is_no_good(serve: Serve) -> None:
    [server] = serve()

    def broken() -> Iterator[Request]:
        raise ValueError
        yield Request()

    big = Request(text="x" * 10_000)
    with native(server.address, options=[("grpc.max_send_message_length", 5000)]) as channel:
        collect = channel.stream_unary(COLLECT, Request.SerializeToString, Reply.FromString)
        errors = [
            error_of(lambda: say(channel, request=5)),
            error_of(lambda: say(channel, metadata=(("Bad Key", "x"),))),
            error_of(lambda: collect(broken(), timeout=5)),
            error_of(lambda: say(channel, request=big)),
            error_of(lambda: say(channel, credentials=grpc.access_token_call_credentials("secret"))),
        ]
    assert [judged(error) for error in errors] == [
        (code, OutcomeKind.IGNORED, Sent.NOT_SENT, False)
        for code in (Code.INTERNAL, Code.INTERNAL, Code.UNKNOWN, Code.RESOURCE_EXHAUSTED, Code.UNAUTHENTICATED)
    ]


def test_the_reply_is_refused_here(serve: Serve) -> None:
    [server] = serve()
    with native(server.address, options=[("grpc.max_receive_message_length", 5000)]) as channel:
        broken = channel.unary_unary(SAY, Request.SerializeToString, lambda data: 1 / 0)
        errors = [
            error_of(lambda: say(channel, request=Request(payload_bytes=10_000))),
            error_of(lambda: broken(Request(), timeout=5)),
        ]
    assert [judged(error) for error in errors] == [
        (Code.RESOURCE_EXHAUSTED, OutcomeKind.IGNORED, Sent.ANSWERED, False),
        (Code.INTERNAL, OutcomeKind.IGNORED, Sent.ANSWERED, False),
    ]


def test_the_request_is_too_large_for_the_server(serve: Serve) -> None:
    [server] = serve(options=[("grpc.max_receive_message_length", 5000)])
    with native(server.address) as channel:
        errors = [
            error_of(lambda: say(channel, request=Request(text="x" * 10_000))),
            error_of(lambda: say(channel, metadata=(("x-long", "x" * 100_000),))),
        ]
    expected = (Code.RESOURCE_EXHAUSTED, OutcomeKind.OK, Sent.ANSWERED, False)
    assert [judged(error) for error in errors] == [expected, expected]


def test_call_credentials_that_fail(authority: trustme.CA, serve: Serve) -> None:
    class Refusing(grpc.AuthMetadataPlugin):
        def __call__(self, context: Any, callback: Any) -> None:
            callback((), ValueError("no token"))

    [server] = serve(credentials=server_credentials(authority, "echo"))
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    with native(server.address, credentials) as channel:
        error = error_of(lambda: say(channel, credentials=grpc.metadata_call_credentials(Refusing())))
    assert judged(error) == (Code.UNAVAILABLE, OutcomeKind.IGNORED, Sent.NOT_SENT, False)


def test_closed_under_a_call_and_before_it(serve: Serve) -> None:
    [server] = serve()
    with native(server.address) as channel:
        multicallable = channel.unary_unary(SAY, Request.SerializeToString, Reply.FromString)
        running = multicallable.future(Request(text="hang"), timeout=20)
        eventually(lambda: server.total)
        channel.close()
        closed = error_of(running.result)
        before = []
        for start in (multicallable, multicallable.future):
            with pytest.raises(ValueError, match="Cannot invoke RPC") as raised:
                start(Request(), timeout=5)
            before.append(classify_local(raised.value))
    assert judged(closed) == (Code.CANCELLED, OutcomeKind.IGNORED, Sent.MAYBE, True)
    assert outcome_of(closed, channel_closed=True) is CANCELLED  # by the caller, who closed the mesh channel
    assert before == [NOT_STARTED, NOT_STARTED]


def test_cancelled_by_the_caller(serve: Serve) -> None:
    [server] = serve()
    with native(server.address) as channel:
        future = channel.unary_unary(SAY, Request.SerializeToString, Reply.FromString).future(Request(text="hang"))
        future.cancel()
        assert classify(future.code(), future.details(), future.trailing_metadata()) is CANCELLED


def test_no_file_descriptor_left() -> None:
    script = """
import os, resource
import grpc
from meshlb.grpc._attempts import outcome_of
kept = grpc.insecure_channel("ipv4:127.0.0.1:1")  # after the last one gRPC shuts down, and needs descriptors to start
def call():
    with grpc.insecure_channel("ipv4:127.0.0.1:1", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            channel.unary_unary("/a/b")(b"", timeout=5)
        except grpc.RpcError as error:
            return outcome_of(error, channel_closed=False)
assert call().reason == "UNAVAILABLE"
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 1, 4096))
try:
    while True:
        os.dup(0)
except OSError:
    pass
outcome = call()
print(outcome.kind.value, outcome.sent.value, outcome.retryable)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.split() == ["ignored", "not_sent", "True"]


def test_texts_that_no_test_can_provoke_in_time() -> None:
    too_many_pings = classify(Code.UNAVAILABLE, "Too many pings", ())
    gone = classify(Code.UNAVAILABLE, "Stream removed (GOAWAY received; Error code: 0; Debug Text: max_age)", ())
    assert [(outcome.kind, outcome.sent) for outcome in (too_many_pings, gone)] == [
        (OutcomeKind.FAILURE, Sent.MAYBE)
    ] * 2
    assert classify(Code.OK, "", ()) is OK
    assert classify(Code.UNAVAILABLE, None, None).sent is Sent.MAYBE


def test_received_metadata_prove_an_answer() -> None:
    outcome = classify(Code.UNAVAILABLE, "failed to connect to all addresses", (), initial_metadata=(("a", "b"),))
    assert outcome.sent is Sent.ANSWERED


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([], None),
        (["0"], 0.0),
        (["250"], 0.25),
        ([b"250"], 0.25),
        (["-1"], -1.0),
        (["soon"], -1.0),
        (["1.5"], -1.0),
        ([""], -1.0),
        (["+5"], -1.0),
        (["٣"], -1.0),
        (["10", "10"], -1.0),
    ],
)
def test_pushback(values: list[str | bytes], seconds: float | None) -> None:
    trailing = (("other", "1"), *(("grpc-retry-pushback-ms", value) for value in values))
    assert pushback(trailing) == seconds
    outcome = classify(Code.UNAVAILABLE, "busy", trailing)
    assert (outcome.retry_after, outcome.hint_binds) == (seconds, seconds is not None)


def test_local_exceptions() -> None:
    assert classify_local(KeyboardInterrupt()) is CANCELLED
    assert classify_local(TypeError("bad")) == Outcome(OutcomeKind.IGNORED, Sent.NOT_SENT, reason="TypeError")
