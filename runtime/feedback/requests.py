"""Reads what clients of the feedback socket ask: commands as JSON, and Dareplane's primary commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sjepa_deploy.errors import CommandError, listed
from sjepa_deploy.files import load_json
from sjepa_deploy.runtime.live.commands import COMMANDS, Command
from sjepa_deploy.serialize import DecodeError, decode

MOST_BYTES = 65_536
"""Bytes of a line, or of a WebSocket message."""

MOST_ID_CHARACTERS = 100
"""Characters of an id."""

BUILT_IN = ("CLOSE", "GET_PCOMMS", "UP")
"""What Dareplane's own servers answer beside their primary commands and STOP."""

_HTTP = re.compile(rb"\s*[A-Za-z]+ +\S+ +HTTP/|\x16\x03")  # a request line, or the first bytes of TLS


@dataclass(frozen=True, kw_only=True)
class Request:
    """Holds what a client asks.

    Attributes
    ----------
    command : Command
        The command.
    id : str, int or None
        What the reply will carry, for the client to know which command was answered.
    """

    command: Command
    id: str | int | None = None


def looks_like_http(line: bytes) -> bool:
    """Return whether bytes are the beginning of an HTTP request: any web page lets a browser send one to this machine."""
    return _HTTP.match(line) is not None


def read_object(text: str | bytes) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    CommandError
        If it is none.
    """
    try:
        data = load_json(text)
    except ValueError as e:  # also of bytes that are no UTF-8
        raise CommandError(f"This is no JSON ({e}).", "Send one JSON object a line.") from e
    if not isinstance(data, dict):
        raise CommandError("This is no JSON object.", 'Send an object, as {"command": "status"}.')
    return data


def read_request(data: dict[str, Any]) -> Request:
    """Read a command and its id from a JSON object.

    Raises
    ------
    CommandError
        If it is none.
    """
    fields = dict(data)
    number = fields.pop("id", None)
    fits = number is None or (isinstance(number, str) and len(number) <= MOST_ID_CHARACTERS) or type(number) is int
    if not fits:
        raise CommandError(
            "The id is no number and no short text.", f"Use a whole number, or up to {MOST_ID_CHARACTERS} characters."
        )
    name = fields.get("command")
    if not isinstance(name, str) or name not in COMMANDS:
        raise CommandError(f"{name!r} is no command.", f"The commands are {listed(sorted(COMMANDS), len(COMMANDS))}.")
    try:
        return Request(command=decode(Command, fields), id=number)
    except DecodeError as e:
        raise CommandError(f"This is no command {name}: {e}.", f"Mend what {name} carries.") from e


def read_primary(text: bytes) -> Command | str:
    """Read a primary command of Dareplane: ``NAME`` or ``NAME|{json}``, names in capitals with underscores.

    Returns
    -------
    Command or str
        The command; or one of `BUILT_IN`.

    Raises
    ------
    CommandError
        If it is none.
    """
    name, _, payload = text.strip().partition(b"|")
    built_in = name.decode("ascii", "replace")
    if built_in in BUILT_IN:
        return built_in
    known = {primary_name(each): each for each in COMMANDS}
    if built_in not in known:
        raise CommandError("This is no primary command.", f"The commands are {', '.join(known)}.")
    arguments = read_object(payload) if payload.strip() else {}
    return read_request(arguments | {"command": known[built_in]}).command


def primary_name(command: str) -> str:
    """Return the name of a command among Dareplane's primary commands: "bad channels" is BAD_CHANNELS."""
    return command.replace(" ", "_").upper()
