"""A channel that was used before a fork serves the child, too."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.backends import grpc_backend

PROGRAM = """
import asyncio, os, signal, sys
import meshlb.grpc.aio
from meshlb import Mesh
from meshlb.discovery import StaticDiscovery
from meshlb._proto.echo_pb2 import EchoRequest
from meshlb._proto.echo_pb2_grpc import EchoStub

mesh = Mesh(StaticDiscovery({"echo": [sys.argv[1]]}))
stub = EchoStub(meshlb.grpc.aio.insecure_channel("consul:///echo", mesh=mesh))

async def call():
    return (await stub.Say(EchoRequest(text="a"), timeout=20)).text

if sys.argv[2] == "used":
    assert asyncio.run(call()) == "a"
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    assert asyncio.run(call()) == "a"
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert asyncio.run(call()) == "a"
mesh.close()
print("done")
"""


@pytest.mark.parametrize(
    ("support", "before"),
    # Not ("0", "used"): with fork support switched off, gRPC's core has no threads in such a child, now and then.
    [(None, "used"), ("1", "used"), (None, "unused"), ("1", "unused"), ("0", "unused")],
)
def test_fork(support: str | None, before: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}
    if support is not None:
        environment["GRPC_ENABLE_FORK_SUPPORT"] = support
    with grpc_backend() as backend:
        finished = subprocess.run(
            [sys.executable, "-c", PROGRAM, backend.address, before],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (finished.returncode, finished.stdout) == (0, "done\n"), finished.stderr
