"""Tiers under gRPC calls: the tier that calls go to dies, and nobody sees it."""

from __future__ import annotations

from meshlb import Breaker, Endpoint, Failover, Mesh, ServiceConfig
from meshlb._proto import echo_pb2, echo_pb2_grpc
from meshlb.discovery import StaticDiscovery
from meshlb.grpc import insecure_channel
from tests.support.backends import grpc_backends
from tests.support.wait import eventually


def test_a_spare_takes_over_and_gives_back() -> None:
    with grpc_backends(3) as (main, other, spare):
        instances = [Endpoint(main.host, main.port, tags=("main",)), Endpoint(other.host, other.port, tags=("main",))]
        instances.append(Endpoint(spare.host, spare.port, tags=("spare",)))
        config = ServiceConfig(
            policy="round_robin",
            failover=Failover(by="tag", order=["main", "spare"], failback_delay=0.5, ramp=0.2),
            breaker=Breaker(open_time=0.2, max_open_time=0.5),
        )
        discovery = StaticDiscovery({"echo": instances})
        with Mesh(discovery, defaults=config) as mesh, insecure_channel("echo", mesh=mesh) as channel:
            stub = echo_pb2_grpc.EchoStub(channel)

            def served_by() -> str:
                return stub.Say(echo_pb2.EchoRequest(text="x"), timeout=30).backend

            assert {served_by() for _ in range(10)} == {main.id, other.id}
            main.kill()
            assert {served_by() for _ in range(10)} == {other.id}
            other.kill()
            assert {served_by() for _ in range(30)} == {spare.id}
            main.restart()
            eventually(lambda: served_by() == main.id, timeout=40)
            eventually(lambda: {served_by() for _ in range(10)} <= {main.id, other.id}, timeout=40)
