"""multiprocessing: start method, then whether the parent calls before it starts children."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

from tests.process_life.programs import clients


def work(number: int) -> tuple[int, list[str]]:
    answered = clients.everything()
    assert sum(node.in_flight for cluster in clients.mesh.clusters for node in cluster.nodes) == 0
    return os.getpid(), answered


def in_process(queue: multiprocessing.Queue[tuple[int, list[str]]]) -> None:
    queue.put(work(0))


def main(method: str, before: str) -> None:
    everybody = sorted((os.environ["ORDERS_IDS"] + "," + os.environ["ECHO_IDS"]).split(","))
    context = multiprocessing.get_context(method)
    if before == "used":
        assert clients.everything() == everybody
        gc.collect()  # httpx's responses are cycles that hold their socket: the child would find it unclosed, and warn
    queue = context.Queue()
    process = context.Process(target=in_process, args=(queue,))
    process.start()
    pid, answered = queue.get(timeout=90)
    assert pid != os.getpid()
    assert answered == everybody, answered
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    queue.close()
    queue.join_thread()
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for pid, answered in pool.map(work, range(2)):
            assert pid != os.getpid()
            assert answered == everybody, answered
    assert clients.everything() == everybody
    clients.client.close()
    clients.mesh.close()
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
