"""Serves the states of a decoder over HTTP. `runtime.watch.dashboard` starts this process and writes the states to its pipe.

``/`` is the page, ``/events`` its states as server-sent events, ``/metrics`` the states for Prometheus, and ``/healthz`` tells a
watchdog whether decisions come. ``/command``, which is there on request alone, takes commands to the decoder; without it a client
can change nothing. The server ends when the pipe does.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http.cookies import CookieError, SimpleCookie
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sjepa_deploy.runtime.watch.control import Control
from sjepa_deploy.runtime.watch.metrics import Metrics
from sjepa_deploy.runtime.watch.page import page_text, security_policy

N_RECENT = 2048
"""Decisions that a new client gets to draw."""

N_REPEATED = 256
"""Decisions that every state repeats, so that a client may miss some states."""

TRACE_BINS, REPEATED_BINS = 750, 75
"""Bins of the traces that a new client gets to draw, and that every state repeats."""

MAX_STREAMS = 16
"""Pages at a time. One more page takes the place of the page that has been open the longest."""

MAX_STRANGERS = 32
"""Connections at a time that have sent no request which was let in. One more connection takes the place of another."""

MAX_CONNECTIONS = 128
"""Connections at a time."""

REQUEST_TIMEOUT = 5.0
"""Seconds that a client may take to send the headers of a request."""

SEND_TIMEOUT = 5.0
"""Seconds after which a client that does not read is let go."""

STALE_AFTER = 5.0
"""Seconds without a state from the decoder's process after which it is not healthy."""

MAX_LINE = 2**24
"""Bytes of the longest line on the pipe: some thousand channels and decisions."""


class Feed:
    """A Feed holds the newest state, and wakes the pages that wait for the next one.

    Attributes
    ----------
    facts, state : dict
        What `describe` and `describe_state` return.
    decisions, traces : dict of str to deque
        The newest decisions, and the newest bins of the traces, by column.
    ended : bool
        Whether there will be no more states.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.state: dict[str, Any] = {}
        self.decisions: dict[str, deque[Any]] = {}
        self.traces: dict[str, deque[Any]] = {}
        self.ended = False
        self._pages: list[object] = []
        self._taken_at = 0.0
        self._event = b""
        self._changed = asyncio.Event()

    async def read(self, pipe: asyncio.StreamReader, control: Control | None = None) -> None:
        """Take states, and answers to commands, from the pipe until it ends."""
        while line := await pipe.readline():
            state = json.loads(line)
            if "answer" in state:
                if control is not None:
                    control.answer(state)
                continue
            _extend(self.decisions, state.pop("new"), N_RECENT)
            _extend(self.traces, state.pop("traces", {}), TRACE_BINS)
            self.facts |= state.get("facts", {})  # another bundle may have been loaded
            self.state = state
            self._taken_at = time.monotonic()
            repeated = {"recent": self.recent(N_REPEATED), "traces": _newest(self.traces, REPEATED_BINS)}
            self._event = server_sent_event("state", state | repeated)
            self._wake()
        self.ended = True
        self._wake()

    def recent(self, n: int) -> dict[str, list[Any]]:
        """Return the newest `n` decisions by column."""
        return _newest(self.decisions, n)

    @property
    def silence(self) -> float:
        """Return the seconds since the last state."""
        return time.monotonic() - self._taken_at

    @property
    def streams(self) -> int:
        """Return the number of pages that are open."""
        return len(self._pages)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the facts, and then always the newest state: a slow reader misses the ones between.

        The last event is "end" if there will be no more states, or "displaced" if newer pages need the place.
        """
        page = object()
        self._pages.append(page)
        if len(self._pages) > MAX_STREAMS:
            del self._pages[0]
            self._wake()
        try:
            begin = {"recent": self.recent(N_RECENT), "traces": _newest(self.traces, TRACE_BINS)}
            yield server_sent_event("facts", self.facts | begin)
            seen = b""
            while page in self._pages and not (self.ended and seen is self._event):
                if seen is self._event:
                    await self._changed.wait()
                    continue
                seen = self._event
                yield seen
            yield server_sent_event("end" if page in self._pages else "displaced", {})
        finally:
            if page in self._pages:
                self._pages.remove(page)


def _extend(kept: dict[str, deque[Any]], new: dict[str, list[Any]], most: int) -> None:
    for name, values in new.items():
        kept.setdefault(name, deque(maxlen=most)).extend(values)


def _newest(kept: dict[str, deque[Any]], n: int) -> dict[str, list[Any]]:
    return {name: list(values)[-n:] for name, values in kept.items()}


def server_sent_event(name: str, data: object) -> bytes:
    """Return one event of a text/event-stream."""
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


class Connection(H11Protocol):
    """Limits a connection of uvicorn: it must send a request in time, and makes way for others until a request is let in.

    uvicorn itself waits for the first request for ever, and counts all connections alike.
    """

    def __init__(self, config: uvicorn.Config, server_state: Any, app_state: dict[str, Any], **options: Any) -> None:
        super().__init__(config, server_state, app_state | {"connection": self}, **options)
        self.is_stranger = True
        self._opened_at = 0.0
        self._request_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the place of another stranger if there are too many: the oldest one of the address that has the most."""
        super().connection_made(transport)
        self._opened_at = self.loop.time()
        self._await_request()
        strangers = [each for each in self.connections if isinstance(each, Connection) and each.is_stranger]
        if len(strangers) > MAX_STRANGERS:
            of_address = Counter(each._host for each in strangers)
            leaving = max(strangers, key=lambda each: (of_address[each._host], -each._opened_at))
            self.connections.discard(leaving)
            leaving.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Take data, which may be a part of a request."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._request_timer is None and not self.transport.is_closing():
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _host(self) -> str:
        return self.client[0] if self.client else ""

    def _await_request(self) -> None:
        self._request_timer = self.loop.call_later(REQUEST_TIMEOUT, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None


class Guard:
    """Lets in clients that may read, and says in every answer what a browser may do with the answer.

    Parameters
    ----------
    app : callable
        The application.
    token : str or None
        Token that a client must know, sent as ``Authorization: Bearer``, or once as ``?token=``, which leaves a cookie.
    port : int
        Port of the server. Cookies are not told apart by ports, so it is part of the cookie's name.
    policy : str
        The Content-Security-Policy.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, port: int, policy: str) -> None:
        self._app = app
        self._names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}
        self._token = token
        self._cookie = f"sjepa-dashboard-{port}"
        # what the cookie holds does not tell the token
        self._pass = None if token is None else hmac.new(token.encode(), b"sjepa-dashboard", hashlib.sha256).hexdigest()
        self._headers = {
            "content-security-policy": policy,
            "cross-origin-resource-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""

        async def guarded_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await asyncio.wait_for(send(message), SEND_TIMEOUT)

        assert scope["type"] == "http"
        answer = self._answer(scope)
        if answer is None:
            scope["state"]["connection"].is_stranger = False
        await (answer or self._app)(scope, receive, guarded_send)

    def _answer(self, scope: Scope) -> Response | None:
        """Return the answer in place of the application's, if there is one."""
        headers = Headers(scope=scope)
        if not self._is_own_name(headers.get("host", "")):
            return PlainTextResponse("This name is not that of this machine: use its address.\n", 421)
        if self._token is None or self._pass is None:
            return None
        given = QueryParams(scope["query_string"]).get("token")
        if given is not None:
            if not _same(given, self._token):
                return PlainTextResponse("The token is wrong.\n", 403)
            answer = RedirectResponse(scope["path"], 303)
            answer.set_cookie(self._cookie, self._pass, httponly=True, samesite="lax")
            return answer
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if (kind.lower() == "bearer" and _same(bearer.strip(), self._token)) or _same(self._cookie_of(headers), self._pass):
            return None
        explanation = "This needs the token: open the address with ?token=..., or send it as Authorization: Bearer.\n"
        return PlainTextResponse(explanation, 401, {"www-authenticate": "Bearer"})

    def _is_own_name(self, host: str) -> bool:
        """Return whether a Host header is an address or this machine's name.

        A page of another site can have its own name resolve to this machine (DNS rebinding) and would then be of the same origin,
        but its requests carry that name.
        """
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        try:
            return name in self._names or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def _cookie_of(self, headers: Headers) -> str:
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return ""
        return cookies[self._cookie].value if self._cookie in cookies else ""


def _same(given: str, wanted: str) -> bool:
    """Compare in a time that does not tell how much is right."""
    return hmac.compare_digest(given.encode(), wanted.encode())


class EventStream(StreamingResponse):
    """Streams events, and ends their generator with the connection: the garbage collector does it some minutes later."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with aclosing(self._events):
            await super().__call__(scope, receive, send)


def make_app(feed: Feed, *, token: str | None, port: int, control: Control | None = None) -> ASGIApp:
    """Return the application that serves `feed`, and takes commands where there is a `control`."""
    html = page_text()
    registry = CollectorRegistry()
    registry.register(Metrics(feed))

    async def page(request: Request) -> Response:
        return Response(html, media_type="text/html")

    async def events(request: Request) -> Response:
        return EventStream(feed.events())

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    async def healthz(request: Request) -> Response:
        state = feed.state.get("state", "waiting")
        healthy = state in ("filling", "decoding", "paused") and feed.silence < STALE_AFTER
        return JSONResponse({"healthy": healthy, "state": state, "state_age": round(feed.silence, 3)}, 200 if healthy else 503)

    routes = {"/": page, "/events": events, "/metrics": metrics, "/healthz": healthz}
    found = [Route(path, endpoint) for path, endpoint in routes.items()]
    if control is not None:
        found.append(Route("/command", control.answer_request, methods=["POST"]))
    app = Starlette(routes=found)
    return Guard(app, token=token, port=port, policy=security_policy(html))


def _write_line(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


async def serve(listener: socket.socket) -> None:
    """Serve until standard input ends."""
    pipe = asyncio.StreamReader(limit=MAX_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), sys.stdin)
    start = json.loads(await pipe.readline())
    feed = Feed(start["facts"])
    control = Control(_write_line) if start["control"] else None
    config = uvicorn.Config(
        make_app(feed, token=start["token"], port=start["port"], control=control),
        http=Connection,
        ws="none",
        lifespan="off",
        log_level="critical",  # what a client does wrong is not the decoder's concern, and must fill no disk
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)

    async def read() -> None:
        await feed.read(pipe, control)
        server.should_exit = True

    reading = asyncio.create_task(read())
    await server.serve(sockets=[listener])
    await reading


def main() -> None:
    """Serve on the socket whose number is the argument."""
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1]))))
