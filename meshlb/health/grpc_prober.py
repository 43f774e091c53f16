"""gRPC checks: ``grpc.health.v1.Health``, asked with gRPC's synchronous stack.

Not with ``grpc.aio``, although there is an event loop: all loops of a process share its one poller, which reports what
comes too late for a closed loop to whichever other loop of the program runs. A future costs a short-lived thread, which
at the agreed rate of checks is nothing.

The two messages are a string and an enum, written and read here, so that no generated code is needed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc

from meshlb.health.checks import GrpcCheck
from meshlb.health.prober import BODY_LIMIT, Push, excerpt, server_name
from meshlb.health.state import CheckResult
from meshlb.model import LOCAL_ERRNOS, Endpoint, Identity

CHECK: Final = "/grpc.health.v1.Health/Check"
WATCH: Final = "/grpc.health.v1.Health/Watch"

_SERVING: Final = 1
_STATUSES: Final = {0: "UNKNOWN", _SERVING: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}

_BROKEN_OFF: Final = CheckResult(None, "broken off, since this process forks")

_LOCAL: Final = tuple(os.strerror(number) for number in LOCAL_ERRNOS)
"""What gRPC says when this process has run out of something; it has no other sign of it."""


_FORK_PATIENCE: Final = 1.0
"""Seconds that a fork waits at most for gRPC's threads to end that serve checks."""

_probers: weakref.WeakSet[GrpcProber] = weakref.WeakSet()
_forks = 0
"""How many forks this process has seen coming."""
_forking = False

_idle_channels: Final[list[grpc.Channel]] = []
"""Never connected and never closed: as long as one channel is open, gRPC does not shut itself down. It does that on a
thread of its own, with the lock held that every new channel takes. A process forked meanwhile inherits it locked."""
_stays_up = False
"""Whether one of them is this process's; gRPC may close a parent's in its children."""
_sees_forks = False
"""Whether forks are announced to this module."""


class GrpcProber:
    """A channel for each check, so that none fails for gRPC's own pause between two attempts to connect; and one for
    each Watch."""

    def __init__(self, options: GrpcCheck, service: str, push: Push) -> None:
        self._options = options
        self.label = f"gRPC health of {options.service!r}" if options.service else "gRPC health"
        self._push = push
        self._request = health_request(options.service)
        self._channels: set[grpc.Channel] = set()
        """All that are open."""
        self._running: set[Any] = set()
        """All calls that are not done."""
        self._threads: set[threading.Thread] = set()
        """Those that serve or have served calls; gRPC has a short-lived one for each channel in use."""
        self._loop_thread = threading.current_thread()
        self._watches: dict[Identity, _Watch] = {}
        self._unwatchable: set[Identity] = set()
        """Their servers have no Watch. Asked again after a failed check: it may be another server by then."""
        tls = options.tls
        self._credentials: grpc.ChannelCredentials | None = None
        if tls is not None:
            root, cert = _read(tls.ca_file), _read(tls.cert)
            self._credentials = grpc.ssl_channel_credentials(root, cert and (_read(tls.key) or cert), cert)
        self._channel_options = (
            ("grpc.use_local_subchannel_pool", 1),  # closing it has to close the connection
            ("grpc.enable_http_proxy", 0),
            ("grpc.service_config_disable_resolution", 1),
            ("grpc.default_authority", service if tls is None else server_name(tls, service)),
            ("grpc.max_receive_message_length", BODY_LIMIT),
        )
        _probers.add(self)
        _keep_up()

    async def check(self, endpoint: Endpoint) -> CheckResult:
        forks = _forks
        if _forking:
            return _BROKEN_OFF
        channel = self._open(endpoint)
        try:
            call: Any = channel.unary_unary(CHECK, None, None).future(self._request, timeout=self._options.timeout)
            self._track(call)
            await _ended(call)
            result = _judge(call)
        except ValueError:  # what gRPC says of a closed channel
            result = _BROKEN_OFF
        finally:
            self._close(channel)
        if forks != _forks:
            return _BROKEN_OFF
        if self._options.watch:
            self._watch(endpoint, result)
        return result

    def forget(self, endpoint: Endpoint) -> None:
        """End the Watch of an endpoint that has left."""
        self._unwatchable.discard(endpoint.identity)
        watch = self._watches.pop(endpoint.identity, None)
        if watch is not None:
            self._close(watch.channel)

    async def aclose(self) -> None:
        """End all Watches; their threads follow at once."""
        watches, self._watches = tuple(self._watches.values()), {}
        for watch in watches:
            self._close(watch.channel)

    def _open(self, endpoint: Endpoint) -> grpc.Channel:
        port = self._options.port or endpoint.port
        if not endpoint.is_ip:
            target = f"dns:///{endpoint.host}:{port}"
        else:
            target = f"ipv6:[{endpoint.host}]:{port}" if ":" in endpoint.host else f"ipv4:{endpoint.host}:{port}"
        channel = _new_channel(target, self._credentials, self._channel_options)
        self._channels.add(channel)
        return channel

    def _close(self, channel: grpc.Channel) -> None:
        self._channels.discard(channel)
        channel.close()

    # -- fork --------------------------------------------------------------------------------------------------

    def _track(self, call: Any) -> None:
        def done(_: Any) -> None:
            self._running.discard(call)
            thread = threading.current_thread()
            if thread is not self._loop_thread:
                self._threads.add(thread)

        self._threads = {thread for thread in self._threads if thread.is_alive()}
        self._running.add(call)
        call.add_done_callback(done)

    def quiesce(self) -> None:
        """Break off all calls, and wait for the threads that serve them. On the thread that is about to fork."""
        for channel in tuple(self._channels):
            channel.close()
        deadline = time.monotonic() + _FORK_PATIENCE
        while self._running or any(thread.is_alive() for thread in tuple(self._threads)):
            if time.monotonic() >= deadline:
                return
            time.sleep(0.001)

    # -- Watch -------------------------------------------------------------------------------------------------

    def _watch(self, endpoint: Endpoint, result: CheckResult) -> None:
        """Begin to watch an endpoint that has just passed."""
        identity = endpoint.identity
        if not result.passed:
            self._unwatchable.discard(identity)
        elif identity not in self._watches and identity not in self._unwatchable:
            watch = self._watches[identity] = _Watch(endpoint, self._open(endpoint), self._request)
            self._track(watch.stream)
            self._threads.add(watch.start(self._said, self._over))

    def _said(self, watch: _Watch, message: bytes) -> None:
        if self._watches.get(watch.endpoint.identity) is watch:
            status = read_status(message)
            words = f"{_STATUSES.get(status, status)} (said by its Watch)"
            self._push(watch.endpoint, CheckResult(status == _SERVING, words, decisive=True))

    def _over(self, watch: _Watch, code: grpc.StatusCode | None) -> None:
        """A Watch that ends is no news of the endpoint: the next check is, and begins another one if it passes."""
        self._close(watch.channel)
        identity = watch.endpoint.identity
        if self._watches.get(identity) is watch:
            del self._watches[identity]
            if code is grpc.StatusCode.UNIMPLEMENTED:
                self._unwatchable.add(identity)


class _Watch:
    """One endpoint's Watch stream. Reading a stream blocks, so it is read by a thread; it ends with its channel."""

    __slots__ = ("_loop", "channel", "endpoint", "stream")

    def __init__(self, endpoint: Endpoint, channel: grpc.Channel, request: bytes) -> None:
        self.endpoint = endpoint
        self.channel = channel
        self._loop = asyncio.get_running_loop()
        self.stream: Any = channel.unary_stream(WATCH, None, None)(request)

    def start(
        self,
        said: Callable[[_Watch, bytes], object],
        over: Callable[[_Watch, grpc.StatusCode | None], object],
    ) -> threading.Thread:
        """Have the control loop told of every message, and of the end; the thread that does it."""

        def read() -> None:
            try:
                for message in self.stream:
                    self._call_soon(said, message)
            except grpc.RpcError:
                pass  # whatever ended it stands in its code
            self._call_soon(over, self.stream.code())

        thread = threading.Thread(target=read, name=f"meshlb-watch-health-{self.endpoint.address}", daemon=True)
        thread.start()
        return thread

    def _call_soon(self, callback: Callable[[_Watch, Any], object], value: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, self, value)
        except RuntimeError:
            pass  # the control loop has ended


def _new_channel(
    target: str, credentials: grpc.ChannelCredentials | None, options: tuple[tuple[str, Any], ...]
) -> grpc.Channel:
    # An instrumentation replaces these functions by wrappers, which say what they wrap. Checks are not traced.
    channel: grpc.Channel
    if credentials is None:
        channel = inspect.unwrap(grpc.insecure_channel)(target, options)
    else:
        channel = inspect.unwrap(grpc.secure_channel)(target, credentials, options)
    return channel


def _keep_up() -> None:
    """Keep gRPC from shutting down, and have checks broken off before a fork."""
    global _sees_forks, _stays_up
    if not _stays_up:
        _stays_up = True
        _idle_channels.append(_new_channel("ipv4:127.0.0.1:1", None, ()))
    if not _sees_forks:
        # Now that gRPC has a channel: what is registered last is run first, and with GRPC_ENABLE_FORK_SUPPORT=1 gRPC's
        # first channel registers what holds up the threads that a channel's closing waits for.
        _sees_forks = True
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


async def _ended(call: Any) -> None:
    """Wait until a gRPC future is done."""
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Any) -> None:
        try:
            loop.call_soon_threadsafe(done.set)
        except RuntimeError:
            pass  # the control loop has ended

    call.add_done_callback(wake)
    await done.wait()


def _judge(call: Any) -> CheckResult:
    code = call.code()
    if code is grpc.StatusCode.OK:
        status = read_status(call.result())
        return CheckResult(status == _SERVING, _STATUSES.get(status, f"status {status}"))
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CheckResult(True, "UNIMPLEMENTED (it has no health service)")
    details = call.details() or ""
    local = any(text in details for text in _LOCAL)
    return CheckResult(None if local else False, f"{code.name} ({excerpt(details)})" if details else code.name)


def _before_fork() -> None:
    # A thread of the parent that is inside gRPC leaves the child a gRPC that hangs for ever, and unlike a program's own
    # calls, checks are always under way. They are broken off, and made again after the fork.
    global _forks, _forking
    _forks += 1
    _forking = True
    for prober in tuple(_probers):
        prober.quiesce()


def _after_fork() -> None:
    global _forking
    _forking = False


def _after_fork_in_child() -> None:
    global _stays_up
    _probers.clear()  # the parent's
    _stays_up = False
    _after_fork()


def health_request(service: str) -> bytes:
    """``HealthCheckRequest{service}`` (field 1, a string)."""
    name = service.encode()
    return b"\x0a" + _varint(len(name)) + name if name else b""


def read_status(message: bytes) -> int:
    """``HealthCheckResponse.status`` (field 1, an enum); 0 if it is missing, -1 if this is no such message."""
    if not message:
        return 0
    return message[1] if len(message) == 2 and message[0] == 0x08 and message[1] < 0x80 else -1


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
