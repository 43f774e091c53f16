"""Networks of our own, to be broken: a namespace behind a pair of virtual interfaces. Needs root, ip and iptables.

with Network() as network:
    backend = http_backend(host=network.host, within=network.prefix)
    network.drop()                             # a black hole: nothing is answered, not even a SYN
    network.lose(0.3); network.reject(); network.heal()
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess

_numbers = itertools.count(1)


class Network:
    """One host, as seen from here: ``host`` is its address, ``prefix`` what a command is run with to run there."""

    def __init__(self) -> None:
        self.name = f"meshlb-{os.getpid()}-{next(_numbers)}"
        # A /30 of 10.64.0.0/10 for each: by chance, since the workers of a test run know nothing of each other.
        base = random.SystemRandom().randrange(2**20) * 4
        self._here, self.host = (_address(base + offset) for offset in (1, 2))
        self._link = f"m{os.getpid() % 100_000}x{self.name.rpartition('-')[2]}"  # 15 characters at most

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    def __enter__(self) -> Network:
        _run("ip", "netns", "add", self.name)
        try:
            _run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name)
            _run("ip", "address", "add", f"{self._here}/30", "dev", self._link)
            _run("ip", "link", "set", self._link, "up")
            self._inside("ip", "address", "add", f"{self.host}/30", "dev", "eth0")
            self._inside("ip", "link", "set", "eth0", "up")
            self._inside("ip", "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        subprocess.run(["ip", "link", "delete", self._link], capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)

    def drop(self) -> None:
        """Answer nothing, on standing connections either."""
        self._inside("iptables", "-I", "INPUT", "-j", "DROP")

    def lose(self, share: float) -> None:
        """Lose this share of the packets that come in."""
        statistic = ("-m", "statistic", "--mode", "random", "--probability", str(share))
        self._inside("iptables", "-I", "INPUT", *statistic, "-j", "DROP")

    def reject(self) -> None:
        """Answer every packet with a reset."""
        self._inside("iptables", "-I", "INPUT", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")

    def unplug(self) -> None:
        """Take the link down."""
        self._inside("ip", "link", "set", "eth0", "down")

    def heal(self) -> None:
        """End all of that."""
        self._inside("iptables", "-F", "INPUT")
        self._inside("ip", "link", "set", "eth0", "up")

    def _inside(self, *command: str) -> None:
        _run(*self.prefix, *command)


def _address(offset: int) -> str:
    return f"10.{64 + (offset >> 16)}.{offset >> 8 & 255}.{offset & 255}"


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr.strip() or ended.returncode}")
