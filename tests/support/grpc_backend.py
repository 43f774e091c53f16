"""A real gRPC server for proto/'s Echo service: `python -m tests.support.grpc_backend --id a --host H --port 0`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from meshlb._proto import echo_pb2, echo_pb2_grpc
from tests.support.backend_control import Behaviour, Control, say

CODES = {code.value[0]: code for code in grpc.StatusCode}


class Echo(echo_pb2_grpc.EchoServicer):
    def __init__(self, control: Control) -> None:
        self._control = control

    def Say(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext) -> echo_pb2.EchoReply:
        with self._call("Say", context):
            return self._unary(request, context)

    def Put(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext) -> echo_pb2.EchoReply:
        with self._call("Put", context):
            return self._unary(request, context)

    def Watch(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext) -> Iterator[echo_pb2.EchoReply]:
        with self._call("Watch", context):
            self._before(request, context)
            for sequence in range(max(1, request.count)):
                if sequence:
                    self._pause(request.interval_seconds, context)
                self._fail(request, context, sequence)
                yield self._reply(request, context, sequence)

    def Collect(
        self, request_iterator: Iterator[echo_pb2.EchoRequest], context: grpc.ServicerContext
    ) -> echo_pb2.EchoReply:
        with self._call("Collect", context):
            requests = list(request_iterator)
            last = requests[-1] if requests else echo_pb2.EchoRequest()
            self._before(last, context)
            self._fail(last, context, 0)
            reply = self._reply(last, context, len(requests))
            reply.text = " ".join(request.text for request in requests)
            return reply

    def Chat(
        self, request_iterator: Iterator[echo_pb2.EchoRequest], context: grpc.ServicerContext
    ) -> Iterator[echo_pb2.EchoReply]:
        with self._call("Chat", context):
            for sequence, request in enumerate(request_iterator):
                self._before(request, context)
                self._fail(request, context, sequence)
                yield self._reply(request, context, sequence)

    def _unary(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext) -> echo_pb2.EchoReply:
        self._before(request, context)
        self._fail(request, context, request.fail_after)
        return self._reply(request, context, 0)

    @contextmanager
    def _call(self, method: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Count the call and do what this server was told to do with all of them."""
        context.add_callback(self._control.wake)
        with self._control.call(method) as (behaviour, fails):
            if behaviour.trailers:
                context.set_trailing_metadata(tuple(behaviour.trailers.items()))
            self._pause(behaviour.delay, context)
            if fails:
                self._misbehave(behaviour, context)
            yield

    def _misbehave(self, behaviour: Behaviour, context: grpc.ServicerContext) -> None:
        if behaviour.hang:
            self._control.pause(None, lambda: not context.is_active())
            context.abort(grpc.StatusCode.CANCELLED, "was told to hang")
        if behaviour.code:
            context.abort(grpc.StatusCode[behaviour.code], behaviour.details or "was told to fail")

    def _before(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext) -> None:
        if request.trailing_metadata:
            context.set_trailing_metadata(tuple(request.trailing_metadata.items()))
        self._pause(request.delay_seconds, context)

    def _pause(self, seconds: float, context: grpc.ServicerContext) -> None:
        if seconds > 0:
            self._control.pause(seconds, lambda: not context.is_active())

    @staticmethod
    def _fail(request: echo_pb2.EchoRequest, context: grpc.ServicerContext, sequence: int) -> None:
        if request.fail_code and sequence >= request.fail_after:
            context.abort(CODES[request.fail_code], request.fail_details or "the request asked for it")

    def _reply(self, request: echo_pb2.EchoRequest, context: grpc.ServicerContext, sequence: int) -> echo_pb2.EchoReply:
        metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        return echo_pb2.EchoReply(
            text=request.text,
            backend=self._control.backend,
            sequence=sequence,
            metadata=metadata,
            payload=b"x" * request.payload_bytes,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--id", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--cert")
    parser.add_argument("--key")
    options = parser.parse_args()
    control = Control(options.id)
    # Threads are made as calls come; a hanging call holds one. No SO_REUSEPORT: two servers must not share a port.
    server = grpc.server(ThreadPoolExecutor(256), options=[("grpc.so_reuseport", 0)])
    echo_pb2_grpc.add_EchoServicer_to_server(Echo(control), server)
    address = f"[{options.host}]:{options.port}" if ":" in options.host else f"{options.host}:{options.port}"
    port = bind(server, address, options.cert, options.key)
    server.start()
    say({"port": port})
    control.serve()


def bind(server: grpc.Server, address: str, cert: str | None, key: str | None) -> int:
    """Bind, waiting up to 5 s for a port that was given: the previous owner may be on its way out."""
    deadline = time.monotonic() + 5
    while True:
        try:
            if cert is None or key is None:
                return server.add_insecure_port(address)
            with open(key, "rb") as key_file, open(cert, "rb") as cert_file:
                pair = (key_file.read(), cert_file.read())
            return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError:
            if address.endswith(":0") or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


if __name__ == "__main__":
    main()
