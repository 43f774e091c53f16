"""A WSGI program for gunicorn --preload: its clients are made once, at import, before the workers are forked.

Each worker then has a control thread, Consul watches and connections of its own, made when it first calls a service.
Nothing has to be done for that, neither here nor in gunicorn's hooks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import httpx

import meshlb
from meshlb._proto.echo_pb2 import EchoRequest  # in your program: your own generated modules
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.grpc import insecure_channel
from meshlb.httpx import MeshTransport

client = httpx.Client(transport=MeshTransport(), timeout=5)  # no mesh given: the process's default one
stub = EchoStub(insecure_channel("consul:///echo"))


def handle(path: str) -> Any:
    if path == "/order":
        response = client.get("http://orders/v1/orders/42")
        return {"status": response.status_code, "served_by": response.headers["x-backend"]}
    if path == "/echo":
        return {"served_by": stub.Say(EchoRequest(text="hello"), timeout=5).backend}
    return {"mesh": meshlb.default_mesh().snapshot()}


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    body = json.dumps({"worker": os.getpid(), **handle(environ["PATH_INFO"])}).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]
