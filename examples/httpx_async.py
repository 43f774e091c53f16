"""httpx on an event loop, with settings for one service. Runs on asyncio; `anyio.run(main, backend="trio")` as well."""

from __future__ import annotations

import anyio
import httpx

from meshlb import Breaker, Mesh, Retry, ServiceConfig
from meshlb.httpx import AsyncMeshTransport

ORDERS = ServiceConfig(
    policy="least_response_time",
    # An instance that has not begun to answer after 0.5 s is given up, and another one is asked.
    retry=Retry(max_attempts=3, per_try_timeout=0.5),
    breaker=Breaker(consecutive_failures=3),
)


async def fetch(client: httpx.AsyncClient, number: int) -> None:
    response = await client.get(f"http://orders/v1/orders/{number}")
    response.raise_for_status()
    print(f"order {number}: {response.status_code} from {response.headers['x-backend']}")


async def main() -> None:
    async with (
        Mesh(services={"orders": ORDERS}) as mesh,
        httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=5) as client,
        anyio.create_task_group() as tasks,
    ):
        for number in range(20):
            tasks.start_soon(fetch, client, number)


if __name__ == "__main__":
    anyio.run(main)
