"""What all kinds of health checks have in common: when they are made, what they count for, and their TLS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshlb._validate import integer, number, seconds
from meshlb.errors import ConfigError

if TYPE_CHECKING:
    import ssl

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class CheckTLS:
    """TLS of a check.

    ``ca_file``: the authorities to trust instead of the system's. ``cert`` and ``key``: the client certificate, and its
    key if it is in a file of its own. ``verify``: False takes any certificate (not with gRPC, which cannot).
    ``server_name``: the name to verify; None: the service's, which calls are verified for too.

    The files are read when it is made, so that a wrong one is a ConfigError right here, and again when checks begin.
    """

    ca_file: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    verify: bool = True
    server_name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.verify, bool):
            raise ConfigError(f"CheckTLS.verify: {self.verify!r} is not True or False; an authority goes into ca_file")
        if self.key is not None and self.cert is None:
            raise ConfigError("CheckTLS.key: given without CheckTLS.cert")
        if self.server_name is not None and not (isinstance(self.server_name, str) and self.server_name):
            raise ConfigError(f"CheckTLS.server_name: {self.server_name!r} is not a name (or None)")
        if self.ca_file is not None or self.cert is not None:
            self.context()

    def context(self) -> ssl.SSLContext:
        """A client context with these files. Raises ConfigError naming the field and the file."""
        import ssl

        context = ssl.create_default_context() if self.ca_file is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if not self.verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        field, file = "ca_file", self.ca_file
        try:
            if self.ca_file is not None:
                context.load_verify_locations(os.fspath(self.ca_file))
            field, file = "cert", self.cert
            if self.cert is not None:
                # Without a password OpenSSL would ask at the terminal for that of a protected key.
                context.load_cert_chain(self.cert, self.key, password="")
        except (OSError, ssl.SSLError, TypeError) as error:
            raise ConfigError(f"CheckTLS.{field}: {file!r} cannot be loaded: {error}") from None
        return context


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """When checks are made, and what their results count for. Use one of the kinds: ``HttpCheck``, ``TcpCheck``,
    ``GrpcCheck``, ``FunctionCheck``.

    * ``interval``: seconds between two checks of an endpoint (10: the default of Kubernetes, and what Consul's users
      give; calls themselves see a dead endpoint at once, checks are for those that get none).
    * ``unhealthy_interval``: the same from the first failure until the endpoint is healthy again (2: a bad endpoint is
      out after 5 s, a good one is back after 2 s, and only endpoints in doubt are asked that often).
    * ``no_traffic_interval``: seconds without any call to the service, after which its checks are only as far apart as
      that (60: Envoy's); None: no slower without traffic. The first calls bring back the usual pace.
    * ``jitter``: each pause is up to this share shorter or longer, at random (0.1), so that many clients do not check
      in step.
    * ``timeout``: seconds for one check, from the connection to the end of the answer (1: Kubernetes' default; an
      endpoint that takes longer for a check is no good for calls).
    * ``unhealthy_threshold``: failures in a row that take an endpoint out (3: Kubernetes' and HAProxy's; one or two
      lost packets do not).
    * ``healthy_threshold``: successes in a row that bring it back (2: HAProxy's). Until the first result one is enough.
    * ``wait_first``: whether a new endpoint gets no call before its first success. False: the registry vouches for it,
      so it is used at once, and a failed check takes it out. True: nobody vouches for it (a static list); it is in
      once it has passed, and a first failure keeps it out.
    * ``probe_on_success``: whether a passed check has an open breaker probed at once, by one call, instead of when its
      time is up (True: Envoy un-ejects then too). The breaker itself only closes on real calls.
    * ``max_rate``: checks begun per second, for all endpoints of the service together (100: an HTTP or gRPC check takes
      about 1 ms of this process, a TCP check 0.3). With more than ``interval * max_rate`` endpoints, each is checked
      less often.

    Raises ConfigError naming the field.
    """

    interval: float = 10.0
    unhealthy_interval: float = 2.0
    no_traffic_interval: float | None = 60.0
    jitter: float = 0.1
    timeout: float = 1.0
    unhealthy_threshold: int = 3
    healthy_threshold: int = 2
    wait_first: bool = False
    probe_on_success: bool = True
    max_rate: float = 100.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        seconds(f"{name}.interval", self.interval)
        seconds(f"{name}.unhealthy_interval", self.unhealthy_interval)
        seconds(f"{name}.no_traffic_interval", self.no_traffic_interval, optional=True)
        number(f"{name}.jitter", self.jitter, least=0, most=0.9)
        seconds(f"{name}.timeout", self.timeout)
        integer(f"{name}.unhealthy_threshold", self.unhealthy_threshold, least=1)
        integer(f"{name}.healthy_threshold", self.healthy_threshold, least=1)
        number(f"{name}.max_rate", self.max_rate, above=0, most=10_000)
        for field in ("wait_first", "probe_on_success"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{name}.{field}: {getattr(self, field)!r} is not True or False")


def require_tls(field: str, value: object) -> None:
    """Require a CheckTLS or None. Raises ConfigError naming ``field``."""
    if value is not None and not isinstance(value, CheckTLS):
        raise ConfigError(f"{field}: {value!r} is not a CheckTLS (or None)")


def require_port(field: str, value: object) -> None:
    """Require a port or None. Raises ConfigError naming ``field``."""
    if value is not None:
        integer(field, value, least=1, most=65535)
