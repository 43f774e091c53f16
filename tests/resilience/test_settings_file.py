"""Breakers, outlier detection and limits as operators write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshlb import Breaker, ConfigError, Gradient2, Limits, OutlierDetection, ServiceConfig
from meshlb.config_file import read_settings


def services(tmp_path: Path, text: str) -> dict[str, ServiceConfig]:
    file = tmp_path / "meshlb.toml"
    file.write_text(text)
    found: dict[str, ServiceConfig] = read_settings(file)["services"]
    return found


def test_all_of_it(tmp_path: Path) -> None:
    found = services(
        tmp_path,
        """
        [defaults.breaker]
        failure_rate = 0.3
        minimum_calls = 50
        slow_call_duration = 2

        [services.orders]
        breaker = { consecutive_failures = false, window_calls = 200 }
        outlier = true
        limits = { max_concurrency = 10, max_queue = 0, adaptive = { min_limit = 5, initial_limit = 8 } }

        [services.stock]
        outlier = { interval = 5, success_rate_enforcement = 0 }
        limits = false
        """,
    )
    assert found["orders"].breaker == Breaker(
        consecutive_failures=None, failure_rate=0.3, minimum_calls=50, slow_call_duration=2, window_calls=200
    )
    assert found["orders"].outlier == OutlierDetection()
    assert found["orders"].limits == Limits(
        max_concurrency=10, max_queue=0, adaptive=Gradient2(min_limit=5, initial_limit=8)
    )
    assert found["stock"].outlier == OutlierDetection(interval=5, success_rate_enforcement=0)
    assert found["stock"].limits is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "breaker = { failure_rate = 1.5 }",
            r"\[services.orders.breaker\] Breaker.failure_rate: 1.5 must be at most 1",
        ),
        ("breaker = { window = 0 }", r"Breaker.window"),
        ("breaker = { listeners = ['print'] }", r"Breaker.listeners: 'print' is not a function"),
        ("outlier = { intervall = 5 }", r"intervall: unknown; did you mean 'interval'"),
        ("limits = true", r"Limits.max_concurrency: there is no limit at all"),
        ("limits = { adaptive = { smoothing = 2 } }", r"\[services.orders.limits.adaptive\] Gradient2.smoothing"),
    ],
)
def test_mistakes(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        services(tmp_path, f"[services.orders]\n{line}\n")


@pytest.mark.parametrize(("field", "value"), [("outlier", True), ("limits", 5)])
def test_wrong_kinds_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"ServiceConfig\.{field}"):
        ServiceConfig(**{field: value})  # type: ignore[arg-type]
