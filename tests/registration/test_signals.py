"""A signal that ends the process, and where in the program it comes."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
from meshlb.registration.signals import SignalDrain
SignalDrain((signal.SIGTERM,), lambda then: False).install()
source = "kill(pid, number); said.append('whole')" + ("; sleep(60)" if sys.argv[2] else "")
said = []
try:
    exec(
        compile(source, sys.argv[1], "exec"),
        {"kill": os.kill, "pid": os.getpid(), "number": signal.SIGTERM, "said": said, "sleep": time.sleep},
    )
    time.sleep(60)
finally:
    print(*said, flush=True)
"""


def run(file: str, *, forever: bool = False) -> tuple[int, str]:
    """The exit status of a program to which SIGTERM comes in the midst of what stands in ``file``, and what it says."""
    command = [sys.executable, "-c", PROGRAM, file, "forever" if forever else ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.stderr == ""
    return done.returncode, done.stdout.strip()


def test_it_ends_the_program_on_the_spot():
    assert run("program.py") == (143, "")


@pytest.mark.parametrize("file", ["<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>"])
def test_the_import_machinery_comes_to_its_end_first(file: str):
    """It drops what is raised in some of its places, and the process would go on."""
    assert run(file) == (143, "whole")


def test_an_import_that_waits_for_ever_is_no_reason_to_live_on():
    assert run("<frozen importlib._bootstrap>", forever=True) == (143, "whole")
