"""``meshlb simulate metastable``: an overload of the last of three layers, with and without what ends it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from meshlb.simulate.metastable import LayersFigures, LayersSetup, Protection

NAME: Final = "metastable"

_COLUMNS: Final = ("", "load", "worst 10 s", "answered before", "during", "at the end", "recovered after")


def run_metastable(*, seed: int, as_json: bool) -> None:
    """Run all protections through the same overload, and print what came of it."""
    from meshlb.simulate.metastable import PROTECTIONS, LayersSetup, simulate_layers

    logging.getLogger("meshlb").setLevel(logging.ERROR)  # endpoints that go and come back are what is simulated
    setup = LayersSetup(seed=seed)
    runs = []
    for protection in PROTECTIONS:
        figures = simulate_layers(protection, setup)
        runs.append((protection, figures))
        if not as_json and len(runs) == 1:
            _print_about(setup, PROTECTIONS)
        if not as_json:
            _print_row(protection, figures)
    if as_json:
        rows = [{"protection": protection.name, **asdict(figures)} for protection, figures in runs]
        print(json.dumps({"setup": asdict(setup), "runs": rows}, indent=1))


def _print_about(setup: LayersSetup, protections: Sequence[Protection]) -> None:
    floor = setup.floor(protections[0].config.retry)
    print(
        f"{NAME}: clients call A, A calls B, B calls C; {setup.processes} process(es) each, {setup.servers} "
        f"servers of C\n"
        f"C can do {setup.capacity:g} requests/s and gets {setup.normal:g} of that, {setup.overload:g} for "
        f"{setup.during:g} s, then {setup.normal:g} again for {setup.after:g} s; seed {setup.seed}\n"
        f"load: attempts on C by calls of the clients; {floor:.3f} of it is the budgets' floor of "
        "10 retries/s a process\n"
    )
    for protection in protections:
        print(f"  {protection.name:17} {protection.title}")
    print("\n" + "".join(column.rjust(17) for column in _COLUMNS))


def _print_row(protection: Protection, figures: LayersFigures) -> None:
    cells = (
        protection.name,
        f"{figures.load:.2f}",
        f"{figures.worst_load:.2f}",
        f"{figures.answered_before:.1%}",
        f"{figures.answered_during:.1%}",
        f"{figures.answered_at_end:.1%}",
        "never" if figures.recovery is None else f"{figures.recovery:.0f} s",
    )
    print("".join(cell.rjust(17) for cell in cells), flush=True)
