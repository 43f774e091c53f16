from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from meshlb.cli import main
from tests.cli.command import meshlb, meshlb_in_terminal

SMALL = [
    "--clients",
    "3",
    "--servers",
    "4",
    "--duration",
    "2",
    "--warm-up",
    "1",
    "--policies",
    "random,least_connections",
]


def test_plain_text_side_by_side():
    ended = meshlb("simulate", "uniform", "failing_host", *SMALL)
    assert ended.status == 0, ended.err
    assert ended.err == ""
    caption, *lines = ended.out.splitlines()
    assert caption.startswith(
        "3 clients, 4 servers with 4 cores, utilisation 0.8, lognormal work of 50 ms, 2 s after 1 s"
    )
    uniform = lines.index("uniform: all servers alike")
    columns = re.split(r"\s{2,}", lines[uniform + 1].strip())
    assert columns == [
        "policy", "p50 ms", "p99 ms", "p99.9 ms", "errors", "attempts/call", "load max/mean", "load cv",
    ]  # fmt: skip
    for line, policy in zip(lines[uniform + 2 : uniform + 4], ("random", "least_connections"), strict=True):
        name, *figures = line.split()
        assert name == policy
        assert len(figures) == 7
        assert float(figures[0]) < float(figures[1]) <= float(figures[2])
    assert "share of failing" in ended.out


def test_a_table_in_a_terminal():
    ended = meshlb_in_terminal("simulate", "uniform", *SMALL)
    assert ended.status == 0, ended.out
    assert "uniform: all servers alike" in ended.out
    assert "┃" in ended.out
    assert "2 of 2 runs" in ended.out


def test_json_is_the_same_every_time_and_has_everything():
    first = meshlb("simulate", "antagonists", *SMALL, "--json", "--seed", "7")
    second = meshlb("simulate", "antagonists", *SMALL, "--json", "--seed", "7", "--jobs", "1")
    assert first.status == 0, first.err
    assert first.out == second.out
    found = json.loads(first.out)
    assert found["setup"]["clients"] == 3
    assert found["setup"]["seed"] == 7
    assert [(run["scenario"], run["policy"]) for run in found["runs"]] == [
        ("antagonists", "random"), ("antagonists", "least_connections"),
    ]  # fmt: skip
    assert found["runs"][0]["calls"] > 100
    assert found["runs"][0]["suspect_share"] is None


def test_all_scenarios_without_arguments(capsys: pytest.CaptureFixture[str]):
    assert main(["simulate", *SMALL, "--jobs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(dict.fromkeys(run["scenario"] for run in found["runs"])) == [
        "uniform", "heterogeneous", "antagonists", "failing_host", "frozen_host", "cold_start", "zone_loss",
    ]  # fmt: skip


def test_the_settings_of_calls_reach_them(capsys: pytest.CaptureFixture[str]):
    options = ["simulate", "frozen_host", *SMALL, "--jobs", "1", "--json"]
    assert main([*options, "--no-retry", "--no-breaker", "--timeout", "0.5"]) == 0
    alone = json.loads(capsys.readouterr().out)["runs"][0]
    assert alone["attempts_per_call"] == 1.0
    assert alone["error_rate"] > 0.1
    assert max(latency for _, latency in alone["tail"]) == pytest.approx(0.5)
    assert main([*options, "--attempt-timeout", "0.3"]) == 0
    retried = json.loads(capsys.readouterr().out)["runs"][0]
    assert retried["attempts_per_call"] > 1.0
    assert retried["error_rate"] < alone["error_rate"]


def test_slow_start_spares_a_cold_server(capsys: pytest.CaptureFixture[str]):
    shares = []
    for more in ([], ["--slow-start", "10"]):
        assert main(["simulate", "cold_start", *SMALL, "--duration", "8", "--json", "--jobs", "1", *more]) == 0
        shares.append(json.loads(capsys.readouterr().out)["runs"][0]["suspect_share"])
    assert shares[1] < 0.6 * shares[0]


@pytest.mark.parametrize("name", ["picture.svg", "picture.png"])
def test_the_picture(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / name
    assert main(["simulate", "uniform", "frozen_host", *SMALL, "--jobs", "1", "--plot", str(path)]) == 0
    content = path.read_bytes()
    if name.endswith(".svg"):
        text = content.decode()
        for word in ("least_connections", "random", "frozen_host", "99.9 %", "3 clients, 4 servers"):
            assert word in text
        again = tmp_path / "again.svg"
        assert main(["simulate", "uniform", "frozen_host", *SMALL, "--jobs", "1", "--plot", str(again)]) == 0
        assert again.read_bytes() == content
    else:
        assert content.startswith(b"\x89PNG")


def test_the_picture_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", "uniform", *SMALL, "--plot", str(tmp_path / "picture.svg")]) == 2
    said = capsys.readouterr()
    assert "pip install 'meshlb[plot]'" in said.err
    assert said.out == ""


def test_matplotlib_is_not_needed_otherwise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", "uniform", *SMALL, "--jobs", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unifrom"], "scenario 'unifrom' is unknown; known: uniform, heterogeneous,"),
        (["--policies", "least_conections"], "policy 'least_conections' is unknown; did you mean 'least_connections'?"),
        (["--policies", ","], "--policies: there is none"),
        (["--clients", "0"], "Setup.clients: 0 must be at least 1"),
        (["--utilisation", "-1"], "Setup.utilisation: -1.0 must be above 0"),
        (["--utilisation", "nan"], "Setup.utilisation: nan is not a finite number"),
        (["--distribution", "pareto"], "Setup.distribution: 'pareto' is not one of lognormal, exponential, constant"),
        (["--timeout", "0"], "ServiceConfig.timeout: 0.0 must be above 0"),
        (["--attempt-timeout", "-1"], "Retry.per_try_timeout: -1.0 must be above 0"),
        (["--jobs", "-1"], "--jobs: -1 is negative"),
        (["--plot", "picture.gif"], "--plot: 'picture.gif' ends in none of .svg, .png"),
        (["--plot", "no/such/place.svg"], "--plot: the directory 'no/such' does not exist"),
        (["failing_host", "--servers", "1"], "Setup.servers: 1 are too few for the scenario failing_host"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["simulate", "--jobs", "1", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"meshlb simulate: {message}")
    assert said.out == ""
