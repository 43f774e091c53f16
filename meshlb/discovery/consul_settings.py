"""How Consul is asked: arguments first, then the CONSUL_* environment variables, then defaults."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from meshlb._validate import number
from meshlb.discovery.consul_address import ConsulAddress, find_address
from meshlb.discovery.consul_tls import ConsulTLS, Path, resolve_tls
from meshlb.errors import ConfigError

DEFAULT_WAIT: Final = 55.0
"""Seconds that a blocking query may hang: under the 60 s after which proxies and NAT tables commonly drop an idle
connection, and a connection that died unnoticed is found out within a good minute. Costs one small query a minute."""

DEFAULT_MIN_REFRESH_INTERVAL: Final = 0.5
"""Seconds between refreshes of a service that changes without end. A refresh of 1,000 instances costs some 30 ms of
CPU, so this is 6 % of a core, and a new instance still gets traffic within a second. The first changes in a row are
not delayed at all (``RefreshLimiter``)."""

DEFAULT_EMPTY_GRACE: Final = 10.0
"""Seconds for which an empty answer is not believed after one that was not: longer than a service that is
de-registered and registered again needs, short enough for callers to get a clear error soon."""

MAX_WAIT: Final = 600.0
"""Consul's own upper limit of ``wait``, seconds."""

CONSISTENCY_MODES: Final = ("default", "stale", "consistent")


@dataclass(frozen=True, slots=True)
class ConsulSettings:
    """Everything that makes one way of asking Consul differ from another; equal settings share their watches."""

    address: ConsulAddress
    tls: ConsulTLS | None = None
    datacenter: str | None = None
    token: str | None = field(default=None, repr=False)
    token_file: str | None = None
    auth: tuple[str, str] | None = field(default=None, repr=False)
    namespace: str | None = None
    partition: str | None = None
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    consistency: str = "default"
    cached: bool = False
    tags: tuple[str, ...] = ()
    filter: str | None = None
    tagged_address: str | None = None
    wait: float = DEFAULT_WAIT
    min_refresh_interval: float = DEFAULT_MIN_REFRESH_INTERVAL
    empty_grace: float = DEFAULT_EMPTY_GRACE
    last_known_good: str | None = None

    def current_token(self) -> str | None:
        """The ACL token now. A token file is read each time, so that a rotated token needs no restart."""
        if self.token_file is None:
            return self.token
        try:
            with open(self.token_file, encoding="utf-8") as file:
                return file.read().strip() or self.token
        except OSError:
            return self.token


def resolve_settings(
    address: str | None = None,
    *,
    datacenter: str | None = None,
    token: str | None = None,
    token_file: Path | None = None,
    scheme: str | None = None,
    auth: tuple[str, str] | None = None,
    verify: bool | None = None,
    ca_file: Path | None = None,
    ca_path: Path | None = None,
    cert: Path | Sequence[Path] | None = None,
    tls_server_name: str | None = None,
    namespace: str | None = None,
    partition: str | None = None,
    headers: Mapping[str, str] | None = None,
    consistency: str = "default",
    cached: bool = False,
    tag: str | Iterable[str] | None = None,
    filter: str | None = None,
    tagged_address: str | None = None,
    wait: float = DEFAULT_WAIT,
    min_refresh_interval: float = DEFAULT_MIN_REFRESH_INTERVAL,
    empty_grace: float = DEFAULT_EMPTY_GRACE,
    last_known_good: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ConsulSettings:
    """Combine arguments and environment; an argument always wins. Raises ConfigError that names what is wrong."""
    env = os.environ if environ is None else environ
    found = find_address(address, scheme, env)
    tls = None
    if found.tls:
        tls = resolve_tls(
            verify=verify, ca_file=ca_file, ca_path=ca_path, cert=cert, server_name=tls_server_name, env=env
        )
    else:
        # The environment's TLS variables are ignored on a plain address, as the consul command does; an argument
        # that could have no effect is a mistake.
        useless = {"ca_file": ca_file, "ca_path": ca_path, "cert": cert, "tls_server_name": tls_server_name}
        for name, value in useless.items():
            if value is not None:
                raise ConfigError(f"ConsulDiscovery.{name}: {found} is not asked over TLS; use an https:// address")
    if consistency not in CONSISTENCY_MODES:
        raise ConfigError(f"ConsulDiscovery.consistency: {consistency!r} is none of {', '.join(CONSISTENCY_MODES)}")
    if cached and consistency == "consistent":
        raise ConfigError("ConsulDiscovery.cached: Consul does not answer from its cache with consistency='consistent'")
    number("ConsulDiscovery.wait", wait, least=1, most=MAX_WAIT)
    number("ConsulDiscovery.min_refresh_interval", min_refresh_interval, least=0)
    number("ConsulDiscovery.empty_grace", empty_grace, least=0)
    chosen_token, chosen_file = _token(token, token_file, env)
    return ConsulSettings(
        address=found,
        tls=tls,
        datacenter=_text("datacenter", datacenter),
        token=chosen_token,
        token_file=chosen_file,
        auth=_auth(auth, env),
        namespace=_text("namespace", namespace) or env.get("CONSUL_NAMESPACE") or None,
        partition=_text("partition", partition) or env.get("CONSUL_PARTITION") or None,
        headers=_headers(headers),
        consistency=consistency,
        cached=bool(cached),
        tags=_tags(tag),
        filter=_text("filter", filter),
        tagged_address=_text("tagged_address", tagged_address),
        wait=float(wait),
        min_refresh_interval=float(min_refresh_interval),
        empty_grace=float(empty_grace),
        last_known_good=None if last_known_good is None else os.path.abspath(last_known_good),
    )


def _token(token: str | None, token_file: Path | None, env: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The token, or the file that holds it. Of the two variables the file wins, as in Consul's own client."""
    if token is not None and token_file is not None:
        raise ConfigError("ConsulDiscovery.token_file: give either token or token_file")
    if token is not None:
        # Never shown: a token is a secret even when it is wrong.
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise ConfigError("ConsulDiscovery.token: not a string of printable ASCII characters")
        return token or None, None
    name, path = "ConsulDiscovery.token_file", None if token_file is None else os.fspath(token_file)
    if path is None and env.get("CONSUL_HTTP_TOKEN_FILE"):
        name, path = "CONSUL_HTTP_TOKEN_FILE", env["CONSUL_HTTP_TOKEN_FILE"]
    if path is not None:
        try:
            with open(path, encoding="utf-8") as file:
                file.read(1)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: {path!r} cannot be read: {error}") from None
    return env.get("CONSUL_HTTP_TOKEN") or None, path


def _auth(auth: tuple[str, str] | None, env: Mapping[str, str]) -> tuple[str, str] | None:
    if auth is not None:
        if not isinstance(auth, tuple | list) or len(auth) != 2 or not all(isinstance(part, str) for part in auth):
            raise ConfigError("ConsulDiscovery.auth: not a pair (user name, password)")
        return auth[0], auth[1]
    user, _, password = env.get("CONSUL_HTTP_AUTH", "").partition(":")
    return (user, password) if user else None


def _headers(headers: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
    if headers is None:
        return ()
    if not isinstance(headers, Mapping) or not all(isinstance(text, str) for pair in headers.items() for text in pair):
        raise ConfigError("ConsulDiscovery.headers: not a mapping of strings to strings")
    return tuple(headers.items())


def _tags(tag: str | Iterable[str] | None) -> tuple[str, ...]:
    tags = () if tag is None else (tag,) if isinstance(tag, str) else tuple(tag)
    if not all(isinstance(one, str) and one for one in tags):
        raise ConfigError(f"ConsulDiscovery.tag: {tag!r} is neither a tag nor a list of tags")
    return tags


def _text(name: str, value: str | None) -> str | None:
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise ConfigError(f"ConsulDiscovery.{name}: {value!r} is not a text")
