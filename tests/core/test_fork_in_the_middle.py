"""os.fork while other threads, or the forking one, are in the middle of something."""

from __future__ import annotations

import pytest

from tests.core.fork_programs import run


def test_forks_while_other_threads_hold_every_lock_there_is() -> None:
    run(
        """
        from meshlb.telemetry import Telemetry
        discovery = StaticDiscovery({"orders": ADDRESSES})
        mesh = Mesh(discovery, defaults=ServiceConfig(breaker=Breaker(consecutive_failures=1)))
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        locks = [
            mesh._lock, cluster._lock, cluster._retries_lock, cluster._changed._lock, cluster._log._lock,
            cluster._members.cap._lock, cluster.budget._lock, discovery._lock, control._lock, mesh._finished._lock,
            *(node.lock for node in cluster.nodes),
        ]
        starts = (cluster.start() for _ in range(100))
        draining = next(lease for lease in starts if lease.endpoint.address == ADDRESSES[3])
        discovery.update("orders", ADDRESSES[:3])
        held, let_go = threading.Event(), threading.Event()

        def hold():
            for lock in locks:
                lock.acquire()
            held.set()
            let_go.wait()
            for lock in reversed(locks):
                lock.release()

        lease = cluster.start()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()

        def child():
            lease.close()
            draining.close()
            for _ in range(20):
                cluster.start().close()
            cluster.count_retry()
            cluster.snapshot()
            discovery.update("orders", ADDRESSES[:2])
            assert cluster.budget.try_withdraw()
            mesh.cluster("stock")
            Mesh(discovery).cluster("orders").wait_ready(5)
            mesh.close()

        pid = in_child(child)
        let_go.set()
        end(pid)
        thread.join()
        lease.close()
        draining.close()
        mesh.close()
        """
    )


def test_forks_under_load() -> None:
    run(
        """
        from random import Random
        from meshlb import Outcome, OutcomeKind
        FAILURE = Outcome(OutcomeKind.FAILURE, reason="test")
        discovery = StaticDiscovery({"orders": ADDRESSES})
        config = ServiceConfig(breaker=Breaker(consecutive_failures=1, open_time=0.01, max_open_time=0.05))
        import logging; logging.disable(logging.CRITICAL)
        mesh = Mesh(discovery, defaults=config)
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        stop = threading.Event()

        def calls(seed):
            random = Random(seed)
            while not stop.is_set():
                try:
                    lease = cluster.start()
                    if random.random() < 0.5:
                        lease.answered()
                    if random.random() < 0.9:
                        lease.close(OK if random.random() < 0.5 else FAILURE)
                except meshlb.NoEndpoints:
                    pass

        def changes():
            random = Random(0)
            while not stop.is_set():
                discovery.update("orders", random.sample(ADDRESSES, random.randint(1, 4)))

        threads = [threading.Thread(target=calls, args=(n,)) for n in range(6)] + [threading.Thread(target=changes)]
        for thread in threads:
            thread.start()

        def child():
            for _ in range(50):
                with cluster.lease():
                    pass
            adds_up(cluster)

            def keeps_its_accounts():
                with cluster._lock:  # or the first answer of the child's own watch may come in between
                    out = [n for n in cluster.nodes if n.breaker.state.value != "closed"]
                    return set(out) == {n for n in cluster.nodes if n.ejected} and cluster._members.cap.out == len(out)

            eventually(keeps_its_accounts)
            assert cluster.snapshot()
            discovery.update("orders", ["127.0.0.77:80"])
            eventually(lambda: [n.endpoint.host for n in cluster.nodes] == ["127.0.0.77"])
            with cluster.lease() as lease:
                assert lease.endpoint.host == "127.0.0.77"
            mesh.close()

        for _ in range(12):
            end(in_child(child))
        stop.set()
        for thread in threads:
            thread.join()
        gc.collect()
        eventually(lambda: all(n.in_flight == 0 for n in cluster.nodes))
        adds_up(cluster)
        mesh.close()
        """
    )


def test_a_fork_in_the_middle_of_a_close() -> None:
    run(
        """
        import asyncio
        closing, go_on = threading.Event(), threading.Event()

        class Slow(StaticDiscovery):
            async def aclose(self):
                closing.set()
                await asyncio.sleep(0.2)

        mesh = Mesh(Slow({"orders": ADDRESSES}))
        cluster, other = mesh.cluster("orders"), mesh.cluster("orders", tag="other")
        cluster.wait_ready(5)

        class Listener:
            def endpoint_removed(self, node):
                closing.set()
                go_on.wait()
        listener = Listener()
        cluster.add_listener(listener)
        thread = threading.Thread(target=mesh.close)
        thread.start()
        closing.wait()

        def child():
            go_on.set()
            for each in (cluster, other):  # the first one was closed already, the second was not yet
                try:
                    each.start()
                    raise AssertionError("started")
                except meshlb.MeshClosed:
                    pass
            began = time.monotonic()
            mesh.close()
            assert time.monotonic() - began < 5

        pid = in_child(child)
        go_on.set()
        end(pid)
        thread.join()
        """
    )


def test_a_fork_while_the_control_loop_imports_does_not_lock_the_module_in_the_child() -> None:
    run(
        """
        import importlib, importlib.abc, importlib.util
        importing, go_on = threading.Event(), threading.Event()

        class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
            def find_spec(self, name, path=None, target=None):
                return importlib.util.spec_from_loader(name, self) if name == "slow_module" else None
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                importing.set()
                go_on.wait(1.0)

        sys.meta_path.insert(0, Finder())

        class Lazy(StaticDiscovery):
            async def watch(self, query, sink):
                import slow_module
                await super().watch(query, sink)

        mesh = Mesh(Lazy({"orders": ADDRESSES}))
        cluster = mesh.cluster("orders")
        importing.wait()

        def child():
            # Other threads first: the lock goes by thread ids, and the first new thread gets that of the parent's.
            for _ in range(3):
                threading.Thread(target=threading.Event().wait, daemon=True).start()
            cluster.wait_ready(5)
            mesh.close()

        end(in_child(child))  # as a preloading server does right after the import of the program
        cluster.wait_ready(5)
        mesh.close()
        """
    )


def test_a_fork_on_the_control_loops_own_thread() -> None:
    run(
        """
        mesh = Mesh(StaticDiscovery({"orders": ADDRESSES}))
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        codes = []

        def fork():
            pid = os.fork()
            if pid == 0:
                os._exit(7)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

        mesh.call_soon(fork)
        eventually(lambda: codes)
        assert codes == [7]
        cluster.start().close()
        mesh.close()
        """
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(method: str) -> None:
    run(
        f"""
        import multiprocessing
        mesh = Mesh(StaticDiscovery({{"orders": ADDRESSES}}))
        mesh.cluster("orders").wait_ready(5)
        context = multiprocessing.get_context({method!r})
        if {method!r} == "fork":
            def work():
                mesh.cluster("orders").start().close()
                sys.exit(5)
            process = context.Process(target=work)
        else:  # those import what they run
            process = context.Process(target=sys.exit, args=(5,))
        process.start()
        process.join(20)
        assert process.exitcode == 5, process.exitcode
        mesh.cluster("orders").start().close()
        mesh.close()
        """
    )


def test_the_child_ends_quietly_in_development_mode() -> None:
    run(
        """
        mesh = Mesh(StaticDiscovery({"orders": ADDRESSES}))
        mesh.cluster("orders").wait_ready(5)
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            mesh.cluster("orders").start().close()
            mesh.close()
            sys.exit(0)  # the whole way through the interpreter's end
        end(pid)
        mesh.close()
        """,
        "-X",
        "dev",
        "-W",
        "error",
        "-W",
        "ignore:This process:DeprecationWarning",  # that it forks with threads, since Python 3.12
    )


def test_choices_are_not_the_parents() -> None:
    run(
        """
        discovery = StaticDiscovery({"orders": [f"127.0.1.{n}:80" for n in range(1, 200)]})
        mesh = Mesh(discovery, defaults=ServiceConfig(policy="random"))
        cluster = mesh.cluster("orders")
        cluster.wait_ready(5)
        reading, writing = os.pipe()

        def child():
            picks = []
            for _ in range(8):
                with cluster.lease() as lease:
                    picks.append(lease.endpoint.host)
            os.write(writing, (" ".join(picks) + "\\n").encode())
            mesh.close()

        for pid in [in_child(child) for _ in range(3)]:
            end(pid)
        os.close(writing)
        with os.fdopen(reading) as lines:
            assert len(set(lines)) == 3
        mesh.close()
        """
    )
