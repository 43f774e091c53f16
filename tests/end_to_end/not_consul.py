"""Something that is no healthy Consul agent: it gives the same answer to every request, or none at all."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from tests.support.ports import loopback_host


class NotConsul:
    """Serves while its block lasts. `status` 0: take the request and never answer."""

    def __init__(self, status: int, body: bytes = b"", content_type: str = "text/plain") -> None:
        self.status = status
        self.body = body
        self.content_type = content_type
        self.ending = threading.Event()
        self._server = ThreadingHTTPServer((loopback_host(), 0), type("Handler", (_Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def address(self) -> str:
        return f"http://{loopback_host()}:{self._server.server_port}"

    def __enter__(self) -> NotConsul:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    owner: NotConsul

    def do_GET(self) -> None:
        if self.owner.status == 0:
            self.owner.ending.wait(30)
            return
        self.send_response(self.owner.status)
        self.send_header("content-type", self.owner.content_type)
        self.send_header("content-length", str(len(self.owner.body)))
        self.end_headers()
        self.wfile.write(self.owner.body)

    def log_message(self, format: str, *args: object) -> None:
        pass
