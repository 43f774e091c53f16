"""How calls begin that return before anything has come back: futures, and all with a stream of responses."""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

from meshlb.grpc._driver import Driver
from meshlb.grpc._future import MeshCall, first_attempt_ended
from meshlb.grpc._method import Method
from meshlb.grpc._requests import RequestSource, refused
from meshlb.grpc._sessions import context_and_metadata
from meshlb.model import NO_CONTEXT
from meshlb.serving import surroundings

if TYPE_CHECKING:
    from meshlb.node import Lease


class Beginning(Method):
    """Makes the first attempt straight away where nothing stands against it; a driver comes with the first failure."""

    call_class: type[MeshCall]
    """What the caller gets."""

    request_streams: bool = False
    """Whether the request is a stream."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # On the object, where Python finds them faster than on its class.
        self.call_class, self.streams, self.request_streams = self.call_class, self.streams, self.request_streams

    def begin(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Any = None,
        credentials: Any = None,
        wait_for_ready: bool | None = None,
        compression: Any = None,
    ) -> Any:
        """Start a call; ``request`` is an iterator if ``request_streams``."""
        source: RequestSource | None = None
        serializer = self.serializer
        if self.request_streams:
            source = RequestSource(request, serializer)
        elif serializer is not None:
            try:
                request = serializer(request)
            except Exception:
                request = refused()
        if metadata is not None and type(metadata) is not tuple:
            metadata = tuple(metadata)  # it may be any iterable, and is read more than once
        lease: Lease | None = None
        failure: BaseException | None = None
        if self._is_plain and not wait_for_ready and (timeout is None or timeout > 0) and surroundings() is None:
            cluster, telemetry = self._cluster, self._telemetry
            context, sent = NO_CONTEXT, metadata
            if self._reads_calls:
                context, sent = context_and_metadata(cluster, self._method, metadata)
            view = cluster.view  # from here to the budget: Cluster.try_start, without what a plain call has no need of
            node = view.picker.pick(context)
            if node is None or (lease := node.begin()) is None:
                lease = cluster.try_start_on(node, view, context)
            elif (budget := cluster.budget) is not None:
                if lease.started < budget.until:
                    note = budget.note
                    note()
                else:
                    budget.deposit(lease.started)
            current = telemetry.current
            if lease is not None and lease.started < telemetry.quiet_until and not current():
                # The fast path: what a call needs that goes well, and no call of ours that can be done without.
                try:
                    known = self._raw_natives.get(lease.node)
                    if known is None or known[0].closed or known[0].unreachable:
                        native = self.raw_native(lease.node)
                    else:
                        native = known[1]
                    inner = (native if self.streams else native.future)(
                        request if source is None else source.attempt(), timeout, sent, credentials, None, compression
                    )
                except BaseException as error:
                    failure = error
                else:
                    new = self.call_class
                    call = new()
                    call._method = self
                    call._inner = inner
                    call._lease = lease
                    call._source = source
                    call._asked = (request, timeout, sent, credentials, compression, context)
                    call._variables = copy_context()
                    call._awaited = call._over = False
                    call._driver = call._reader = None
                    # Weak: dropping the last reference to the call cancels it, as with gRPC's own.
                    ended = partial(first_attempt_ended, ref(call), lease)
                    if not inner.add_callback(ended):
                        ended()
                    return call
        try:
            invocation = self.invocation(request, source, timeout, metadata, credentials, wait_for_ready, compression)
            started = self._cluster.clock() if lease is None else lease.started
            driver = Driver(self, invocation, started, copy_context())
            driver.begin(lease, failure)
            return self.call_class.driven_by(driver)
        finally:
            failure = None  # or it would hold this frame, which holds it
