"""What a machine sent, kept until somebody reads it: several byte streams, one order of arrival."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arrival:
    """Bytes that arrived on a stream, ``seconds`` after the machine was started."""

    channel: str
    data: bytes
    seconds: float


@dataclass
class _Stream:
    pieces: deque[tuple[int, Arrival]] = field(default_factory=deque)  # with their place in the order of all
    unread: int = 0  # bytes
    lines: deque[bytes] = field(default_factory=deque)  # read, for whoever reads by line
    partial: bytes = b""  # of a line

    def take(self) -> Arrival:
        _, arrival = self.pieces.popleft()
        self.unread -= len(arrival.data)
        return arrival

    def split(self, data: bytes) -> None:
        *whole, self.partial = (self.partial + data).split(b"\n")
        self.lines.extend(whole)

    def unfinished(self) -> list[bytes]:
        rest, self.partial = self.partial, b""
        return [rest] if rest else []


class Inbox:
    """The reading side of a machine, for one reader a stream, in any thread.

    Bytes that arrived can be read until they have been read, also after the machine's end. A stream is read either by
    :meth:`read`, by :meth:`lines`, or with all others by :meth:`arrivals`.
    """

    def __init__(self, channels: Iterable[str]) -> None:
        self._changed = threading.Condition()
        self._streams = {name: _Stream() for name in channels}
        self._order = itertools.count()
        self._closed = False
        self._error: Exception | None = None

    def read(self, channel: str, timeout: float) -> bytes | None:
        """All that arrived on a stream since the last time; None when nothing does in ``timeout`` seconds.

        At the machine's end b"", or LostError if it was the death of the emulator.
        """
        stream = self._streams[channel]
        with self._changed:
            if not self._changed.wait_for(lambda: stream.pieces or self._closed, timeout):
                return None
            data = b"".join(stream.take().data for _ in range(len(stream.pieces)))
            self._taken(channel, stream.unread)
            if not data and self._error is not None:
                raise self._error
            return data

    def lines(self, channel: str, timeout: float) -> Iterator[bytes]:
        """Each line of a stream without its end, as it arrives; at the machine's end also an unfinished one.

        Raises TimeoutError when nothing arrives for ``timeout`` seconds (ask again to go on), LostError as
        :meth:`read` does.
        """
        stream = self._streams[channel]
        while True:
            while stream.lines:
                yield stream.lines.popleft()
            try:
                data = self.read(channel, timeout)
            except Exception:
                yield from stream.unfinished()
                raise
            if data is None:
                raise TimeoutError(f"nothing on {channel} for {timeout:g} s")
            if not data:
                yield from stream.unfinished()
                return
            stream.split(data)

    def arrivals(self, timeout: float) -> Iterator[Arrival]:
        """What arrives on any stream, in the order of arrival, until the machine has ended and all is read.

        Raises TimeoutError when nothing arrives for ``timeout`` seconds (ask again to go on), LostError as
        :meth:`read` does.
        """
        while arrival := self._next(timeout):
            yield arrival

    def _next(self, timeout: float) -> Arrival | None:
        def first() -> tuple[int, str] | None:
            return min(((s.pieces[0][0], name) for name, s in self._streams.items() if s.pieces), default=None)

        with self._changed:
            if not self._changed.wait_for(lambda: first() or self._closed, timeout):
                raise TimeoutError(f"nothing from the machine for {timeout:g} s")
            if (found := first()) is None:
                if self._error is not None:
                    raise self._error
                return None
            arrival = self._streams[found[1]].take()
            self._taken(found[1], self._streams[found[1]].unread)
            return arrival

    # --- for whoever fills it ---

    def _put(self, arrival: Arrival) -> int:
        """Add what arrived; return how much of that stream is unread, in bytes."""
        stream = self._streams[arrival.channel]
        with self._changed:
            stream.pieces.append((next(self._order), arrival))
            stream.unread += len(arrival.data)
            self._changed.notify_all()
            return stream.unread

    def _taken(self, channel: str, unread: int) -> None:
        """Called (with ``_changed`` held) when somebody has read, with the number of bytes left."""

    def _close(self, error: Exception | None) -> None:
        """Nothing more will come; readers get ``error`` after the last byte."""
        with self._changed:
            self._closed, self._error = True, error
            self._changed.notify_all()
