"""Programs that fork, run on their own: what is tested is a whole process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PRELUDE = """
import gc, os, signal, sys, threading, time
import meshlb
from meshlb import Endpoint, Breaker, Mesh, ServiceConfig, control
from meshlb.discovery import StaticDiscovery
from meshlb.model import OK

signal.alarm(50)  # a deadlock ends with a failure, not with the test run
ADDRESSES = [f"127.0.0.{number}:80" for number in range(1, 5)]

def in_child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(20)
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    return pid

def end(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the child ended with {code}"

def eventually(predicate):
    deadline = time.monotonic() + 15
    while not predicate():
        assert time.monotonic() < deadline, "never became true"
        time.sleep(0.01)

def adds_up(cluster):
    for node in cluster.nodes:
        ended = node.successes + node.failures + node.overloads + node.ignored
        assert node.calls == ended + node.in_flight and node.in_flight >= 0, (node, node.calls, ended)
"""


def run(program: str, *options: str) -> None:
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(program) + "\nprint('done')\n"
    done = subprocess.run([sys.executable, *options, "-c", source], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", ""), done.stdout + done.stderr
