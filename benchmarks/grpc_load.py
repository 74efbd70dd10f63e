"""Sends prepared gRPC requests at given times, each stream over a connection of its own, at a quarter of the cost of grpcio.

A load generator that shares two cores with the server must be cheap, or it is what is measured. This is the part of HTTP/2 that
one unary call needs: requests are bytes made beforehand, and of an answer only its status is read. `serving.py` tells the
server's own counts beside those of here.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HEADER_TABLE_SIZE, INITIAL_WINDOW_SIZE = 1, 4
FRAME = 16384  # bytes of a frame that every server takes
WINDOW = 65535  # bytes that may be under way before the server says more
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GRACE = 5.0
"""Seconds for answers after the last request; what is missing then counts as lost."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What became of each request, in the order of their times.

    Attributes
    ----------
    sent, done : array of float64, shape (n,)
        Seconds from the start; done is NaN where nothing came back.
    status : array of int8, shape (n,)
        gRPC's status; -1 where nothing came back.
    messages : dict of str to int
        What the server said where the status is not 0, and how often.
    generator_s : float
        Seconds of processor time that sending and receiving took.
    """

    sent: np.ndarray
    done: np.ndarray
    status: np.ndarray
    messages: dict[str, int]
    generator_s: float


def send_load(address: str, path: str, bodies: Sequence[bytes], times: np.ndarray, streams: np.ndarray) -> Outcome:
    """Send one of `bodies` at each of `times`.

    Parameters
    ----------
    address : str
        HOST:PORT of the server.
    path : str
        Method, such as "/inference.GRPCInferenceService/ModelInfer".
    bodies : sequence of bytes
        Serialized requests; they take turns.
    times : array, shape (n,)
        Seconds from the start, not decreasing.
    streams : array of int, shape (n,)
        Which connection each request takes.
    """
    n = len(times)
    sent, done, status = np.full(n, np.nan), np.full(n, np.nan), np.full(n, -1, np.int8)
    messages: dict[str, int] = {}
    prepared = [_frames(body) for body in bodies]
    poll = select.epoll()
    connections = [_Connection(address, path) for _ in range(int(streams.max()) + 1)]
    by_file = {c.sock.fileno(): c for c in connections}
    for file in by_file:
        poll.register(file, select.EPOLLIN)
    when, which = times.tolist(), streams.tolist()
    used = time.process_time()
    start = time.perf_counter() + 0.05
    ends = when[-1] + GRACE
    i = left = 0
    while (i < n or left) and (now := time.perf_counter() - start) < ends:
        while i < n and when[i] <= now:
            connection = connections[which[i]]
            connection.request(i, prepared[i % len(prepared)])
            _watch(poll, connection)
            sent[i] = now
            i, left, now = i + 1, left + 1, time.perf_counter() - start
        until = max(0.0, (when[i] if i < n else ends) - now)
        if not select.select([poll], [], [], until)[0]:  # epoll itself waits for whole milliseconds
            continue
        for file, event in poll.poll(0):
            connection = by_file[file]
            if event & ~select.EPOLLOUT:
                for request, code, message in connection.receive():
                    done[request], status[request] = time.perf_counter() - start, code
                    left -= 1
                    if code:
                        messages[message] = messages.get(message, 0) + 1
            connection.flush()
            _watch(poll, connection)
    used = time.process_time() - used
    for connection in connections:
        connection.sock.close()
    poll.close()
    return Outcome(sent=sent, done=done, status=status, messages=messages, generator_s=used)


def _watch(poll: select.epoll, connection: _Connection) -> None:
    """Wait for room to write only where the kernel had none."""
    if connection.blocked != connection.watched:
        poll.modify(connection.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if connection.blocked else 0))
        connection.watched = connection.blocked


def _frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">IBI", len(content) << 8 | kind, flags, stream) + content


def _frames(body: bytes) -> list[memoryview]:
    """Return a request's message, in parts of a frame each."""
    message = memoryview(struct.pack(">BI", 0, len(body)) + body)
    return [message[at : at + FRAME] for at in range(0, len(message), FRAME)]


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


class _Connection:
    """One HTTP/2 connection of a client that never looks at more than a status."""

    def __init__(self, address: str, path: str) -> None:
        host, _, port = address.rpartition(":")
        self.sock = socket.create_connection((host, int(port)))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)
        self.blocked = self.watched = False
        self._head = b"\x83\x86" + b"".join(  # POST, http
            _literal(name, value)
            for name, value in (
                (b":path", path.encode()),
                (b":authority", address.encode()),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
            )
        )
        # No table of headers, so that statuses come as plain text.
        settings = _frame(SETTINGS, 0, 0, struct.pack(">HI", HEADER_TABLE_SIZE, 0))
        self._out: deque[memoryview] = deque([memoryview(PREFACE + settings)])
        self._in = b""
        self._next, self._credit, self._window = 1, WINDOW, WINDOW
        self._credits: dict[int, int] = {}  # bytes that the server takes for each stream
        self._waiting: deque[tuple[int, deque[memoryview]]] = deque()
        self._requests: dict[int, int] = {}
        self.flush()

    def request(self, number: int, frames: list[memoryview]) -> None:
        """Send a request; `receive` gives its `number` back."""
        stream, self._next = self._next, self._next + 2
        self._requests[stream] = number
        self._credits[stream] = self._window
        self._out.append(memoryview(_frame(HEADERS, END_HEADERS, stream, self._head)))
        self._waiting.append((stream, deque(frames)))
        self.flush()

    def flush(self) -> None:
        """Send what the server and the kernel take now."""
        while self._waiting:
            stream, frames = self._waiting[0]
            if stream not in self._requests:  # refused before it was sent
                self._waiting.popleft()
                continue
            size = min(len(frames[0]), self._credit, self._credits[stream])
            if size < len(frames[0]):
                if size <= 0:
                    break
                frames.appendleft(frames[0][:size])
                frames[1] = frames[1][size:]
            content = frames.popleft()
            self._credit -= size
            self._credits[stream] -= size
            last = END_STREAM if not frames else 0
            self._out += (memoryview(struct.pack(">IBI", size << 8 | DATA, last, stream)), content)
            if not frames:
                self._waiting.popleft()
        self.blocked = False
        while self._out:
            parts = [self._out[k] for k in range(min(len(self._out), 32))]
            try:
                n = self.sock.sendmsg(parts)
            except BlockingIOError:
                self.blocked = True
                return
            while n:
                part = self._out.popleft()
                if n < len(part):
                    self._out.appendleft(part[n:])
                    break
                n -= len(part)

    def receive(self) -> list[tuple[int, int, str]]:
        """Read what is there, and return number, status and message of the requests that ended."""
        try:
            got = self.sock.recv(1 << 16)
        except BlockingIOError:
            return []
        if not got:
            raise ConnectionError("The server closed a connection.")
        data, at, ended = self._in + got, 0, []
        while len(data) - at >= 9:
            head, flags, stream = struct.unpack_from(">IBI", data, at)
            size, kind = head >> 8, head & 255
            if len(data) - at < 9 + size:
                break
            content = data[at + 9 : at + 9 + size]
            at += 9 + size
            if kind == HEADERS and flags & END_STREAM:
                ended.append((self._end(stream), *_status(content)))
            elif kind == WINDOW_UPDATE:
                (more,) = struct.unpack(">I", content)
                if not stream:
                    self._credit += more
                elif stream in self._credits:
                    self._credits[stream] += more
            elif kind == SETTINGS and not flags & ACK:
                for name, value in struct.iter_unpack(">HI", content):
                    if name == INITIAL_WINDOW_SIZE:
                        for each in self._credits:
                            self._credits[each] += value - self._window
                        self._window = value
                self._out.append(memoryview(_frame(SETTINGS, ACK, 0)))
            elif kind == PING and not flags & ACK:
                self._out.append(memoryview(_frame(PING, ACK, 0, content)))
            elif kind == DATA and size:  # room for as much again
                self._out.append(memoryview(_frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", size))))
            elif kind == RST_STREAM and stream in self._requests:
                ended.append((self._end(stream), 13, "the server reset a request"))
            elif kind == GOAWAY:
                raise ConnectionError(f"The server ends a connection: {content[8:]!r}")
        self._in = data[at:]
        return ended

    def _end(self, stream: int) -> int:
        del self._credits[stream]
        return self._requests.pop(stream)


def _status(headers: bytes) -> tuple[int, str]:
    """Return gRPC's status and message from a block of plain headers."""
    code, message = (_value(headers, name) for name in (b"grpc-status", b"grpc-message"))
    return int(code), message


def _value(headers: bytes, name: bytes) -> str:
    _, found, rest = headers.partition(name)
    return rest[1 : 1 + rest[0]].decode() if found else ""
