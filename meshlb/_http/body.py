"""Request bodies: whether one has been touched, and whether it can be sent again from its start.

==========================================  ========================================================
bytes, str, json, form (``ByteStream``)     always
multipart                                   if each of its files is seekable
a list or tuple of bytes                    always
a seekable file                             by seeking back to where it stood before the first attempt
generator, other iterator, async iterator   never: what it gave is gone; or, with ``Retry.buffer_body``,
                                            as long as what was read of it is not longer than that
==========================================  ========================================================

Any body may be sent again as long as no attempt has begun to read it, which is what happens when no connection could
be made. httpx itself sends nothing at all when a file is sent twice, without an error: hence this module.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any


class TrackedBody:
    """A body that may not be replayable, in the place of the caller's own stream.

    ``buffer_limit``: bytes to keep of a body that can be read only once.
    """

    def __init__(self, stream: Any, buffer_limit: int = 0) -> None:
        self._stream = stream
        self._rewind = rewinder(stream)
        self._limit = 0 if self._rewind is not None else buffer_limit
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self._source: Any = None
        """The one iterator over the stream, which every attempt goes on with."""
        self.started = False
        """Whether an attempt has begun to read it."""
        self.error: BaseException | None = None
        """What the caller's own stream raised."""

    def rewind(self) -> bool:
        """Make ready for another attempt; False if that is impossible."""
        if not self.started:
            return True
        if self._limit:
            return self._kept_bytes <= self._limit
        if self._rewind is None:
            return False
        try:
            self._rewind()
        except (OSError, ValueError):  # ValueError: the file has been closed
            return False
        return True

    def _keep(self, chunk: bytes) -> None:
        self._kept_bytes += len(chunk)
        if self._kept_bytes <= self._limit:
            self._kept.append(chunk)
        else:
            self._kept.clear()  # it will not be sent again


class SyncTrackedBody(TrackedBody):
    """See TrackedBody. To be combined with the package's SyncByteStream."""

    def __iter__(self) -> Iterator[bytes]:
        self.started = True
        try:
            if self._limit:
                yield from self._buffered()
            else:
                yield from self._stream
        except Exception as error:
            self.error = error
            raise

    def _buffered(self) -> Iterator[bytes]:
        yield from tuple(self._kept)
        if self._source is None:
            self._source = iter(self._stream)
        while (read := self._pull()) is not None:
            self._keep(read)
            yield read

    def _pull(self) -> bytes | None:
        try:
            chunk: bytes | None = next(self._source, None)
        except BaseException:
            self._limit = -1  # a generator that has raised is at its end, and would look complete the next time
            raise
        return chunk

    def close(self) -> None:
        self._stream.close()


class AsyncTrackedBody(TrackedBody):
    """See TrackedBody. To be combined with the package's AsyncByteStream."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.started = True
        try:
            async for chunk in self._buffered() if self._limit else self._stream:
                yield chunk
        except Exception as error:
            self.error = error
            raise

    async def _buffered(self) -> AsyncIterator[bytes]:
        for chunk in tuple(self._kept):
            yield chunk
        if self._source is None:
            self._source = aiter(self._stream)
        while (read := await self._pull()) is not None:
            self._keep(read)
            yield read

    async def _pull(self) -> bytes | None:
        try:
            chunk: bytes | None = await anext(self._source, None)
        except BaseException:
            self._limit = -1  # as above; cancelling an attempt ends the caller's generator, too
            raise
        return chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


def rewinder(stream: Any) -> Callable[[], object] | None:
    """What takes the stream back to where it stands now; None if nothing can."""
    fields = getattr(stream, "fields", None)
    if isinstance(fields, list):  # multipart: each pass seeks its files to their start, if they let it
        files = [getattr(field, "file", b"") for field in fields]
        return _nothing if all(isinstance(file, str | bytes) or _is_seekable(file) for file in files) else None
    source: Any = getattr(stream, "_stream", None)  # what `content=` was given; without it, nothing is known
    if isinstance(source, Sequence):
        return _nothing
    if hasattr(source, "read") and _is_seekable(source):
        position = source.tell()
        return lambda: source.seek(position)
    return None


def _nothing() -> None:
    """Each pass over it begins at its start."""


def _is_seekable(file: Any) -> bool:
    try:
        return bool(file.seekable())
    except (AttributeError, ValueError):
        return False
