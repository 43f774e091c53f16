"""Real HTTP and gRPC servers in processes of their own, told at run time how to behave.

    with http_backends(3) as (a, b, c):
        a.behave(delay=0.2)                        # slow
        b.behave(status=503, headers={"retry-after": "1"}, fail_share=0.5)
        c.kill()                                   # RST and refused connections
        c.restart()                                # on the same port
        a.freeze(); a.thaw()                       # accepts and does not answer
        a.requests()                               # how many it got

Every server ends with its `with` block, or with the test process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from tests.support.backend_control import Behaviour
from tests.support.ports import loopback_host
from tests.support.processes import ManagedProcess

Kind = Literal["http", "grpc"]
_ids = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Paths of PEM files for a server that speaks TLS."""

    cert: Path
    key: Path


class Backend:
    """One server. `start` it, or use it as a context manager."""

    def __init__(
        self,
        kind: Kind,
        id: str | None = None,
        *,
        host: str | None = None,
        port: int = 0,
        tls: Certificate | None = None,
        within: Sequence[str] = (),
        **behaviour: Any,
    ) -> None:
        self.kind: Kind = kind
        self.id = id or f"{kind}-{next(_ids)}"
        self.host = host or loopback_host()
        self.port = port
        self.tls = tls
        self._within = tuple(within)
        self._behaviour = Behaviour(**behaviour)
        self._process: ManagedProcess | None = None
        self._unread = b""

    @property
    def address(self) -> str:
        """host:port, as Endpoint and StaticDiscovery take it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The base URL of an HTTP backend."""
        return f"{'https' if self.tls else 'http'}://{self.address}"

    @property
    def process(self) -> ManagedProcess:
        if self._process is None:
            raise RuntimeError(f"backend {self.id} is not started")
        return self._process

    def start(self) -> Backend:
        """Start and return when it serves."""
        self.launch()
        self.wait_started()
        return self

    def launch(self) -> None:
        """Start without waiting, so that several come up at the same time."""
        command = [*self._within, sys.executable, "-m", f"tests.support.{self.kind}_backend"]
        command += ["--id", self.id, "--host", self.host, "--port", str(self.port)]
        if self.tls is not None:
            command += ["--cert", str(self.tls.cert), "--key", str(self.tls.key)]
        self._unread = b""
        self._process = ManagedProcess(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def wait_started(self, timeout: float = 30.0) -> None:
        """Wait until it has said which port it listens on."""
        self.port = self._read(timeout)["port"]
        if self._behaviour != Behaviour():
            self._apply(self._behaviour)

    def kill(self) -> None:
        """SIGKILL; connections are reset, the port refuses."""
        self.process.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()

    def freeze(self) -> None:
        """SIGSTOP: connections are accepted by the kernel, nothing is answered."""
        self.process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.thaw()

    def restart(self) -> None:
        """Start again on the same port, with the same behaviour; kills it first if it runs."""
        self.kill()
        self.start()

    def behave(self, **behaviour: Any) -> None:
        """Replace the whole behaviour (see Behaviour for the names); no arguments: healthy again."""
        self._apply(Behaviour(**behaviour))

    def requests(self, path: str | None = None) -> int:
        """How many calls it got since it was started or cleared: of one path or method, or of all."""
        counts: dict[str, int] = self.stats()["requests"]
        return sum(counts.values()) if path is None else counts.get(path, 0)

    def stats(self, clear: bool = False) -> dict[str, Any]:
        """requests by path or method, in_flight, max_in_flight; `clear` starts the counts anew."""
        return self._command({"clear": clear})

    def _apply(self, behaviour: Behaviour) -> None:
        self._command({"behaviour": dataclasses.asdict(behaviour)})
        self._behaviour = behaviour

    def _command(self, command: dict[str, Any]) -> dict[str, Any]:
        stdin = self.process.popen.stdin
        assert stdin is not None
        stdin.write(json.dumps(command).encode() + b"\n")
        stdin.flush()
        return self._read(10.0)

    def _read(self, timeout: float) -> dict[str, Any]:
        stdout = self.process.popen.stdout
        assert stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"backend {self.id} did not answer within {timeout:g} s (is it frozen?)")
            data = os.read(stdout.fileno(), 65536)
            if not data:
                raise RuntimeError(f"backend {self.id} ended: exit status {self.process.popen.wait(5)}")
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Backend:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        if self._process is not None:
            self._process.kill()

    def __repr__(self) -> str:
        return f"<Backend {self.id} {self.address}>"


def http_backend(id: str | None = None, **options: Any) -> Backend:
    """An HTTP/1.1 server (not started)."""
    return Backend("http", id, **options)


def grpc_backend(id: str | None = None, **options: Any) -> Backend:
    """A gRPC server of the Echo service (not started)."""
    return Backend("grpc", id, **options)


def http_backends(count: int, **options: Any) -> contextlib.AbstractContextManager[list[Backend]]:
    """`count` HTTP servers, started side by side."""
    return started([http_backend(**options) for _ in range(count)])


def grpc_backends(count: int, **options: Any) -> contextlib.AbstractContextManager[list[Backend]]:
    """`count` gRPC servers, started side by side."""
    return started([grpc_backend(**options) for _ in range(count)])


@contextlib.contextmanager
def started(backends: list[Backend]) -> Iterator[list[Backend]]:
    """Start them side by side, stop them all at the end."""
    with contextlib.ExitStack() as stack:
        for backend in backends:
            stack.callback(backend.__exit__)
            backend.launch()
        for backend in backends:
            backend.wait_started()
        yield backends
