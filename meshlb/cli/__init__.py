"""The ``meshlb`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from meshlb.cli import simulate

_MISSING = "meshlb {command}: {module} is not installed; run: pip install 'meshlb[cli]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="meshlb", description="Client-side load balancing for gRPC and httpx.")
    parser.add_argument("--version", action="version", version=f"meshlb {metadata.version('meshlb')}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="real servers that are slow, fail and die, and calls that do not notice",
        description="Start HTTP and gRPC servers on loopback, of which one is slow, one fails and one dies and comes "
        "back, call them through meshlb, and show how the traffic moves. Exit status 0 if no call failed.",
    )
    demo.add_argument("--seconds", type=_seconds, default=20.0, help="how long to drive traffic (default 20)")
    demo.add_argument(
        "--consul",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="use a real Consul agent: the one at ADDRESS, or, without ADDRESS, one that the demo starts itself "
        "($CONSUL_BIN or consul on PATH); otherwise a registry within the process",
    )
    demo.add_argument("--policy", default="least_response_time", help="balancing policy (default least_response_time)")
    demo.add_argument("--plain", action="store_true", help="print lines instead of a live table")
    simulation = commands.add_parser(
        "simulate",
        help="compare balancing policies in a simulator",
        description="Run the real policies with many clients and servers in virtual time, and show latencies, errors "
        "and the spread of the load side by side.",
    )
    simulate.add_arguments(simulation)
    options = parser.parse_args(arguments)
    if options.command == "simulate":
        return simulate.run_simulate(options)
    try:
        from meshlb.cli.demo import run_demo
    except ModuleNotFoundError as error:
        print(_MISSING.format(command=options.command, module=error.name), file=sys.stderr)
        return 2
    return run_demo(seconds=options.seconds, consul=options.consul, policy=options.policy, plain=options.plain)


def _seconds(text: str) -> float:
    value = float(text)
    if not 3 <= value <= 3600:
        raise argparse.ArgumentTypeError("takes 3 to 3600 seconds")
    return value
