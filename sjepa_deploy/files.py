"""Reads, writes, hashes and locks files, and names the folders of caches."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sjepa_deploy.serialize import encode


def file_hash(file: Path) -> str:
    """Return the sha256 of `file`."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def bytes_hash(content: bytes) -> str:
    """Return the sha256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def canonical_json(value: object) -> str:
    """Return `value` as JSON text. Equal values give the same text."""
    return json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def seal(data: dict[str, Any]) -> str:
    """Return the digest of a JSON object: the sha256 of its canonical text with an empty ``digest``.

    The digest covers the content of the file. A digest of the decoded dataclass would change with every field that a later
    release adds.
    """
    return bytes_hash(canonical_json(data | {"digest": ""}).encode())


MAX_DEPTH = 100
"""Most levels of JSON that is read. Python's own limit of recursion would be met at another depth in each version."""


def load_json(text: bytes | str, *, finite: bool = True) -> Any:
    """Parse JSON.

    Parameters
    ----------
    text : bytes or str
        The JSON.
    finite : bool
        Whether NaN and Infinity, which Python adds to JSON, are errors.

    Raises
    ------
    ValueError
        If `text` is no JSON, is nested deeper than `MAX_DEPTH`, or is not finite where it must be.
    """

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON number")

    def as_float(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    hooks: dict[str, Any] = {"parse_constant": refuse, "parse_float": as_float} if finite else {}
    try:
        data = json.loads(text, **hooks)
    except RecursionError:
        raise _too_deep() from None
    level = [data]
    for _ in range(MAX_DEPTH):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return data
        level = [inner for value in containers for inner in (value.values() if isinstance(value, dict) else value)]
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def json_file(value: object) -> bytes:
    """Return `value` as the content of a JSON file that people may read."""
    return (json.dumps(encode(value), indent=1, allow_nan=False) + "\n").encode()


@contextlib.contextmanager
def file_lock(file: Path, *, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock on `file`. When a process dies, its lock is free again.

    Parameters
    ----------
    file : Path
        A file that serves as lock only. A missing file is made, and so is its folder.
    waiting : callable
        Called once if another process holds the lock.

    Raises
    ------
    OSError
        If the file cannot be made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def now() -> str:
    """Return the current time in the format of our records."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


def cache_folder(name: str) -> Path:
    """Return the folder of one of our caches: ``$XDG_CACHE_HOME/sjepa-deploy/NAME``, by default in ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "sjepa-deploy" / name


@contextlib.contextmanager
def written_beside(file: Path) -> Iterator[Path]:
    """Give a path beside `file` to write to, with the same suffix. A file left at this path is removed at the end."""
    path = file.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}-{file.name}")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Give a path to write to, and replace `file` when the block ends without an error. A killed process changes nothing."""
    with written_beside(file) as path:
        yield path
        on_disk(path)
        path.replace(file)


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file in an existing folder. The file is replaced as a whole or not at all."""
    with written_whole(file) as path:
        path.write_bytes(content)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path`, and delete the folder at the end if it was not moved.

    The name of the folder is ``.NAME.partial-*``. Its process locks the folder. A killed process leaves its folder unlocked: the
    next call for the same `path` deletes such folders first. A file system without locks keeps them.
    """
    prefix = f".{path.name}.partial-"
    for left in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        with _folder_lock(left) as locked:
            if locked:
                shutil.rmtree(left, ignore_errors=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=path.parent))
        with _folder_lock(folder) as locked:
            if locked is None or not folder.exists():  # another process took it for a killed one's, and deletes it
                continue
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            return


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[bool | None]:
    """Lock `folder` and give True. Give None if another process holds the lock or the folder is gone, and False without locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        locked: bool | None = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = None
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def remove_partial(file: Path) -> None:
    """Delete what killed processes left of `file`. No other process may write the file meanwhile."""
    for left in file.parent.iterdir():
        if left.name.startswith(".partial-") and left.name.endswith(f"-{file.name}"):
            left.unlink(missing_ok=True)


def on_disk(file: Path) -> None:
    """Wait until the content of `file` would survive a loss of power."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, so that both always exist. Return False if the system cannot exchange paths.

    See `RENAME_EXCHANGE` in renameat2(2).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS):  # of a file system, and of a kernel, that have no exchange
        return False
    raise OSError(error, os.strerror(error), str(other))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
