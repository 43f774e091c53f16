"""gRPC: a channel over all instances of a service. The stub is the generated one and knows nothing of it."""

from __future__ import annotations

import grpc

from meshlb import Mesh
from meshlb._proto.echo_pb2 import EchoRequest  # in your program: your own generated modules
from meshlb._proto.echo_pb2_grpc import EchoStub
from meshlb.grpc import insecure_channel


def main() -> None:
    with Mesh() as mesh, insecure_channel("consul:///echo", mesh=mesh) as channel:
        stub = EchoStub(channel)

        for number in range(5):
            reply = stub.Say(EchoRequest(text=f"hello {number}"), timeout=5)
            print(f"unary: {reply.text} from {reply.backend}")

        for reply in stub.Watch(EchoRequest(text="tick", count=3), timeout=5):
            print(f"stream: {reply.text} {reply.sequence} from {reply.backend}")

        futures = [stub.Say.future(EchoRequest(text=f"later {number}"), timeout=5) for number in range(5)]
        for future in futures:
            reply = future.result()
            print(f"future: {reply.text} from {reply.backend}")

        try:
            stub.Put(EchoRequest(fail_code=grpc.StatusCode.NOT_FOUND.value[0], fail_details="no such thing"))
        except grpc.RpcError as error:  # the server's own answer, as without meshlb
            print(f"error: {error.code().name} {error.details()}")


if __name__ == "__main__":
    main()
