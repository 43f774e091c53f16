"""The address of a Consul agent: how it is written, and where it is taken from."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshlb.errors import ConfigError

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORT: Final = 8500
DEFAULT_TLS_PORT: Final = 8501
"""What Consul's own documentation gives the HTTPS API; an agent has no default for it."""

_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE: Final = frozenset({"0", "f", "F", "FALSE", "false", "False"})
_HAS_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class ConsulAddress:
    """``scheme`` is http or https. ``socket`` is the path of a unix socket, then host and port mean nothing.

    ``source`` says who gave the address, for error messages.
    """

    scheme: str = "http"
    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    path: str = ""
    socket: str | None = None
    source: str = field(default="the default address", compare=False)

    @property
    def tls(self) -> bool:
        return self.scheme == "https"

    @property
    def local(self) -> bool:
        """Whether asking it crosses no network."""
        return self.socket is not None or self.host in {"localhost", "::1"} or self.host.startswith("127.")

    @property
    def base_url(self) -> str:
        """What request paths are appended to."""
        if self.socket is not None:
            return f"{self.scheme}://localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    def __str__(self) -> str:
        return self.base_url if self.socket is None else f"unix://{self.socket}"


def find_address(address: str | None, scheme: str | None, env: Mapping[str, str]) -> ConsulAddress:
    """The address argument, else CONSUL_HTTP_ADDR, else http://127.0.0.1:8500.

    ``scheme`` (else CONSUL_HTTP_SSL) completes an address that has none. Raises ConfigError that names the argument
    or the variable.
    """
    if scheme is not None and scheme not in {"http", "https"}:
        raise ConfigError(f"ConsulDiscovery.scheme: {scheme!r} is neither 'http' nor 'https'")
    env_ssl = env.get("CONSUL_HTTP_SSL", "")
    env_scheme = ("https" if parse_bool("CONSUL_HTTP_SSL", env_ssl) else "http") if env_ssl else None
    if address is not None:
        return _parse("ConsulDiscovery.address", address, scheme, env_scheme, "the argument 'address'")
    text = env.get("CONSUL_HTTP_ADDR", "")
    if not text:
        chosen = scheme or env_scheme or "http"
        return ConsulAddress(chosen, port=DEFAULT_TLS_PORT if chosen == "https" else DEFAULT_PORT)
    if scheme is None and env_scheme == "https" and text.startswith("http://"):
        # Consul's client: "Never revert to http if TLS was explicitly requested".
        text = "https://" + text.removeprefix("http://")
    elif scheme is not None and text.startswith(("http://", "https://")):
        text = f"{scheme}://{text.partition('://')[2]}"  # an argument wins over the environment
    return _parse("CONSUL_HTTP_ADDR", text, scheme, env_scheme, "CONSUL_HTTP_ADDR")


def _parse(name: str, text: str, scheme: str | None, env_scheme: str | None, source: str) -> ConsulAddress:
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{name}: {text!r} is not an address such as 'http://127.0.0.1:8500'")
    text = text.strip()
    if text.startswith("unix://"):
        socket = text.removeprefix("unix://")
        if not socket.startswith("/"):
            raise ConfigError(f"{name}: {text!r} has no absolute path; write 'unix:///path/to/socket'")
        return ConsulAddress(scheme or env_scheme or "http", socket=socket, source=source)
    given = _HAS_SCHEME.match(text)
    try:
        url = urllib.parse.urlsplit(text if given else f"//{text}")
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ConfigError(f"{name}: {text!r} is not an address such as 'http://127.0.0.1:8500' ({error})") from None
    found = url.scheme if given else (scheme or env_scheme or "http")
    if found not in {"http", "https"}:
        raise ConfigError(f"{name}: {text!r} is neither http://, https:// nor unix://")
    if not host or any(character.isspace() for character in text) or port == 0:
        raise ConfigError(f"{name}: {text!r} is not an address such as 'http://127.0.0.1:8500'")
    if url.username is not None or url.password is not None:
        raise ConfigError(f"{name}: credentials do not belong into the address; use auth= or CONSUL_HTTP_AUTH")
    if url.query or url.fragment:
        raise ConfigError(f"{name}: {text!r} has a query or a fragment, which an address cannot have")
    if given and scheme is not None and scheme != found:
        raise ConfigError(f"ConsulDiscovery.scheme: {scheme!r} contradicts {name} {text!r}")
    if port is None:
        # A URL without a port means what it means everywhere; a bare host name means Consul's usual ports.
        usual = {"http": 80, "https": 443} if given else {"http": DEFAULT_PORT, "https": DEFAULT_TLS_PORT}
        port = usual[found]
    return ConsulAddress(found, host, port, url.path.rstrip("/"), source=source)


def parse_bool(name: str, text: str) -> bool:
    """Read a truth value as Consul's own client does (Go's ParseBool). Raises ConfigError that names the variable."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ConfigError(f"{name}: {text!r} is neither true nor false")
