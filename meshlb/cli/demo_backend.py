"""One server of the demo, a process of its own: ``python -m meshlb.cli.demo_backend http|grpc --id ID ...``.

Prints ``port N`` once it listens, and serves until its standard input is closed, so that it can never outlive the
demo.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Behaviour:
    """How this server answers: after ``delay`` seconds, and with an error for a share ``fail`` of the calls."""

    def __init__(self, name: str, delay: float, fail: float) -> None:
        self.name = name
        self._delay = delay
        self._fail = fail
        self._random = random.Random(name)

    def fails(self) -> bool:
        """Take the time that a call takes, and say whether it fails."""
        time.sleep(self._delay * (0.8 + 0.4 * self._random.random()))
        return self._random.random() < self._fail


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    behaviour: Behaviour

    def do_GET(self) -> None:
        status = 503 if self.path != "/health" and self.behaviour.fails() else 200
        body = f"{self.behaviour.name}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the demo's own output is what is to be read."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a caller that closes its connections is no error."""


def serve_http(behaviour: Behaviour, port: int) -> int:
    """Start an HTTP server in the background; returns its port."""
    handler = type("Handler", (_Handler,), {"behaviour": behaviour})
    server = _Server(("127.0.0.1", port), handler)
    server.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def serve_grpc(behaviour: Behaviour, port: int) -> int:
    """Start a gRPC server in the background; returns its port."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    from meshlb._proto.echo_pb2 import EchoReply, EchoRequest

    def say(request: EchoRequest, context: grpc.ServicerContext) -> EchoReply:
        if behaviour.fails():
            context.abort(grpc.StatusCode.UNAVAILABLE, "the demo makes this instance fail")
        return EchoReply(text=request.text, backend=behaviour.name)

    handler = grpc.unary_unary_rpc_method_handler(
        say, request_deserializer=EchoRequest.FromString, response_serializer=EchoReply.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(16))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("meshlb.demo.v1.Echo", {"Say": handler}),))
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    _keep.append(server)
    return bound


_keep: list[object] = []
"""A gRPC server stops when it is collected."""


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("protocol", choices=("http", "grpc"))
    parser.add_argument("--id", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--fail", type=float, default=0.0)
    options = parser.parse_args()
    behaviour = Behaviour(options.id, options.delay, options.fail)
    serve = serve_http if options.protocol == "http" else serve_grpc
    said = f"port {serve(behaviour, options.port)}\n".encode()
    with contextlib.suppress(BrokenPipeError):  # the demo was ended while this server started
        os.write(sys.stdout.fileno(), said)
    sys.stdin.read()


if __name__ == "__main__":
    main()
