"""gRPC on asyncio: unary calls side by side, and a conversation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, cast

from meshlb import Mesh
from meshlb._proto.echo_pb2 import EchoRequest  # in your program: your own generated modules
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.grpc.aio import insecure_channel

if TYPE_CHECKING:
    from meshlb._proto.echo_pb2_grpc import EchoAsyncStub  # exists for type checkers only


async def questions() -> AsyncIterator[EchoRequest]:
    for number in range(3):
        yield EchoRequest(text=f"question {number}")


async def main() -> None:
    async with Mesh() as mesh, insecure_channel("consul:///echo", mesh=mesh) as channel:
        stub = cast("EchoAsyncStub", EchoStub(channel))

        calls = [stub.Say(EchoRequest(text=f"hello {number}"), timeout=5) for number in range(10)]
        for reply in await asyncio.gather(*calls):
            print(f"unary: {reply.text} from {reply.backend}")

        async for reply in stub.Chat(questions(), timeout=5):  # one conversation stays with one instance
            print(f"stream: {reply.text} from {reply.backend}")


if __name__ == "__main__":
    asyncio.run(main())
