"""Interceptors for gRPC servers: they report the server's load in each call's trailers, and note the caller.

::

    server = grpc.server(executor, interceptors=[LoadReportInterceptor()])
    server = grpc.aio.server(interceptors=[AioLoadReportInterceptor()])

Name it first among several: the first sees the call first, and its end last.
"""

from __future__ import annotations

from meshlb.server.grpc._aio import AioLoadReportInterceptor
from meshlb.server.grpc._interceptor import LoadReportInterceptor

__all__ = ["AioLoadReportInterceptor", "LoadReportInterceptor"]
