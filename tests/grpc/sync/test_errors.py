"""Errors of both families."""

from __future__ import annotations

import copy
import pickle

import grpc
import pytest

from meshlb import errors
from meshlb.grpc import _errors as ours
from meshlb.grpc._idempotency import is_idempotent
from meshlb.resilience import Retry

Code = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NoEndpoints, Code.UNAVAILABLE),
        (errors.CircuitOpen, Code.UNAVAILABLE),
        (errors.DiscoveryError, Code.UNAVAILABLE),
        (errors.DiscoveryTimeout, Code.UNAVAILABLE),
        (errors.DeadlineExceeded, Code.DEADLINE_EXCEEDED),
        (errors.MeshClosed, Code.CANCELLED),
    ],
)
def test_both_families(error: type[errors.MeshError], code: grpc.StatusCode) -> None:
    made = ours.as_rpc_error(error("what happened"))
    for same in (made, pickle.loads(pickle.dumps(made)), copy.copy(made), ours.as_rpc_error(made)):
        assert isinstance(same, error)
        for family in (errors.MeshError, grpc.RpcError, grpc.Call, grpc.Future):
            assert isinstance(same, family)
        assert (same.code(), same.details(), str(same)) == (code, "what happened", "what happened")
        assert (same.initial_metadata(), same.trailing_metadata()) == ((), ())
        assert same.exception() is same
        assert same.traceback() is not None
        assert (same.done(), same.running(), same.cancelled(), same.cancel(), same.is_active()) == (
            True, False, False, False, False,
        )  # fmt: skip
        assert (same.time_remaining(), same.add_callback(lambda: None)) == (None, False)
        with pytest.raises(error):
            same.result()
        told: list[object] = []
        same.add_done_callback(told.append)
        assert told == [same]
        assert "what happened" in same.debug_error_string()
        assert error.__name__ in repr(same)


def test_circuit_open_is_no_endpoints() -> None:
    assert issubclass(ours.CircuitOpen, ours.NoEndpoints)
    assert issubclass(ours.DiscoveryTimeout, TimeoutError)
    assert issubclass(ours.MeshClosed, RuntimeError)


def test_anything_else() -> None:
    cause = ZeroDivisionError("x")
    error = ours.as_rpc_error(cause)
    assert error.code() is Code.INTERNAL
    assert error.__cause__ is cause
    assert "ZeroDivisionError" in error.details()


@pytest.mark.parametrize(
    ("method", "patterns", "idempotent"),
    [
        ("/meshlb.demo.v1.Echo/Say", (), True),  # NO_SIDE_EFFECTS
        ("/meshlb.demo.v1.Echo/Put", (), False),
        ("/meshlb.demo.v1.Echo/Put", ("/meshlb.demo.v1.Echo/Put",), True),
        ("/meshlb.demo.v1.Echo/Put", ("meshlb.demo.v1.Echo/*",), True),
        ("/meshlb.demo.v1.Echo/Put", ("/meshlb.demo.v1.Echo/P[aeiou]t", "POST"), True),
        ("/meshlb.demo.v1.Echo/Put", ("/meshlb.demo.v1.Echo/Say", "Put"), False),
        ("/meshlb.demo.v1.Echo/Unknown", (), False),
        ("/nobody.Knows/Me", (), False),
        ("odd", (), False),
    ],
)
def test_idempotency(method: str, patterns: tuple[str, ...], idempotent: bool) -> None:
    assert is_idempotent(method, Retry(idempotent_methods=patterns)) is idempotent
    assert not is_idempotent(method, None)
