"""What the process around a call does to it: signals, the end of the interpreter, other libraries' patches."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from meshlb._proto import echo_pb2_grpc
from tests.grpc.sync.conftest import ChannelTo, Serve, in_flight
from tests.grpc.sync.servers import Request
from tests.grpc.sync.test_calls import silent_channel
from tests.support.wait import eventually


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals need the main thread")
@pytest.mark.parametrize("kind", ["say", "with_call", "collect", "future", "watch", "waiting"])
def test_ctrl_c(kind: str, serve: Serve, channel_to: ChannelTo) -> None:
    servers = serve(1)
    channel = channel_to(servers) if kind != "waiting" else silent_channel()
    stub = echo_pb2_grpc.EchoStub(channel)
    hang = Request(text="hang")
    calls: dict[str, Callable[[], Any]] = {
        "say": lambda: stub.Say(hang),
        "with_call": lambda: stub.Say.with_call(hang),
        "collect": lambda: stub.Collect(iter([hang])),
        "future": lambda: stub.Say.future(hang).result(),
        "watch": lambda: next(stub.Watch(hang)),
        "waiting": lambda: stub.Say(hang),
    }
    started = (lambda: channel._waiters) if kind == "waiting" else (lambda: servers[0].total)

    def interrupt() -> None:
        eventually(started)
        os.kill(os.getpid(), signal.SIGUSR1)

    def raise_interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, raise_interrupt)
    try:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            calls[kind]()
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    eventually(lambda: in_flight(channel.mesh) == 0)
    assert all(node.failures == 0 for node in channel.cluster.nodes)
    if kind == "waiting":
        channel.close()
        channel.mesh.close()


EXIT = """
import sys
from meshlb import Mesh
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel

mesh = Mesh(StaticDiscovery({"echo": sys.argv[1:]}))
channel = insecure_channel("echo", mesh=mesh)
channel.subscribe(lambda state: None, try_to_connect=True)
stub = echo_pb2_grpc.EchoStub(channel)
stream = stub.Watch(echo_pb2.EchoRequest(text="x", count=1000, interval_seconds=0.05))
next(stream)
future = stub.Say.future(echo_pb2.EchoRequest(text="hang"))
stub.Say(echo_pb2.EchoRequest())
print("well")
"""


def test_the_end_of_the_interpreter_is_quiet(serve: Serve) -> None:
    [server] = serve()
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", EXIT, server.address]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "well\n", "")


def test_instrumented_factories_are_passed_by(
    serve: Serve, channel_to: ChannelTo, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = grpc.insecure_channel

    @functools.wraps(original)  # as wrapt's wrappers do, this leaves __wrapped__
    def patched(*args: Any, **options: Any) -> Any:
        pytest.fail("the sub-channel would be instrumented")

    monkeypatch.setattr(grpc, "insecure_channel", patched)
    stub = echo_pb2_grpc.EchoStub(channel_to(serve(1)))
    call = stub.Watch(Request(count=2), timeout=5)
    assert len(list(call)) == 2
    assert call.code() is grpc.StatusCode.OK
