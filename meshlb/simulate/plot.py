"""The picture of a comparison: a row a scenario, a line a policy. Needs matplotlib (the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from meshlb.simulate.comparison import Run

FORMATS: Final = (".svg", ".png")

# Okabe and Ito's colours, which the colour-blind can tell apart, and strokes for those who see none.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_STROKES: Final = ("-", "--", "-.", ":")

_TICKS: Final = ((0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %"))

_SETTINGS: Final[dict[Any, Any]] = {
    "font.size": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",  # text as text: a tenth of the size
    "svg.hashsalt": "meshlb",  # the same run, the same file
}


def draw(runs: Sequence[Run], caption: str, path: Path) -> None:
    """Write the picture, SVG or PNG by the name's end. Raises ModuleNotFoundError without matplotlib, OSError."""
    import matplotlib
    from matplotlib.figure import Figure

    scenarios = list(dict.fromkeys(run.scenario for run in runs))
    policies = list(dict.fromkeys(run.policy for run in runs))
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(9.0, 2.1 * len(scenarios) + 1.0), layout="constrained")
        rows: Any = figure.subplots(len(scenarios), 2, squeeze=False)
        for scenario, (left, right) in zip(scenarios, rows, strict=True):
            for run in runs:
                if run.scenario == scenario:
                    _draw_run(left, right, run, policies.index(run.policy))
            _label(left, right, scenario.name, scenario.title)
        rows[-1][0].set_xlabel("share of calls that are faster")
        rows[-1][1].set_xlabel("seconds since the measurement began")
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(policies), 3), frameon=False)
        figure.supxlabel(caption, fontsize=7.0)
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(path, format=path.suffix[1:], dpi=120, metadata=metadata)


def _draw_run(left: Axes, right: Axes, run: Run, number: int) -> None:
    style: dict[str, Any] = {
        "color": _COLOURS[number % len(_COLOURS)],
        "linestyle": _STROKES[number // len(_COLOURS) % len(_STROKES)],
        "linewidth": 1.3,
        "label": run.policy,
    }
    tail = run.figures.tail
    left.plot([1.0 / (1.0 - q) for q, _ in tail], [latency * 1000.0 for _, latency in tail], **style)
    over_time = run.figures.over_time
    right.plot([at for at, _ in over_time], [latency * 1000.0 for _, latency in over_time], **style)


def _label(left: Axes, right: Axes, name: str, title: str) -> None:
    left.set_title(f"{name}: {title}", loc="left", fontsize=8.0)
    right.set_title("99th percentile over time", loc="left", fontsize=8.0)
    left.set_ylabel("latency in ms")
    left.set_xscale("log")
    left.set_xticks([1.0 / (1.0 - q) for q, _ in _TICKS], [text for _, text in _TICKS])
    left.minorticks_off()
    for axes in (left, right):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
