"""TCP checks: connect, and if wanted send something and expect something."""

from __future__ import annotations

import asyncio

from meshlb.health.checks import TcpCheck
from meshlb.health.connection import Connector
from meshlb.health.prober import BODY_LIMIT, Push, excerpt
from meshlb.health.state import CheckResult
from meshlb.model import Endpoint


class TcpProber:
    """A connection for each check, closed at its end."""

    def __init__(self, options: TcpCheck, service: str, push: Push) -> None:
        self._options = options
        self.label = "TCP"
        self._connected = "connected" if options.tls is None else "connected with TLS"
        self._connector = Connector(options.port, options.tls, service)
        self._send, self._expect = _bytes(options.send), _bytes(options.expect)

    async def check(self, endpoint: Endpoint) -> CheckResult:
        async with self._connector.connect(endpoint) as (reader, writer):
            if self._send:
                writer.write(self._send)
                await writer.drain()
            return await self._expected(reader) if self._expect else CheckResult(True, self._connected)

    async def _expected(self, reader: asyncio.StreamReader) -> CheckResult:
        answer = bytearray()
        while self._expect not in answer:
            if len(answer) >= BODY_LIMIT:
                return CheckResult(False, f"{self._expect!r} is not in the first {BODY_LIMIT // 1024} KiB")
            piece = await reader.read(BODY_LIMIT - len(answer))
            if not piece:
                said = f"after {excerpt(repr(bytes(answer)))}" if answer else "without a word"
                return CheckResult(False, f"closed {said} instead of {self._expect!r}")
            answer += piece
        return CheckResult(True, f"answered {excerpt(repr(self._expect))}")

    def forget(self, endpoint: Endpoint) -> None:
        """Nothing is held between two checks."""

    async def aclose(self) -> None:
        """Nothing is held between two checks."""


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
