"""For services that want to be found: register in Consul, stay registered, leave without a trace.

::

    from meshlb.registration import Check, Registration

    with Registration("orders", 8001, address="10.0.0.7", check=Check.http("http://10.0.0.7:8001/health")):
        serve()                                                  # async with: the same, on asyncio and trio

    app = FastAPI(lifespan=Registration("orders", 8001).lifespan)             # Starlette, FastAPI

    from meshlb.registration.grpc import serve                                # serve_aio for grpc.aio
    serve(server, Registration("orders", 50051))
"""

from __future__ import annotations

from meshlb.registration.definition import Check, CheckStatus
from meshlb.registration.registration import Registration

__all__ = ["Check", "CheckStatus", "Registration"]
