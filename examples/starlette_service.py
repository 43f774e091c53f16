"""A Starlette service that calls another service. One mesh and one client for the whole process, opened and closed by
the lifespan. With FastAPI it is the same: `FastAPI(lifespan=lifespan)`.

Run it: uvicorn --app-dir examples starlette_service:app
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import TypedDict

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from meshlb import Mesh, NoEndpoints, Retry, ServiceConfig
from meshlb.httpx import AsyncMeshTransport


class State(TypedDict):
    """What the lifespan hands to every request."""

    mesh: Mesh
    client: httpx.AsyncClient


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[State]:
    async with (
        Mesh(defaults=ServiceConfig(retry=Retry(per_try_timeout=0.5))) as mesh,
        httpx.AsyncClient(transport=AsyncMeshTransport(mesh), timeout=2) as client,
    ):
        yield {"mesh": mesh, "client": client}


async def order(request: Request) -> JSONResponse:
    client: httpx.AsyncClient = request.state.client
    try:
        answer = await client.get(f"http://orders/v1/orders/{request.path_params['number']}")
    except NoEndpoints as error:  # nobody serves orders: a 503 to retry rather than a 500
        return JSONResponse({"error": str(error)}, status_code=503)
    return JSONResponse({"status": answer.status_code, "served_by": answer.headers.get("x-backend")})


async def endpoints(request: Request) -> JSONResponse:
    """Why does an instance get no traffic? For operators, not for the public."""
    mesh: Mesh = request.state.mesh
    return JSONResponse(mesh.snapshot())


app = Starlette(
    lifespan=lifespan,
    routes=[Route("/order/{number:int}", order), Route("/debug/mesh", endpoints)],
)
