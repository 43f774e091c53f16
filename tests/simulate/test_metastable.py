"""Overload that retries would keep alive, and what ends it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from meshlb import ConfigError
from meshlb.cli import main
from meshlb.cli.simulate_metastable import NAME
from meshlb.simulate.metastable import PROTECTIONS, LayersSetup, simulate_layers

BY_NAME = {protection.name: protection for protection in PROTECTIONS}

SETUP = LayersSetup(before=10, during=15, after=15, servers=10)


def test_with_defaults_the_extra_load_is_bounded_and_the_system_recovers():
    defaults = BY_NAME["defaults"]
    figures = simulate_layers(defaults, SETUP)
    assert figures.answered_before > 0.99
    assert figures.load <= 1.2 + SETUP.floor(defaults.config.retry)
    assert figures.recovery is not None and figures.recovery <= 8
    assert figures.answered_at_end > 0.99


def test_short_timeouts_of_attempts_do_not_keep_half_of_the_servers_out():
    """All of them time out, and are taken for broken ones, until so many are that it cannot be their fault."""
    figures = simulate_layers(BY_NAME["attempt_timeouts"], replace(SETUP, after=25))
    assert figures.answered_during < 0.5, "all the work is wasted, so there is something to recover from"
    assert figures.recovery is not None
    assert figures.answered_at_end > 0.99


def test_the_same_seed_gives_the_same_figures():
    small = replace(SETUP, servers=3, during=10, after=10)
    assert simulate_layers(BY_NAME["defaults"], small) == simulate_layers(BY_NAME["defaults"], small)
    assert simulate_layers(BY_NAME["defaults"], small) != simulate_layers(BY_NAME["defaults"], replace(small, seed=2))


def test_naive_retries_multiply_and_keep_the_overload_alive():
    figures = simulate_layers(BY_NAME["naive"], replace(SETUP, servers=2, during=10, after=15))
    assert figures.answered_before > 0.99
    assert figures.load > 9, "three attempts in each of three layers: up to 27"
    assert figures.recovery is None
    assert figures.answered_at_end < 0.1


def test_without_a_word_between_the_layers_budgets_multiply():
    setup = replace(SETUP, servers=6)
    told, untold = (simulate_layers(BY_NAME[name], setup).load for name in ("attempt_timeouts", "untold"))
    assert untold > 1.2 * told


def test_wrong_sizes():
    with pytest.raises(ConfigError, match=r"LayersSetup\.servers"):
        LayersSetup(servers=0)
    with pytest.raises(ConfigError, match=r"LayersSetup\.before"):
        LayersSetup(before=1)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    small = replace(SETUP, servers=1, during=10, after=10)
    monkeypatch.setattr("meshlb.simulate.metastable.LayersSetup", lambda seed: replace(small, seed=seed))
    monkeypatch.setattr("meshlb.simulate.metastable.PROTECTIONS", PROTECTIONS[:1])
    assert main(["simulate", NAME, "--json", "--seed", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["setup"]["seed"] == 3
    assert [run["protection"] for run in printed["runs"]] == ["defaults"]
    assert main(["simulate", NAME]) == 0
    assert "recovered after" in capsys.readouterr().out
    assert main(["simulate", NAME, "uniform"]) == 2
