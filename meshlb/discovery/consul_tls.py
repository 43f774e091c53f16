"""TLS towards Consul: which certificates, from where, and the context made of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshlb.discovery.consul_address import parse_bool
from meshlb.errors import ConfigError

if TYPE_CHECKING:
    import ssl

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class ConsulTLS:
    """The TLS settings, and behind each the name it was given under, for error messages."""

    verify: bool = True
    ca_file: str | None = None
    ca_path: str | None = None
    cert: str | None = None
    key: str | None = None
    server_name: str | None = None


def resolve_tls(
    *,
    verify: bool | None,
    ca_file: Path | None,
    ca_path: Path | None,
    cert: Path | Sequence[Path] | None,
    server_name: str | None,
    env: Mapping[str, str],
) -> ConsulTLS:
    """Arguments first, then the environment. Loads everything once, so that a bad file is a ConfigError right here."""
    if verify is None:
        text = env.get("CONSUL_HTTP_SSL_VERIFY", "")
        verify = parse_bool("CONSUL_HTTP_SSL_VERIFY", text) if text else True
    elif not isinstance(verify, bool):
        raise ConfigError(f"ConsulDiscovery.verify: {verify!r} is not True or False; a CA goes into ca_file")
    certificate, key = _cert(cert, env)
    settings = ConsulTLS(
        verify,
        _either(ca_file, "CONSUL_CACERT", env),
        _either(ca_path, "CONSUL_CAPATH", env),
        certificate,
        key,
        server_name or env.get("CONSUL_TLS_SERVER_NAME") or None,
    )
    make_context(settings)
    return settings


def make_context(settings: ConsulTLS) -> ssl.SSLContext:
    """Load the files into a client context. Raises ConfigError that names the file and both ways it can be given."""
    import ssl

    context = ssl.create_default_context()
    if not settings.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for name, authorities in (
        ("ca_file (CONSUL_CACERT)", [settings.ca_file] if settings.ca_file else []),
        ("ca_path (CONSUL_CAPATH)", _files(settings.ca_path) if settings.ca_path else []),
    ):
        for path in authorities:
            try:
                context.load_verify_locations(cafile=path)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"ConsulDiscovery.{name}: {path!r} cannot be loaded: {error}") from None
    if settings.cert:
        try:
            # Without a password callback OpenSSL would ask at the terminal for the password of a protected key.
            context.load_cert_chain(settings.cert, settings.key, password=_no_password)
        except (OSError, ssl.SSLError, ConfigError) as error:
            raise ConfigError(
                f"ConsulDiscovery.cert (CONSUL_CLIENT_CERT, CONSUL_CLIENT_KEY): "
                f"{settings.cert!r} with key {settings.key or settings.cert!r} cannot be loaded: {error}"
            ) from None
    return context


def _files(directory: str) -> list[str]:
    """Every file of a directory. As Consul does it: no hashed names are needed, which OpenSSL's capath would want."""
    try:
        names = sorted(entry.path for entry in os.scandir(directory) if entry.is_file())
    except OSError as error:
        raise ConfigError(f"ConsulDiscovery.ca_path (CONSUL_CAPATH): {error}") from None
    if not names:
        raise ConfigError(f"ConsulDiscovery.ca_path (CONSUL_CAPATH): {directory!r} has no files")
    return names


def _cert(cert: Path | Sequence[Path] | None, env: Mapping[str, str]) -> tuple[str | None, str | None]:
    if cert is None:
        certificate, key = env.get("CONSUL_CLIENT_CERT") or None, env.get("CONSUL_CLIENT_KEY") or None
        if key and not certificate:
            raise ConfigError("CONSUL_CLIENT_KEY: given without CONSUL_CLIENT_CERT")
        return certificate, key
    if isinstance(cert, str | os.PathLike):
        return os.fspath(cert), None
    if not isinstance(cert, tuple | list) or len(cert) != 2:
        raise ConfigError("ConsulDiscovery.cert: neither a path nor a pair (certificate, key)")
    return os.fspath(cert[0]), os.fspath(cert[1])


def _either(argument: Path | None, variable: str, env: Mapping[str, str]) -> str | None:
    return os.fspath(argument) if argument is not None else env.get(variable) or None


def _no_password() -> str:
    raise ConfigError("the key is protected by a password, which is not supported")
