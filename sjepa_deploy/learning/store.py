"""Holds windows in memory, or in a mapped file where they do not fit.

The file lies in the cache folder and has no name: it is gone when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DataError
from sjepa_deploy.files import cache_folder

PIECE_BYTES = 64 << 20
"""Size of the pieces in which large arrays are read."""

MEMORY_SHARE = 0.25
"""Share of the memory that is available which windows may take. The network, and a copy while recordings are read, need more."""


def available_memory() -> int:
    """Return the memory in bytes that is available: of Linux what can be had without swapping, elsewhere all that is built in."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return kib["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class WindowStore:
    """Joins arrays of windows that come one after the other.

    Parameters
    ----------
    memory : float or None
        Bytes that may be held in memory; more go into a mapped file. None: `MEMORY_SHARE` of what is available.
    """

    def __init__(self, memory: float | None = None) -> None:
        self.memory = MEMORY_SHARE * available_memory() if memory is None else memory
        self._parts: list[NDArray[np.float32]] = []
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._n = 0

    @property
    def in_file(self) -> bool:
        """Return whether the windows went into a file."""
        return self._file is not None

    def append(self, eeg: NDArray[np.float32]) -> None:
        """Add windows, shape (n_windows, n_chans, n_times).

        Raises
        ------
        DataError
            If the cache folder cannot be written, or is full.
        """
        self._n += len(eeg)
        self._shape = eeg.shape[1:]
        self._parts.append(eeg)
        mapped = [is_mapped(part) for part in self._parts]
        held = sum(part.nbytes for part, there in zip(self._parts, mapped, strict=True) if not there)
        if self.in_file or held > self.memory or (any(mapped) and len(mapped) > 1):  # what is mapped is not read into memory
            self._spill()

    def windows(self) -> NDArray[np.float32]:
        """Return all windows, in memory or mapped (copy on write). Call it once."""
        if self._file is not None:
            with self._file as file:
                file.flush()
                return np.memmap(file, np.float32, "c", shape=(self._n, *self._shape))
        if len(self._parts) == 1:
            return self._parts.pop()
        joined = np.empty((self._n, *self._shape), dtype=np.float32)
        done = 0
        while self._parts:  # each part is freed once it is copied
            part = self._parts.pop(0)
            joined[done : done + len(part)] = part
            done += len(part)
        return joined

    def _spill(self) -> None:
        folder = cache_folder("windows")
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            while self._parts:
                for piece in pieces_of(self._parts.pop(0)):
                    self._file.write(np.ascontiguousarray(piece, dtype=np.float32).data)
        except OSError as e:
            raise DataError(
                f"The windows take more than {self.memory / 2**30:.3g} GiB, and {folder} cannot hold them ({e.strerror}).",
                "Make space there, name another folder in the variable XDG_CACHE_HOME, or use --memory GIB.",
            ) from e


def is_mapped(array: NDArray[Any]) -> bool:
    """Return whether an array is a view of a mapped file."""
    base: Any = array
    while base is not None:
        if isinstance(base, np.memmap):
            return True
        base = getattr(base, "base", None)
    return False


def pieces_of(array: NDArray[Any], nbytes: int | None = None) -> Iterator[NDArray[Any]]:
    """Give an array in pieces along its first axis whose rows, of `nbytes` each, take up to `PIECE_BYTES`."""
    n = max(1, PIECE_BYTES // max(1, array[:1].nbytes if nbytes is None else nbytes))
    for start in range(0, len(array), n):
        yield array[start : start + n]


def mapped_member(path: Path, name: str) -> NDArray[Any] | None:
    """Map an array of an ``.npz`` file (copy on write). Return None if the array is compressed or not in C order.

    Raises
    ------
    OSError, ValueError, KeyError, zipfile.BadZipFile
        If the file is damaged, or has no such array.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        file.seek(member.header_offset + 26)  # lengths of the name and of the extra field, APPNOTE.TXT 4.3.7
        lengths = file.read(4)
        file.seek(member.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little"))
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if fortran or dtype.hasobject or 0 in shape:
            return None
        return np.memmap(file, dtype, "c", offset=file.tell(), shape=shape)
