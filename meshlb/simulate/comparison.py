"""Several policies in several scenarios, side by side, on several processors."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from meshlb.simulate.measurement import Figures
from meshlb.simulate.scenarios import Scenario
from meshlb.simulate.simulation import Setup, simulate

if TYPE_CHECKING:
    from meshlb.balancing import Policy


@dataclass(frozen=True, slots=True)
class Run:
    """One policy in one scenario."""

    scenario: Scenario
    policy: str
    figures: Figures


def compare(
    scenarios: Iterable[Scenario],
    policies: Sequence[str | Policy],
    setup: Setup | None = None,
    *,
    jobs: int = 1,
    done: Callable[[Run], object] | None = None,
) -> list[Run]:
    """Run every policy in every scenario, in the order given.

    ``jobs``: processes that work at it; 1 is this one. What comes out does not depend on it. In other processes a
    policy of the program's own must be of an importable class, and is given as an object. ``done`` is told of each run
    as it ends.

    Raises ConfigError for unknown policies, before anything runs, and for a scenario that needs more servers.
    """
    setup = Setup() if setup is None else setup
    for policy in policies:
        replace(setup.config, policy=policy)
    tasks = [(scenario, policy, setup) for scenario in scenarios for policy in policies]
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        return [_tell(_run(*task), done) for task in tasks]
    # Started anew rather than forked: a fork would share whatever threads and locks the program has.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        futures: list[Future[Run]] = [workers.submit(_run, *task, level=_level()) for task in tasks]
        try:
            for future in as_completed(futures):
                _tell(future.result(), done)
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _run(scenario: Scenario, policy: str | Policy, setup: Setup, *, level: int = logging.NOTSET) -> Run:
    if level:
        logging.getLogger("meshlb").setLevel(level)
    name = replace(setup.config, policy=policy).policy
    return Run(scenario, name if isinstance(name, str) else name.name, simulate(scenario, policy, setup))


def _level() -> int:
    return logging.getLogger("meshlb").level


def _tell(run: Run, done: Callable[[Run], object] | None) -> Run:
    if done is not None:
        done(run)
    return run
