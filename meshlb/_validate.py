"""Checks of settings, with messages that name the field. Used by every options dataclass."""

from __future__ import annotations

from string import ascii_letters, digits
from typing import Final

from meshlb.errors import ConfigError

_LARGEST: Final = 1e15
"""Bound of every number that has no closer one. Far beyond it a clock loses its fractions, the sum of a few becomes
infinite, and an int may not even be a float any more."""

_TOKEN: Final = frozenset("!#$%&'*+-.^_`|~" + ascii_letters + digits)
"""The characters of a token (RFC 9110 5.6.2)."""

_SHORTEST: Final = 1e-6
"""Seconds. A shorter duration is a mistake (no timer keeps it), and dividing by it would be one too."""


def number(
    field: str, value: object, *, above: float | None = None, least: float | None = None, most: float = _LARGEST
) -> None:
    """Require a finite int or float (never a bool) within bounds. Raises ConfigError naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field}: {value!r} is not a number")
    if isinstance(value, float) and not value - value == 0.0:  # NaN and the infinities; an int may be too big to ask
        raise ConfigError(f"{field}: {value!r} is not a finite number")
    if above is not None and not value > above:
        raise ConfigError(f"{field}: {_shown(value)} must be above {above:g}")
    if value < (-_LARGEST if least is None else least):
        raise ConfigError(f"{field}: {_shown(value)} must be at least {-_LARGEST if least is None else least:g}")
    if value > most:
        raise ConfigError(f"{field}: {_shown(value)} must be at most {most:g}")


def integer(field: str, value: object, *, least: int, most: float = _LARGEST) -> None:
    """Require an int (never a bool) within bounds. Raises ConfigError naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{field}: {value!r} is not a whole number")
    number(field, value, least=least, most=most)


def seconds(field: str, value: object, *, optional: bool = False) -> None:
    """Require a duration above 0 in seconds; with ``optional`` None will do. Raises ConfigError naming ``field``."""
    if optional and value is None:
        return
    number(field, value, above=0)
    number(field, value, least=_SHORTEST)


def text(field: str, value: object) -> None:
    """Require a str, not bytes. Raises ConfigError naming ``field``."""
    if not isinstance(value, str):
        raise ConfigError(f"{field}: {value!r} is not a string")


def header_name(field: str, value: object) -> None:
    """Require the name of an HTTP header (RFC 9110 5.1: a token), or None. Raises ConfigError naming ``field``."""
    if value is not None and not (isinstance(value, str) and value and _TOKEN.issuperset(value)):
        raise ConfigError(f"{field}: {value!r} is not the name of a header (or None)")


def _shown(value: float) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to write out an int of thousands of digits
        return f"a number of {value.bit_length() if isinstance(value, int) else 0} bits"
