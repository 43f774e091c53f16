"""Something for the other examples to call: three instances of `orders` (HTTP) and three of `echo` (gRPC), registered
in Consul, each with a check by the agent. Press Ctrl-C to end and deregister them.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import consul  # py-consul
import grpc

from meshlb._proto.echo_pb2 import EchoReply, EchoRequest
from meshlb._proto.echo_pb2_grpc import EchoServicer, add_EchoServicer_to_server

HOST = "127.0.0.1"
INSTANCES = 3


class Orders(BaseHTTPRequestHandler):
    """Answers every GET with the path and the instance's name."""

    protocol_version = "HTTP/1.1"  # keep connections open
    wbufsize = -1  # one packet an answer
    instance = ""

    def do_GET(self) -> None:
        body = f'{{"path": "{self.path}"}}'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Backend", self.instance)
        self.end_headers()
        self.wfile.write(body)


class Echo(EchoServicer):
    """proto/meshlb/demo/v1/echo.proto, without its ways to misbehave."""

    def __init__(self, instance: str) -> None:
        self._instance = instance

    def Say(self, request: EchoRequest, context: grpc.ServicerContext) -> EchoReply:
        return EchoReply(text=request.text, backend=self._instance)

    def Put(self, request: EchoRequest, context: grpc.ServicerContext) -> EchoReply:
        context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")
        raise AssertionError("abort raises")

    def Watch(self, request: EchoRequest, context: grpc.ServicerContext) -> Iterator[EchoReply]:
        for sequence in range(request.count):
            yield EchoReply(text=request.text, backend=self._instance, sequence=sequence)

    def Collect(self, request_iterator: Iterator[EchoRequest], context: grpc.ServicerContext) -> EchoReply:
        texts = [request.text for request in request_iterator]
        return EchoReply(text=" ".join(texts), backend=self._instance, sequence=len(texts))

    def Chat(self, request_iterator: Iterator[EchoRequest], context: grpc.ServicerContext) -> Iterator[EchoReply]:
        for request in request_iterator:
            yield EchoReply(text=request.text, backend=self._instance)


def serve_orders(instance: str) -> int:
    handler = type("Handler", (Orders,), {"instance": instance})
    server = ThreadingHTTPServer((HOST, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def serve_echo(instance: str, stack: contextlib.ExitStack) -> int:
    server = grpc.server(ThreadPoolExecutor(8))
    add_EchoServicer_to_server(Echo(instance), server)
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    stack.callback(server.stop, 1)
    return port


def main() -> None:
    agent = consul.Consul().agent  # CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN
    with contextlib.ExitStack() as stack:
        for number in range(1, INSTANCES + 1):
            for service in ("orders", "echo"):
                instance = f"{service}-{number}"
                port = serve_orders(instance) if service == "orders" else serve_echo(instance, stack)
                check = consul.Check.tcp(HOST, port, "1s", deregister="1m") | {"status": "passing"}
                agent.service.register(service, instance, HOST, port, check=check)
                stack.callback(agent.service.deregister, instance)
                print(f"{instance} serves on {HOST}:{port}", flush=True)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()


if __name__ == "__main__":
    main()
