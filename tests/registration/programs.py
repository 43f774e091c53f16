"""Programs that register themselves: run by the tests as processes of their own, since signals end them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.support.consul_agent import ConsulAgent
from tests.support.processes import ManagedProcess

PLAIN = """
import sys, time
from meshlb.registration import Check, Registration
with Registration("{service}", 8001, address="127.0.0.1", check=Check.ttl(1), drain=float(sys.argv[1])):
    print("ready", flush=True)
    while True:
        time.sleep(0.05)
"""

FORKING = """
import os, sys, time
from meshlb.registration import Registration
with Registration("{service}", 8001, address="127.0.0.1", drain=0.0):
    child = os.fork()
    if child == 0:
        sys.exit(0)  # ends its own with block
    os.waitpid(child, 0)
    print("ready", flush=True)
    sys.stdin.read()
"""

UVICORN = """
import uvicorn
from starlette.applications import Starlette
from meshlb.registration import Registration
registration = Registration("{service}", 8001, address="127.0.0.1", drain=float(__import__("sys").argv[1]))

async def started(scope, receive, send):
    pass

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print("ready", flush=True)

Server(uvicorn.Config(Starlette(lifespan=registration.lifespan), port=0, log_level="warning")).run()
print("ended", flush=True)
"""

_GRPC = """
import asyncio, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from meshlb.registration import Check, Registration
from meshlb.registration.grpc import serve, serve_aio
"""

GRPC_SYNC = (
    _GRPC
    + """
server = grpc.server(ThreadPoolExecutor(4))
servicer = health.HealthServicer()
servicer.set("", health_pb2.HealthCheckResponse.SERVING)
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
port = server.add_insecure_port("127.0.0.1:0")
check = Check.grpc(f"127.0.0.1:{{port}}", interval=0.2)
print("ready", port, flush=True)
registration = Registration("{service}", port, address="127.0.0.1", check=check, drain=float(sys.argv[1]))
serve(server, registration, health=servicer)
"""
)

GRPC_AIO = (
    _GRPC
    + """
async def main():
    server = grpc.aio.server()
    servicer = health.aio.HealthServicer()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    check = Check.grpc(f"127.0.0.1:{{port}}", interval=0.2)
    print("ready", port, flush=True)
    registration = Registration("{service}", port, address="127.0.0.1", check=check, drain=float(sys.argv[1]))
    await serve_aio(server, registration, health=servicer)

asyncio.run(main())
"""
)


@contextlib.contextmanager
def running(program: str, consul: ConsulAgent, service: str, drain: float) -> Iterator[ManagedProcess]:
    """Run a program until the block ends; entered when it says that it is ready."""
    process = ManagedProcess(
        [sys.executable, "-W", "error", "-c", program.format(service=service), str(drain)],
        env={"CONSUL_HTTP_ADDR": consul.address},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.popen.stdout is not None
        assert process.popen.stdout.readline().startswith(b"ready")
        yield process
    finally:
        process.kill()
