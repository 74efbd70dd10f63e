"""Reads, writes, hashes and locks files."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sjepa_deploy.errors import EngineError
from sjepa_deploy.serialize import encode


def file_hash(file: Path) -> str:
    """Return the sha256 of `file`."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def canonical_json(value: object) -> str:
    """Return `value` as JSON that is the same text for equal values."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def load_json(text: bytes) -> Any:
    """Parse JSON, without Python's additions NaN and Infinity."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    return json.loads(text, parse_constant=refuse, parse_float=finite)


@contextlib.contextmanager
def file_lock(file: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on `file`, which a process that dies gives back."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("w")
    except OSError as e:
        raise EngineError(f"{file} cannot be written ({e.strerror}).", "Give the folder room and rights.") from e
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def now() -> str:
    """Return the time as a record states it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def bytes_hash(content: bytes) -> str:
    """Return the sha256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file in an existing folder, which is replaced whole or not at all."""
    with written_beside(file, content) as waiting:
        waiting.replace(file)


@contextlib.contextmanager
def written_beside(file: Path, content: bytes) -> Iterator[Path]:
    """Give `content` in a file that is on the disk, ready to replace `file`; where it does not, nothing of it stays."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.partial-", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)
