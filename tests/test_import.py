"""What `import meshlb` costs: nothing that only some of its users need."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from importlib import import_module

import pytest

from meshlb import Failover, HttpCheck, OutlierDetection, SlowStart

# grpc and httpx belong to the adapters, consul and asyncio to the control loop, tenacity to the first retry,
# OpenTelemetry to the first service, the SDK to the program, xxhash to one policy.
NOT_AT_IMPORT = [
    *("grpc", "httpx", "httpx2", "httpcore", "consul", "requests", "asyncio", "anyio", "trio", "tenacity", "xxhash"),
    *("opentelemetry", "rich", "ssl", "socket", "concurrent.futures", "tomllib", "ctypes", "statistics"),
    # What is off unless a service asks for it: each module makes option classes, which takes milliseconds.
    *(f"meshlb.topology.{name}" for name in ("failover", "nearest", "slow_start", "subset_options", "tiers")),
    *(f"meshlb.resilience.{name}" for name in ("gradient", "limits", "outlier", "throttle", "service_config")),
    *("meshlb.health.checks", "meshlb.health.options", "meshlb.health.state", "meshlb.tiering", "meshlb.config_file"),
    *("meshlb.place", "meshlb.whereabouts"),
    *("meshlb.key_sources", "meshlb.sessions", "base64"),
]
LAZY = ["meshlb", "meshlb.balancing", "meshlb.health", "meshlb.resilience", "meshlb.topology"]


def test_import_loads_no_adapter_no_event_loop_and_no_sdk():
    program = f"import json, sys, meshlb; print(json.dumps([m for m in {NOT_AT_IMPORT!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


@pytest.mark.parametrize("package", LAZY)
def test_what_is_imported_later_is_there_all_the_same(package: str):
    module = import_module(package)
    assert dir(module) == sorted(module.__all__), "as editors complete it"
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'Nothing'"):
        _ = module.Nothing
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        exec(f"from {package} import Nothing")


@pytest.mark.parametrize("option", [Failover(by="zone"), HttpCheck(path="/up"), OutlierDetection(), SlowStart()])
def test_options_that_are_imported_later_are_pickled_as_ever(option: object):
    assert pickle.loads(pickle.dumps(option)) == option


def test_settings_are_checked_against_what_is_imported_for_it():
    program = """
import meshlb, sys
assert "meshlb.topology.failover" not in sys.modules
for field in ("slow_start", "subset", "health_check", "failover", "zones", "outlier", "limits", "throttling"):
    try:
        meshlb.ServiceConfig(**{field: 1})
    except meshlb.ConfigError as error:
        print(str(error).partition(":")[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    expected = ["slow_start", "subset", "health_check", "failover", "zones", "outlier", "limits", "throttling"]
    assert done.stdout.split() == [f"ServiceConfig.{field}" for field in expected]
