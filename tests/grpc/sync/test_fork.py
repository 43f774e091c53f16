"""A channel that was made, and used, before a fork: the child makes its own connections, the parent keeps its."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.backends import grpc_backends

SCRIPT = """
import os, signal, sys, threading
import grpc
from meshlb import Mesh, ServiceConfig
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel

def calls(stub):
    request = echo_pb2.EchoRequest(text="x", count=2)
    for _ in range(3):
        assert stub.Say(request, timeout=10).text == "x"
        assert stub.Say.future(request, timeout=10).result().text == "x"
        assert len(list(stub.Watch(request, timeout=10))) == 2
        assert stub.Collect(iter([request]), timeout=10).text == "x"
        assert len(list(stub.Chat(iter([request]), timeout=10))) == 1

mesh = Mesh(StaticDiscovery({"echo": sys.argv[2:]}), defaults=ServiceConfig(policy="round_robin"))
channel = insecure_channel("consul:///echo", mesh=mesh)
stub = echo_pb2_grpc.EchoStub(channel)
if sys.argv[1] == "used":
    calls(stub)
# Without gRPC's fork support a process that has used gRPC cannot fork one that does.
supported = os.environ.get("GRPC_ENABLE_FORK_SUPPORT") != "0"
children = []
for _ in range(2 if supported else 1):
    child = os.fork()
    if not child:
        signal.alarm(25)
        try:
            calls(stub)
            assert sum(node.in_flight for node in mesh.cluster("echo").nodes) == 0
            if supported:
                grandchild = os.fork()
                if not grandchild:
                    calls(stub)
                    os._exit(7)
                assert os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 7
            grpc.channel_ready_future(channel).result(timeout=10)
            channel.close()
            mesh.close()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(5)
    children.append(child)
    calls(stub)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
calls(stub)
channel.close()
mesh.close()
assert set(codes) == {5}, codes
print("well")
"""


@pytest.mark.parametrize(
    ("before", "support"), [("unused", "unset"), ("used", "unset"), ("used", "1"), ("unused", "0")]
)
def test_fork(before: str, support: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_ENABLE_FORK_SUPPORT"}
    if support != "unset":
        environment["GRPC_ENABLE_FORK_SUPPORT"] = support
    with grpc_backends(2) as backends:
        command = [sys.executable, "-c", SCRIPT, before, *(backend.address for backend in backends)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "well\n"), ran.stderr
