"""What a server uses: it reports its own load with each response, and notes whose request it is serving.

::

    from meshlb.server.asgi import LoadReportMiddleware          # Starlette, FastAPI, any ASGI application
    app = LoadReportMiddleware(app)

    from meshlb.server.grpc import LoadReportInterceptor         # AioLoadReportInterceptor for grpc.aio
    server = grpc.server(executor, interceptors=[LoadReportInterceptor()])

The reports (ORCA: cncf/xds ``xds/data/orca/v3/orca_load_report.proto``) are what the policies
``client_weighted_round_robin`` and ``prequal`` of clients balance by; Envoy and gRPC read them too. The caller's
address is what ``ip_hash`` hashes for the calls that the server makes in turn.
"""

from __future__ import annotations

from meshlb.server.meter import LoadMeter

__all__ = ["LoadMeter"]
