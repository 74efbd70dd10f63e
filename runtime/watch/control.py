"""Hands the commands of the page from its server to the decoder's process, and the answers back."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse

from sjepa_deploy.files import load_json

MOST_BYTES = 8192
"""Bytes of the body of a command."""

MOST_WAITING = 8
"""Commands that wait for the decoder at once."""

ANSWER_S = 5.0
"""Seconds after which a command counts as unanswered."""


def is_own_origin(headers: Headers) -> bool:
    """Return whether a request comes from the page itself, or from a program that sends the token in a header.

    A browser names the site from which a POST comes, and sends cookies with it. No browser sends ``Authorization: Bearer`` to
    another site unless that site allows it.
    """
    origin = headers.get("origin")
    if origin is None:
        return headers.get("authorization", "").lower().startswith("bearer ")
    return urlsplit(origin).netloc == headers.get("host", "") and urlsplit(origin).scheme in ("http", "https")


class Control:
    """Answers POST /command.

    Parameters
    ----------
    write : callable
        Writes a line to the decoder's process.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def answer_request(self, request: Request) -> JSONResponse:
        """Hand the command of the body to the decoder, and return its answer."""
        if not is_own_origin(request.headers):
            return _refused(403, "Commands come from the page of this server alone.")
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return _refused(415, "A command is JSON (Content-Type: application/json).")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return _refused(413, f"A command has at most {MOST_BYTES} bytes.")
        try:
            command = load_json(body)
        except ValueError:
            return _refused(400, "The command is no JSON.")
        if len(self._waiting) >= MOST_WAITING:
            return _refused(429, "Too many commands wait.")
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._write(json.dumps({"number": number, "command": command}).encode() + b"\n")
            answer = await asyncio.wait_for(future, ANSWER_S)
        except TimeoutError:
            return _refused(504, "The decoder has not answered. It may still take the command.")
        finally:
            del self._waiting[number]
        return JSONResponse(answer, 200 if answer["accepted"] else 409)

    def answer(self, message: dict[str, Any]) -> None:
        """Take an answer of the decoder's process."""
        future = self._waiting.get(message["answer"])
        if future is not None and not future.done():
            future.set_result({"accepted": message["accepted"], "text": message["text"]})


def _refused(status: int, text: str) -> JSONResponse:
    return JSONResponse({"accepted": False, "text": text}, status)
