"""Layer 4 on asyncio: streams to the instances of a service. For trio, or anyio: tcp.open_stream."""

from __future__ import annotations

import asyncio

from meshlb import LeastConnections, Mesh, ServiceConfig, tcp


async def ask(mesh: Mesh, number: int) -> str:
    reader, writer = await tcp.open_connection(mesh.cluster("orders"), timeout=5)
    writer.write(f"GET /v1/orders/{number} HTTP/1.0\r\nHost: orders\r\n\r\n".encode())
    status = (await reader.readline()).decode().strip()
    served_by = ""
    while (line := (await reader.readline()).decode().strip()) != "":
        name, _, value = line.partition(": ")
        if name.lower() == "x-backend":
            served_by = value
    writer.close()
    await writer.wait_closed()
    return f"order {number}: {status.split()[1]} from {served_by}"


async def main() -> None:
    # A connection is in flight for as long as it is open, so this evens out connections.
    config = ServiceConfig(policy=LeastConnections(full_scan=True))
    async with Mesh(services={"orders": config}) as mesh:
        for line in await asyncio.gather(*(ask(mesh, number) for number in range(9))):
            print(line)


if __name__ == "__main__":
    asyncio.run(main())
