"""``meshlb simulate``: policies compared in a simulator, as a table, as JSON and as a picture."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from meshlb.cli.simulate_metastable import NAME, run_metastable
from meshlb.errors import ConfigError

if TYPE_CHECKING:
    from meshlb.config import ServiceConfig
    from meshlb.simulate import Figures, Run, Scenario, Setup

DEFAULT_POLICIES: Final = (
    "random",
    "round_robin",
    "least_connections",
    "least_response_time",
    "client_weighted_round_robin",
    "prequal",
)
"""Those that need no knowledge of the servers beforehand and no key."""

_SUSPECTS: Final = {"fail": "failing", "freeze": "frozen", "join": "new", "lose": "lost"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help="which of the scenarios (default: all); or metastable, which runs alone",
    )
    parser.add_argument(
        "--policies",
        default=",".join(DEFAULT_POLICIES),
        metavar="A,B,...",
        help="which policies (default: %(default)s)",
    )
    sizes = parser.add_argument_group("size and load")
    sizes.add_argument("--clients", type=int, default=20, help="client processes (default 20)")
    sizes.add_argument("--servers", type=int, default=24, help="servers (default 24)")
    sizes.add_argument("--cores", type=int, default=4, help="requests that a server works on at once (default 4)")
    sizes.add_argument(
        "--utilisation", type=float, default=0.8, help="work that arrives, as a share of the capacity (default 0.8)"
    )
    sizes.add_argument("--duration", type=float, default=30.0, help="seconds to measure, virtual ones (default 30)")
    sizes.add_argument("--warm-up", type=float, default=15.0, help="virtual seconds before that (default 15)")
    sizes.add_argument(
        "--service-time", type=float, default=0.05, help="mean work of a request, seconds (default 0.05)"
    )
    sizes.add_argument(
        "--distribution", default="lognormal", help="of the service time: lognormal (default), exponential, constant"
    )
    calls = parser.add_argument_group("calls")
    calls.add_argument("--timeout", type=float, default=5.0, help="seconds for a call (default 5)")
    calls.add_argument("--attempt-timeout", type=float, default=1.0, help="seconds for one attempt of it (default 1)")
    calls.add_argument("--no-retry", action="store_true", help="one attempt a call")
    calls.add_argument("--no-breaker", action="store_true", help="no circuit breakers: what the policy does by itself")
    calls.add_argument(
        "--slow-start", type=float, metavar="SECONDS", help="give new servers their full share after so many seconds"
    )
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same figures (default 1)")
    parser.add_argument("--jobs", type=int, default=0, help="processes that work at it (default: one a processor)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture: .svg or .png (extra 'plot')")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run_simulate(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from meshlb.simulate import compare

    if NAME in options.scenarios:
        if len(options.scenarios) > 1:
            return _refuse(f"scenario {NAME!r} runs alone: it is about layers of services, not about policies")
        run_metastable(seed=options.seed, as_json=options.json)
        return 0
    try:
        scenarios = _scenarios(options.scenarios)
        setup = _setup(options)
        policies = _policies(options.policies, setup.config)
        jobs = _jobs(options.jobs)
        _check_plot(options.plot)
    except ConfigError as error:
        return _refuse(str(error))
    # Endpoints that go and come back are what is simulated, not news.
    logging.getLogger("meshlb").setLevel(logging.ERROR)
    progress = _Progress(len(scenarios) * len(policies))
    try:
        runs = compare(scenarios, policies, setup, jobs=jobs, done=progress.step)
    except ConfigError as error:
        return _refuse(str(error))
    finally:
        progress.end()
    print(_json(runs, setup) if options.json else "", end="")
    if not options.json:
        _show(runs, scenarios, setup)
    if options.plot is not None:
        from meshlb.simulate.plot import draw

        try:
            draw(runs, _caption(setup), options.plot)
        except OSError as error:
            return _refuse(f"--plot: {error}")
    return 0


def _refuse(message: str) -> int:
    print(f"meshlb simulate: {message}", file=sys.stderr)
    return 2


# -- the arguments -------------------------------------------------------------------------------------------------


def _scenarios(names: Sequence[str]) -> list[Scenario]:
    from meshlb.simulate import SCENARIOS

    for name in names:
        if name not in SCENARIOS:
            raise ConfigError(f"scenario {name!r} is unknown; known: {', '.join(SCENARIOS)}")
    return [SCENARIOS[name] for name in dict.fromkeys(names or SCENARIOS)]


def _policies(text: str, config: ServiceConfig) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ConfigError("--policies: there is none")
    for name in names:
        replace(config, policy=name)
    return names


def _setup(options: argparse.Namespace) -> Setup:
    from meshlb import Breaker, Retry, ServiceConfig, SlowStart
    from meshlb.simulate import Setup

    config = ServiceConfig(
        timeout=options.timeout,
        retry=None if options.no_retry else Retry(per_try_timeout=options.attempt_timeout),
        breaker=None if options.no_breaker else Breaker(),
        slow_start=None if options.slow_start is None else SlowStart(window=options.slow_start),
    )
    return Setup(
        clients=options.clients,
        servers=options.servers,
        cores=options.cores,
        utilisation=options.utilisation,
        duration=options.duration,
        warm_up=options.warm_up,
        service_time=options.service_time,
        distribution=options.distribution,
        seed=options.seed,
        config=config,
    )


def _jobs(jobs: int) -> int:
    if jobs < 0:
        raise ConfigError(f"--jobs: {jobs} is negative")
    from meshlb.server.cores import available_cores

    return jobs or max(1, int(available_cores()))


def _check_plot(path: Path | None) -> None:
    """Before anything runs: it would be a pity afterwards."""
    if path is None:
        return
    from meshlb.simulate.plot import FORMATS

    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot: {str(path)!r} ends in none of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: the directory {str(path.parent)!r} does not exist")
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not installed; run: pip install 'meshlb[plot]'")


# -- what comes out ------------------------------------------------------------------------------------------------


def _caption(setup: Setup) -> str:
    return (
        f"{setup.clients} clients, {setup.servers} servers with {setup.cores} cores, "
        f"utilisation {setup.utilisation:g}, {setup.distribution} work of {setup.service_time * 1000:g} ms, "
        f"{setup.duration:g} s after {setup.warm_up:g} s, seed {setup.seed}"
    )


def _json(runs: Sequence[Run], setup: Setup) -> str:
    about = {field.name: getattr(setup, field.name) for field in fields(setup) if field.name != "config"}
    rows = [{"scenario": run.scenario.name, "policy": run.policy, **asdict(run.figures)} for run in runs]
    return json.dumps({"setup": about, "runs": rows}, indent=1) + "\n"


def _columns(scenario: Scenario) -> list[str]:
    columns = ["policy", "p50 ms", "p99 ms", "p99.9 ms", "errors", "attempts/call", "load max/mean", "load cv"]
    if scenario.incident is not None:
        columns.append(f"share of {_SUSPECTS[scenario.incident.kind]}")
    return columns


def _row(policy: str, figures: Figures) -> list[str]:
    row = [
        policy,
        *(f"{latency * 1000:.1f}" for latency in (figures.p50, figures.p99, figures.p999)),
        f"{figures.error_rate:.3%}",
        f"{figures.attempts_per_call:.3f}",
        f"{figures.load_max_to_mean:.2f}",
        f"{figures.load_variation:.3f}",
    ]
    if figures.suspect_share is not None:
        row.append(f"{figures.suspect_share:.2f}")
    return row


def _show(runs: Sequence[Run], scenarios: Sequence[Scenario], setup: Setup) -> None:
    pretty = sys.stdout.isatty() and find_spec("rich") is not None
    print(_caption(setup))
    for scenario in scenarios:
        rows = [_row(run.policy, run.figures) for run in runs if run.scenario == scenario]
        title = f"{scenario.name}: {scenario.title}"
        (_print_table if pretty else _print_lines)(title, _columns(scenario), rows)


def _print_lines(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    print(f"\n{title}")
    for row in (columns, *rows):
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(["", first, *rest]).rstrip())


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


class _Progress:
    """How far it is, on a terminal's last line."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._visible = sys.stderr.isatty()

    def step(self, run: Run) -> None:
        self._done += 1
        if self._visible:
            print(f"\r{self._done} of {self._total} runs", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._visible:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
