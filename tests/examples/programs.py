"""Run an example as its reader would: as a program of its own that finds Consul in its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from tests.support.consul_agent import ConsulAgent
from tests.support.processes import REPO

EXAMPLES = REPO / "examples"


def environment(consul: ConsulAgent) -> Mapping[str, str]:
    return {**os.environ, "CONSUL_HTTP_ADDR": consul.address, "PYTHONPATH": str(REPO)}


def run(name: str, consul: ConsulAgent) -> list[str]:
    """The lines that an example prints. It must end with status 0, and say nothing on stderr but that an instance is
    out, which a program without logging configured gets to see there."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        env=environment(consul),
        capture_output=True,
        text=True,
        timeout=60,
    )
    noise = [line for line in ended.stderr.splitlines() if " is out for " not in line]
    assert (ended.returncode, noise) == (0, []), f"{name} printed:\n{ended.stdout}{ended.stderr}"
    return ended.stdout.splitlines()
