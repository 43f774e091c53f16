"""A real HTTP/1.1 server with keep-alive, one thread a connection.

`python -m tests.support.http_backend --id a --host H --port 0`; tests/support/backends.py starts it.
Any path echoes the request as JSON. Besides: /redirect?to=URL&status=302, /cookie?name=N&value=V, /bytes?size=N.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.backend_control import Behaviour, Control, say


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # a test's threads all connect at once

    def __init__(self, address: tuple[str, int], control: Control) -> None:
        self.control = control
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)  # without HTTPServer's reverse look-up of the name
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def shutdown_request(self, request: Any) -> None:
        if request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER):
            self.close_request(request)  # RST: a shutdown first would send FIN
        else:
            super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that go away in the middle are part of the tests


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body in one write
    server: Server

    def do_GET(self) -> None:
        body = self._read_body()
        url = urlsplit(self.path)
        with self.server.control.call(url.path) as (behaviour, fails):
            if behaviour.delay:
                self.server.control.pause(behaviour.delay)
            if fails and behaviour.hang:
                self.server.control.pause(None)
                self.close_connection = True
            elif fails and behaviour.reset:
                self._reset()
            else:
                self._answer(url.path, parse_qs(url.query), body, behaviour, fails)

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_HEAD = do_GET

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes, behaviour: Behaviour, fails: bool) -> None:
        status, headers, payload = 200, {"content-type": "application/json"}, b""
        if fails and behaviour.status:
            status = behaviour.status
        if path == "/redirect":
            status = int(query.get("status", ["302"])[0])
            headers["location"] = query["to"][0]
        elif path == "/cookie":
            headers["set-cookie"] = f"{query['name'][0]}={query['value'][0]}; Path=/"
        if path == "/bytes":
            headers["content-type"] = "application/octet-stream"
            payload = b"x" * int(query["size"][0])
        elif status not in (204, 304):
            payload = json.dumps(
                {
                    "backend": self.server.control.backend,
                    "method": self.command,
                    "path": self.path,
                    "headers": {name.lower(): value for name, value in self.headers.items()},
                    "body": body.decode("latin-1"),
                }
            ).encode()
        headers.update(behaviour.headers)
        self.send_response(status)
        self.send_header("x-backend", self.server.control.backend)
        for name, value in headers.items():
            self.send_header(name, value)
        if behaviour.chunks and payload and self.command != "HEAD":
            self._send_chunks(payload, behaviour)
            return
        if status not in (204, 304):
            self.send_header("content-length", str(len(payload)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fails and behaviour.truncate:
            payload = payload[: len(payload) // 2]
            self.close_connection = True
        self.wfile.write(payload)

    def _send_chunks(self, payload: bytes, behaviour: Behaviour) -> None:
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        size = -(-len(payload) // behaviour.chunks)
        for start in range(0, len(payload), size):
            if start and behaviour.interval:
                self.server.control.pause(behaviour.interval)
            piece = payload[start : start + size]
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _reset(self) -> None:
        # With a linger of 0 s, close() sends RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(pieces)

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--id", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cert")
    parser.add_argument("--key")
    options = parser.parse_args()
    server = bind((options.host, options.port), Control(options.id))
    if options.cert:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.cert, options.key)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 60}, daemon=True).start()
    say({"port": server.server_port})
    server.control.serve()


def bind(address: tuple[str, int], control: Control) -> Server:
    """Bind, waiting up to 5 s for a port that was given: the previous owner may be on its way out."""
    deadline = time.monotonic() + 5
    while True:
        try:
            return Server(address, control)
        except OSError:
            if address[1] == 0 or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    main()
