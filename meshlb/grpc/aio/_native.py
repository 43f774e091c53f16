"""``grpc.aio`` as it is at run time, beside its type stubs; and what is asked of grpc's own calls."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

import grpc
import grpc.aio

_aio: Any = grpc.aio

if TYPE_CHECKING:
    # Generic in the stubs, and only in part at run time.
    UnaryUnaryCallABC = grpc.aio.UnaryUnaryCall[Any, Any]
    UnaryStreamCallABC = grpc.aio.UnaryStreamCall[Any, Any]
    StreamUnaryCallABC = grpc.aio.StreamUnaryCall[Any, Any]
    StreamStreamCallABC = grpc.aio.StreamStreamCall[Any, Any]
    UnaryUnaryMultiCallableABC = grpc.aio.UnaryUnaryMultiCallable[Any, Any]
    UnaryStreamMultiCallableABC = grpc.aio.UnaryStreamMultiCallable[Any, Any]
    StreamUnaryMultiCallableABC = grpc.aio.StreamUnaryMultiCallable[Any, Any]
    StreamStreamMultiCallableABC = grpc.aio.StreamStreamMultiCallable[Any, Any]
    UnaryUnaryInterceptor = grpc.aio.UnaryUnaryClientInterceptor[Any, Any]
    UnaryStreamInterceptor = grpc.aio.UnaryStreamClientInterceptor[Any, Any]
    StreamUnaryInterceptor = grpc.aio.StreamUnaryClientInterceptor[Any, Any]
    StreamStreamInterceptor = grpc.aio.StreamStreamClientInterceptor[Any, Any]
else:
    UnaryUnaryCallABC = grpc.aio.UnaryUnaryCall
    UnaryStreamCallABC = grpc.aio.UnaryStreamCall
    StreamUnaryCallABC = grpc.aio.StreamUnaryCall
    StreamStreamCallABC = grpc.aio.StreamStreamCall
    UnaryUnaryMultiCallableABC = grpc.aio.UnaryUnaryMultiCallable
    UnaryStreamMultiCallableABC = grpc.aio.UnaryStreamMultiCallable
    StreamUnaryMultiCallableABC = grpc.aio.StreamUnaryMultiCallable
    StreamStreamMultiCallableABC = grpc.aio.StreamStreamMultiCallable
    UnaryUnaryInterceptor = grpc.aio.UnaryUnaryClientInterceptor
    UnaryStreamInterceptor = grpc.aio.UnaryStreamClientInterceptor
    StreamUnaryInterceptor = grpc.aio.StreamUnaryClientInterceptor
    StreamStreamInterceptor = grpc.aio.StreamStreamClientInterceptor

EOF: Final = _aio.EOF
UsageError: Final[type[Exception]] = _aio.UsageError
InternalError: Final[type[Exception]] = _aio.InternalError
AioRpcError: Final = grpc.aio.AioRpcError

CHANNEL_CLOSED: Final = "Channel is closed."
API_STYLE: Final = "The iterator and read/write APIs may not be mixed on a single RPC."
ALREADY_FINISHED: Final = "RPC already finished."
HALF_CLOSED: Final = 'RPC is half closed after calling "done_writing".'
LOCALLY_CANCELLED: Final = "Locally cancelled by application!"
DEADLINE_EXCEEDED: Final = "Deadline Exceeded"
"""What grpc.aio says in these cases. Ours says the same, since users do match on it."""


def unpatched(name: str) -> Callable[..., grpc.aio.Channel]:
    """``grpc.aio.insecure_channel`` or ``secure_channel`` themselves. An instrumentation puts functions of its own in
    their place, which would make a second span of every attempt, and intercept it at some cost."""
    module = getattr(_aio, "_channel", None)
    original: Callable[..., grpc.aio.Channel] = getattr(module, name, None) or inspect.unwrap(getattr(_aio, name))
    return original


def immediate(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that does not have to wait, such as ``code()`` of a call that has ended.

    In a done-callback the status is already there, but grpc.aio only gives it to coroutines; a Task to fetch it would
    cost more than the rest of the callback. Raises what the coroutine raises; RuntimeError if it would wait.
    """
    try:
        awaited = coroutine.send(None)
    except StopIteration as stopped:
        return stopped.value
    _let_go(coroutine, awaited)
    raise RuntimeError(f"{coroutine!r} had to wait")


def is_immediate(coroutine: Coroutine[Any, Any, Any]) -> bool:
    """Whether the coroutine ends without waiting. It is run that far, and its result is dropped."""
    try:
        awaited = coroutine.send(None)
    except StopIteration:
        return True
    _let_go(coroutine, awaited)
    return False


def _let_go(coroutine: Coroutine[Any, Any, Any], awaited: Any) -> None:
    """End a coroutine that waits. The future it waits for, which others wait for too (an intercepted call has one for
    all that it is asked), has been told to expect a task, and would refuse the next one."""
    coroutine.close()
    if asyncio.isfuture(awaited):
        awaited._asyncio_future_blocking = False
