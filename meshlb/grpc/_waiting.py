"""Waiting for an endpoint without blocking a thread: on the control loop, until there is a lease or an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from meshlb.errors import DeadlineExceeded, MeshError
from meshlb.grpc._errors import LocalRpcError, as_rpc_error
from meshlb.node import NOT_STARTED

if TYPE_CHECKING:
    from meshlb.cluster import Cluster
    from meshlb.mesh import Mesh
    from meshlb.model import CallContext
    from meshlb.node import Lease

LeaseCallback = Callable[["Lease | None", "LocalRpcError | None"], object]


class LeaseRequest:
    """Calls back once, with a lease or with the error that says why there is none, unless it is cancelled first."""

    __slots__ = ("_callback", "_cancelled", "_cluster", "_context", "_mesh", "_patient", "_task", "_timeout")

    def __init__(
        self,
        mesh: Mesh,
        cluster: Cluster,
        context: CallContext,
        *,
        timeout: float | None,
        patient: bool,
        callback: LeaseCallback,
    ) -> None:
        self._mesh = mesh
        self._cluster = cluster
        self._context = context
        self._timeout = timeout
        self._patient = patient
        self._callback = callback
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None
        if not mesh.call_soon(self._begin):
            callback(None, as_rpc_error(cluster.unavailable()))

    def cancel(self) -> None:
        """Call back no more. Takes no lock, so it is safe in a finaliser."""
        self._cancelled = True
        self._mesh.call_soon(self._stop)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        if not self._cancelled:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="meshlb-grpc-lease")

    async def _run(self) -> None:
        began = self._cluster.clock()
        lease: Lease | None = None
        error: LocalRpcError | None = None
        try:
            lease = await self._cluster.start_async(self._context, timeout=self._timeout, patient=self._patient)
        except MeshError as failure:
            passed = self._timeout is not None and self._cluster.clock() - began >= self._timeout
            error = as_rpc_error(DeadlineExceeded(f"deadline exceeded: {failure}") if passed else failure)
        except asyncio.CancelledError:
            if not self._cancelled:  # the control loop ends under us
                self._callback(None, as_rpc_error(self._cluster.unavailable()))
            raise
        except BaseException as failure:  # a policy's bug: the caller must hear of it, not hang
            error = as_rpc_error(failure)
        finally:
            self._task = None  # a cancelled task holds this frame, which holds it
        if not self._cancelled:
            self._callback(lease, error)
        elif lease is not None:
            lease.close(NOT_STARTED)


class Pause:
    """Calls back after some seconds on the control loop, or at once if that ends; never if it is cancelled first."""

    __slots__ = ("_callback", "_cancelled", "_delay", "_mesh", "_task")

    def __init__(self, mesh: Mesh, delay: float, callback: Callable[[], Any]) -> None:
        self._mesh = mesh
        self._delay = delay
        self._callback = callback
        self._cancelled = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> bool:
        """False if there is no control loop to wait on."""
        return self._mesh.call_soon(self._begin)

    def cancel(self) -> None:
        """Call back no more. Takes no lock, so it is safe in a finaliser."""
        self._cancelled = True
        self._mesh.call_soon(self._stop)

    def _stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _begin(self) -> None:
        if self._cancelled:
            return
        if self._delay <= 0:
            self._callback()
        else:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="meshlb-grpc-pause")

    async def _run(self) -> None:
        try:
            await asyncio.sleep(self._delay)
        finally:
            self._task = None  # a cancelled task holds this frame, which holds it
            # Cancelled, but not by us: the control loop ends, and the call has to be told rather than left waiting.
            if not self._cancelled:
                self._callback()
