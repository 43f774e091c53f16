"""Which RPC methods may be sent twice."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from meshlb.resilience import Retry

_declared: dict[str, bool] = {}
"""What the descriptors say, by full method name. Only what was found: a module with the descriptor may be loaded
later."""

_POOL: Final = "google.protobuf.descriptor_pool"


def is_idempotent(method: str, retry: Retry | None) -> bool:
    """Whether ``/package.Service/Method`` may be processed more than once.

    True if one of ``retry.idempotent_methods`` matches it (shell patterns, with or without the leading slash), or if
    its .proto declares an ``idempotency_level`` of NO_SIDE_EFFECTS or IDEMPOTENT.
    """
    if retry is None:
        return False
    name = method.lstrip("/")
    if any(fnmatchcase(name, pattern.lstrip("/")) for pattern in retry.idempotent_methods):
        return True
    known = _declared.get(name)
    return _look_up(name) if known is None else known


def is_declared(method: str) -> bool:
    """Whether the .proto of ``/package.Service/Method`` is known, so that ``is_idempotent`` stays what it is."""
    return method.lstrip("/") in _declared


def _look_up(name: str) -> bool:
    module = sys.modules.get(_POOL)
    if module is None:
        return False  # who has not loaded protobuf has no descriptors either
    try:
        method = module.Default().FindMethodByName(name.replace("/", "."))
        declared = bool(method.GetOptions().idempotency_level)  # 0: IDEMPOTENCY_UNKNOWN
    except (KeyError, AttributeError):
        return False  # not a method of the default pool
    _declared[name] = declared
    return declared
