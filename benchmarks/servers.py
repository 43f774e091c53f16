"""The other side of the benchmarks: processes of their own, as small as a server can be.

``python -m benchmarks.servers http|grpc COUNT`` listens on COUNT loopback addresses, prints its port, and serves until
its standard input ends.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"


def addresses(count: int) -> list[str]:
    """``count`` different loopback addresses."""
    return [f"127.0.{1 + index // 250}.{1 + index % 250}" for index in range(count)]


@contextmanager
def server(protocol: str, count: int = 1) -> Iterator[list[str]]:
    """A running server; yields its ``host:port`` addresses, all of them the same process."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.servers", protocol, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield [f"{host}:{port}" for host in addresses(count)]
        finally:
            process.kill()


class _Http(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for _ in range(data.count(b"\r\n\r\n")):
            self._transport.write(_ANSWER)  # type: ignore[attr-defined]  # it is a WriteTransport


async def _serve_http(count: int) -> None:
    loop = asyncio.get_running_loop()
    hosts = addresses(count)
    first = await loop.create_server(_Http, hosts[0], 0, backlog=1024)
    port = first.sockets[0].getsockname()[1]
    for host in hosts[1:]:
        await loop.create_server(_Http, host, port, backlog=1024)
    print(port, flush=True)
    await asyncio.Event().wait()


def _serve_grpc(count: int) -> None:
    import grpc

    from meshlb._proto import echo_pb2, echo_pb2_grpc

    reply = echo_pb2.EchoReply(text="ok")

    class Echo(echo_pb2_grpc.EchoServicer):
        def Say(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext) -> echo_pb2.EchoReply:
            return reply

        def Watch(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext) -> Iterator[echo_pb2.EchoReply]:
            yield from (reply, reply, reply)

        def Collect(
            self, requests: Iterator[echo_pb2.EchoRequest], context: grpc.ServicerContext
        ) -> echo_pb2.EchoReply:
            for _ in requests:
                pass
            return reply

        def Chat(
            self, requests: Iterator[echo_pb2.EchoRequest], context: grpc.ServicerContext
        ) -> Iterator[echo_pb2.EchoReply]:
            return (reply for _ in requests)

    one = grpc.server(ThreadPoolExecutor(4))
    echo_pb2_grpc.add_EchoServicer_to_server(Echo(), one)
    hosts = addresses(count)
    port = one.add_insecure_port(f"{hosts[0]}:0")
    for host in hosts[1:]:
        one.add_insecure_port(f"{host}:{port}")
    one.start()
    print(port, flush=True)
    one.wait_for_termination()


def _main() -> None:
    protocol, count = sys.argv[1], int(sys.argv[2])
    serve = _serve_grpc if protocol == "grpc" else lambda n: asyncio.run(_serve_http(n))
    threading.Thread(target=serve, args=(count,), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    _main()
