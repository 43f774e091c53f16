"""The child of a fork."""

from __future__ import annotations

from tests.core.fork_programs import run


def test_the_child_calls_gets_updates_and_closes_and_the_parent_is_unharmed() -> None:
    run(
        """
        discovery = StaticDiscovery({"orders": ADDRESSES})
        mesh = Mesh(discovery)
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        for _ in range(20):
            cluster.start().close()
        held = cluster.start()

        def child():
            assert threading.active_count() == 1  # no thread before the first use
            assert [node.in_flight for node in cluster.nodes] == [0] * 4
            held.close()  # the parent's: of no consequence here
            with cluster.lease() as lease:
                assert lease.node in cluster.nodes
            assert sum(node.calls for node in cluster.nodes) == 1
            discovery.update("orders", ["127.0.0.9:80"])
            eventually(lambda: [n.endpoint.host for n in cluster.nodes] == ["127.0.0.9"])
            other = mesh.cluster("orders", tag="nobody")
            eventually(lambda: other.age is not None)
            with cluster.lease() as lease:
                assert lease.endpoint.host == "127.0.0.9"
            adds_up(cluster)
            began = time.monotonic()
            mesh.close()
            assert time.monotonic() - began < 5
            assert threading.active_count() == 1

        end(in_child(child))
        assert [node.endpoint.address for node in cluster.nodes] == ADDRESSES
        assert held.node.in_flight == 1
        held.close()
        adds_up(cluster)
        discovery.update("orders", ADDRESSES[:1])
        assert cluster.start().close()
        mesh.close()
        assert threading.active_count() == 1
        """
    )


def test_children_of_children_and_a_child_that_closes_without_a_call() -> None:
    run(
        """
        discovery = StaticDiscovery({"orders": ADDRESSES})
        mesh = Mesh(discovery)
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)

        def grandchild():
            cluster.start().close()
            discovery.update("orders", ["127.0.0.8:80"])
            eventually(lambda: [n.endpoint.host for n in cluster.nodes] == ["127.0.0.8"])
            mesh.close()

        def child():
            cluster.start().close()
            eventually(lambda: len(discovery._watches) == 1)
            end(in_child(grandchild))
            cluster.start().close()
            mesh.close()
            assert not discovery._watches

        end(in_child(child))
        end(in_child(mesh.close))
        end(in_child(lambda: cluster.close()))
        assert len(discovery._watches) == 1
        mesh.close()
        """
    )


def test_an_endpoint_that_was_out_is_probed_in_the_child_whose_timers_stayed_behind() -> None:
    run(
        """
        import logging; logging.disable(logging.CRITICAL)
        from meshlb import Outcome, OutcomeKind
        config = ServiceConfig(breaker=Breaker(consecutive_failures=1, open_time=600, max_open_time=600))
        mesh = Mesh(StaticDiscovery({"orders": ADDRESSES}), defaults=config)
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        lease = cluster.start()
        lease.close(Outcome(OutcomeKind.FAILURE))
        bad = lease.endpoint
        eventually(lambda: lease.node not in cluster.view.nodes)

        def child():
            cluster.start().close()
            [node] = [node for node in cluster.nodes if node.endpoint == bad]
            assert node.standing == "half_open" and node in cluster.view.nodes
            node.begin().close()
            assert node.standing == "ready" and cluster._members.cap.out == 0
            mesh.close()

        end(in_child(child))
        assert lease.node.is_open
        mesh.close()
        """
    )


def test_a_mesh_whose_first_answer_had_not_come() -> None:
    run(
        """
        import asyncio

        class Slow(StaticDiscovery):
            async def watch(self, query, sink):
                await asyncio.sleep(3600 if os.getpid() == parent else 0)
                await super().watch(query, sink)

        parent = os.getpid()
        mesh = Mesh(Slow({"orders": ADDRESSES}))
        cluster = mesh.cluster("orders")

        def child():
            cluster.start().close()
            mesh.close()

        end(in_child(child))
        mesh.close()
        """
    )
