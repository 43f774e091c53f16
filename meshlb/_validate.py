"""Checks of settings, with messages that name the field. Used by every options dataclass."""

from __future__ import annotations

import math

from meshlb.errors import ConfigError


def number(field: str, value: object, *, above: float | None = None, least: float | None = None,
           most: float | None = None) -> None:  # fmt: skip
    """Require a finite int or float (never a bool) within bounds. Raises ConfigError naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{field}: {value!r} is not a finite number")
    if above is not None and not value > above:
        raise ConfigError(f"{field}: {value!r} must be above {above:g}")
    if least is not None and value < least:
        raise ConfigError(f"{field}: {value!r} must be at least {least:g}")
    if most is not None and value > most:
        raise ConfigError(f"{field}: {value!r} must be at most {most:g}")


def integer(field: str, value: object, *, least: int, most: int | None = None) -> None:
    """Require an int (never a bool) within bounds. Raises ConfigError naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{field}: {value!r} is not a whole number")
    number(field, value, least=least, most=most)


def seconds(field: str, value: object, *, optional: bool = False) -> None:
    """Require a duration above 0 in seconds; with ``optional`` None is accepted. Raises ConfigError naming ``field``."""
    if optional and value is None:
        return
    number(field, value, above=0)
