"""Serves the messages of a decoder to clients, and takes their commands. `runtime.feedback.feedback` starts this process.

Messages come on standard input, and commands go to standard output, as JSON lines. What is no command never reaches the decoder's
process. A connection is read again when its last command was answered. The server ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import websockets
from websockets.asyncio.server import ServerConnection, serve

from sjepa_deploy.errors import CommandError
from sjepa_deploy.runtime.feedback.requests import (
    BUILT_IN,
    MOST_BYTES,
    Request,
    looks_like_http,
    primary_name,
    read_object,
    read_primary,
    read_request,
)
from sjepa_deploy.runtime.live.commands import COMMANDS
from sjepa_deploy.serialize import encode

MOST_CLIENTS = 32
"""Clients at a time that were let in. A further connection is closed."""

MOST_STRANGERS = 16
"""Connections at a time that have not shown the token. One more takes the place of the oldest of them."""

TOKEN_S = 3.0
"""Seconds that a client has to show the token."""

MOST_BEHIND = 1000
"""Messages that wait for a client. One that is further behind is let go."""

SEND_S = 5.0
"""Seconds that a message may wait for a client that does not read."""

MOST_MALFORMED = 100
"""Lines that are no command after which a client is let go. As its first line, one is enough."""

COUNTS_EVERY_S = 0.5
"""Seconds from one look at the counts to the next."""

LONGEST_MESSAGE = 2**24
"""Bytes of a message of the decoder: predictions of a base model have 10^5 values."""

LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")


class Client:
    """Holds what waits for one connection.

    Parameters
    ----------
    send : callable
        Sends messages.
    abort : callable
        Ends the connection at once.
    """

    def __init__(self, send: Callable[[list[str]], Awaitable[None]], abort: Callable[[], None]) -> None:
        self.is_stranger = True
        self.let_go = False
        self.abort = abort
        self._send = send
        self._waiting: asyncio.Queue[str | None] = asyncio.Queue(MOST_BEHIND)
        self.answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def put(self, text: str | None) -> bool:
        """Send a message soon, None as the last one. Returns False if too many wait."""
        try:
            self._waiting.put_nowait(text)
        except asyncio.QueueFull:
            return False
        return True

    async def write(self) -> bool:
        """Send what waits until the last message. Returns False if the client does not read."""
        while True:
            texts = [await self._waiting.get()]
            while not self._waiting.empty():
                texts.append(self._waiting.get_nowait())
            try:
                await asyncio.wait_for(self._send([text for text in texts if text is not None]), SEND_S)
            except asyncio.TimeoutError:
                return False
            if texts[-1] is None:
                return True


class Server:
    """Serves messages to clients.

    Parameters
    ----------
    start : dict
        First line of standard input: the token or None, the allowed origins, and the first message for a client.
    """

    def __init__(self, start: dict[str, Any]) -> None:
        self._token: str | None = start["token"]
        self._origins: list[str] = start["origins"]
        self._head: str = start["head"]
        self._clients: dict[int, Client] = {}
        self._n_clients = 0
        self.counts = Counter({"clients": 0, "refused": 0, "malformed": 0, "let go": 0})
        self._ending = False

    async def run(self, pipe: asyncio.StreamReader, listeners: dict[str, socket.socket]) -> None:
        """Serve until standard input ends."""
        async with contextlib.AsyncExitStack() as closing:
            await closing.enter_async_context(
                await asyncio.start_server(self._take_lines, sock=listeners["lines"], limit=MOST_BYTES)
            )
            if "websocket" in listeners:
                await closing.enter_async_context(
                    serve(
                        self._take_websocket,
                        sock=listeners["websocket"],
                        origins=[None, LOOPBACK_ORIGIN, *self._origins],  # type: ignore[list-item]
                        max_size=MOST_BYTES,
                        max_queue=4,
                        compression=None,
                        open_timeout=TOKEN_S,
                        close_timeout=1,
                        server_header=None,
                    )
                )
            if "dareplane" in listeners:
                await closing.enter_async_context(
                    await asyncio.start_server(self._take_primaries, sock=listeners["dareplane"], limit=MOST_BYTES)
                )
            counting = asyncio.create_task(self._tell_counts())
            while line := await pipe.readline():
                self._pass_on(json.loads(line))
                await asyncio.sleep(0)  # a line that is there already would be taken before those who send are let in
            self._ending = True
            counting.cancel()
            for client in list(self._clients.values()):
                if not client.put(None):
                    client.abort()
            for _ in range(20):  # two seconds to read the last messages
                if not self._clients:
                    break
                await asyncio.sleep(0.1)
            for client in list(self._clients.values()):
                client.abort()
            _say({"counts": self.counts})

    def _pass_on(self, line: dict[str, Any]) -> None:
        if "head" in line:
            self._head = line["head"]
        elif "to" in line:
            if (client := self._clients.get(line["to"])) is not None:
                client.answers.put_nowait(line["reply"])
        else:
            for client in list(self._clients.values()):
                if not client.is_stranger and not client.let_go and not client.put(line["message"]):
                    self._let_go(client)

    def _let_go(self, client: Client) -> None:
        if not client.let_go:
            client.let_go = True
            self.counts["let go"] += 1
            client.abort()

    async def _tell_counts(self) -> None:
        told: Counter[str] | None = None
        while True:
            if told != self.counts:
                told = self.counts.copy()
                _say({"counts": told})
            await asyncio.sleep(COUNTS_EVERY_S)

    # ------------------------------------------------------------------ connections

    async def _serve(self, client: Client, talk: Callable[[int, Client], Awaitable[None]], *, is_stranger: bool) -> None:
        """Talk to a client until its connection ends, while its messages are sent."""
        strangers = [each for each in self._clients.values() if each.is_stranger and not each.let_go]
        if len(strangers) >= MOST_STRANGERS:
            self.counts["refused"] += 1
            strangers[0].let_go = True
            strangers[0].abort()
        if self._ending or self.counts["clients"] >= MOST_CLIENTS:
            self.counts["refused"] += 1
            client.abort()
            return
        self._n_clients += 1
        number = self._n_clients
        self._clients[number] = client
        writing = asyncio.create_task(client.write())
        talking = asyncio.ensure_future(talk(number, client))
        try:
            if not is_stranger:
                self._let_in(client)
            await asyncio.wait({writing, talking}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done() and not writing.cancelled() and writing.exception() is None and not writing.result():
                self._let_go(client)
            elif talking.done() and client.put(None):  # what was said last is sent
                await asyncio.wait({writing}, timeout=SEND_S)
        finally:
            for task in (writing, talking):
                task.cancel()
            await asyncio.gather(writing, talking, return_exceptions=True)
            del self._clients[number]
            self.counts["clients"] -= not client.is_stranger

    def _let_in(self, client: Client) -> None:
        client.is_stranger = False
        self.counts["clients"] += 1
        client.put(self._head)

    async def _converse(self, number: int, client: Client, read: Callable[[], Awaitable[bytes | str]]) -> None:
        """Take the commands of a client as JSON, each after the answer to the last one."""
        n_malformed, is_first = 0, True
        if client.is_stranger and not await self._shows_token(client, read):
            self.counts["refused"] += 1
            return
        while line := await read():
            if isinstance(line, bytes) and looks_like_http(line):
                self.counts["refused"] += 1
                return
            if not line.strip():
                continue
            try:
                request = read_request(read_object(line))
            except CommandError as e:
                self.counts["malformed"] += 1
                n_malformed += 1
                client.put(json.dumps({"type": "error", "text": str(e)}))
                if is_first or n_malformed >= MOST_MALFORMED:
                    return
                continue
            is_first = False
            client.put(json.dumps(await self._ask(number, client, request)))

    async def _shows_token(self, client: Client, read: Callable[[], Awaitable[bytes | str]]) -> bool:
        assert self._token is not None
        try:
            line = await asyncio.wait_for(read(), TOKEN_S)
            if isinstance(line, bytes) and looks_like_http(line):
                return False
            given = read_object(line).get("token")
        except (CommandError, asyncio.TimeoutError):
            given = None
        if not isinstance(given, str) or not hmac.compare_digest(given.encode("utf-8", "replace"), self._token.encode()):
            client.put(json.dumps({"type": "error", "text": 'The first message must be the token: {"token": "..."}.'}))
            return False
        self._let_in(client)
        return True

    @staticmethod
    async def _ask(number: int, client: Client, request: Request) -> dict[str, Any]:
        """Hand a command to the decoder, and return its reply."""
        _say({"client": number, "command": encode(request.command)})
        reply = await client.answers.get()
        return reply if request.id is None else reply | {"id": request.id}

    async def _take_lines(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def talk(number: int, client: Client) -> None:
            await self._converse(number, client, lambda: _read_until(reader, b"\n"))

        await self._serve_stream(writer, talk, is_stranger=self._token is not None)

    async def _take_primaries(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def talk(number: int, client: Client) -> None:
            client.is_stranger = False
            self.counts["clients"] += 1
            writer.write(b"Connected to sjepa-stream\n")
            n_malformed = 0
            while text := await _read_until(reader, b";"):
                if looks_like_http(text):
                    self.counts["refused"] += 1
                    return
                if not (text := text.rstrip(b";").strip()):
                    continue
                try:
                    asked = read_primary(text)
                except CommandError:
                    self.counts["malformed"] += 1
                    n_malformed += 1
                    if n_malformed >= MOST_MALFORMED:
                        return
                    continue
                if asked == "CLOSE":
                    return
                if asked == "UP":
                    writer.write(b"1")
                elif asked == "GET_PCOMMS":
                    writer.write("|".join([*map(primary_name, COMMANDS), *BUILT_IN]).encode())
                elif not isinstance(asked, str):
                    await self._ask(number, client, Request(command=asked))  # a primary command has no answer

        await self._serve_stream(writer, talk, is_stranger=True, sends=False)

    async def _serve_stream(
        self,
        writer: asyncio.StreamWriter,
        talk: Callable[[int, Client], Awaitable[None]],
        *,
        is_stranger: bool,
        sends: bool = True,
    ) -> None:
        async def send(texts: list[str]) -> None:
            if sends:
                writer.write("".join(text + "\n" for text in texts).encode())
                await writer.drain()

        try:
            await self._serve(Client(send, writer.transport.abort), talk, is_stranger=is_stranger)
        finally:
            writer.close()

    async def _take_websocket(self, connection: ServerConnection) -> None:
        async def talk(number: int, client: Client) -> None:
            with contextlib.suppress(websockets.ConnectionClosed):
                await self._converse(number, client, connection.recv)

        async def send(texts: list[str]) -> None:
            for text in texts:
                await connection.send(text)

        client = Client(send, connection.transport.abort)
        with contextlib.suppress(websockets.ConnectionClosed):
            await self._serve(client, talk, is_stranger=True)


async def _read_until(reader: asyncio.StreamReader, end: bytes) -> bytes:
    """Return a line with its end; nothing where the connection ends, or a line is too long."""
    try:
        return await reader.readuntil(end)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
        return b""


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


async def run() -> None:
    """Serve on the sockets whose numbers are the arguments, in the order of the first line of standard input."""
    pipe = asyncio.StreamReader(limit=LONGEST_MESSAGE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(pipe), sys.stdin)
    start = json.loads(await pipe.readline())
    numbers = zip(start["listeners"], sys.argv[1:], strict=True)
    await Server(start).run(pipe, {kind: socket.socket(fileno=int(number)) for kind, number in numbers})


def main() -> None:
    """Serve until standard input ends."""
    asyncio.run(run())
