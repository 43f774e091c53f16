"""The leak guard sees what it is there for."""

from __future__ import annotations

import subprocess
import threading

from tests.support import leaks
from tests.support.processes import ManagedProcess


def test_a_thread_a_process_and_the_control_loop_are_seen_while_they_run():
    threads, processes = leaks.running_threads(), leaks.child_processes()
    finish = threading.Event()
    own = threading.Thread(target=finish.wait, name="left-behind")
    loop = threading.Thread(target=finish.wait, name=leaks.CONTROL_THREAD, daemon=True)
    other = threading.Thread(target=finish.wait, name="somebody-else's", daemon=True)
    child = ManagedProcess(["sleep", "60"])
    plain = subprocess.Popen(["sleep", "60"])
    try:
        for thread in (own, loop, other):
            thread.start()
        assert leaks.running_threads() - threads == {own, loop}
        assert leaks.child_processes() - processes == {child.pid, plain.pid}
        said = leaks.describe({own, loop}, {plain.pid})
        assert "left-behind" in said
        assert "a mesh is open" in said
        assert "sleep 60" in said
    finally:
        finish.set()
        for thread in (own, loop, other):
            thread.join()
        plain.kill()
        plain.wait()
        child.kill()
    assert leaks.running_threads() == threads
    assert leaks.child_processes() == processes
