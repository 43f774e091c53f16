"""One HTTP package as the shared code sees it: ``httpx`` or ``httpx2``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshlb._http.body import AsyncTrackedBody, SyncTrackedBody
from meshlb._http.classify import ErrorTable
from meshlb._http.errors import ErrorFamily
from meshlb._http.rewriting import locator, readdresser
from meshlb._http.stream import AsyncLeaseStream, SyncLeaseStream
from meshlb.errors import DeadlineExceeded, MeshError


class Binding:
    """The package's own classes, which its clients insist on, made out of the shared ones. Built once a package.

    ``family``: the package's class for each of meshlb's errors.
    """

    def __init__(self, module: Any, family: Mapping[type[MeshError], type[Any]]) -> None:
        self.module = module
        self.request_class = module.Request
        self.request_error = module.RequestError
        self.read_timeout = module.ReadTimeout
        self.replayable_body = module.ByteStream
        self.deadline_exceeded = family[DeadlineExceeded]
        self.errors = ErrorTable(module)
        self.family = ErrorFamily(family)
        self.locate = locator(module)
        self.readdress = readdresser(module)
        self.sync_stream = type("SyncLeaseStream", (SyncLeaseStream, module.SyncByteStream), {})
        self.async_stream = type("AsyncLeaseStream", (AsyncLeaseStream, module.AsyncByteStream), {})
        self.sync_body = type("SyncTrackedBody", (SyncTrackedBody, module.SyncByteStream), {})
        self.async_body = type("AsyncTrackedBody", (AsyncTrackedBody, module.AsyncByteStream), {})
