"""Writes the chunks of XDF 1.0 files.

The format: https://github.com/sccn/xdf/wiki/Specifications. Every chunk is whole by itself, so that a file that ends anywhere
between two chunks is a file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

_FILE_HEADER, _STREAM_HEADER, _SAMPLES, _CLOCK_OFFSET, _BOUNDARY, _FOOTER = 1, 2, 3, 4, 5, 6  # tags
_BOUNDARY_UUID = bytes.fromhex("43a546dccbf5410fb30ed5467383cbe4")
_FORMATS = {"f4": "float32", "f8": "double64", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64"}
_XML = '<?xml version="1.0"?>'


def file_start() -> bytes:
    """Return what a file begins with."""
    return b"XDF:" + _chunk(_FILE_HEADER, f"{_XML}<info><version>1.0</version></info>".encode())


def stream_header(
    stream: int,
    name: str,
    kind: str,
    n_chans: int,
    *,
    sfreq: float = 0.0,
    dtype: np.dtype[Any] | None = None,
    channels: Sequence[tuple[str, str, str]] = (),
    described: str = "",
) -> bytes:
    """Return the header of a stream.

    Parameters
    ----------
    stream : int
        Number of the stream in the file.
    name, kind : str
        Its name and its type, such as "EEG".
    n_chans : int
        Number of its channels.
    sfreq : float
        Nominal rate in Hz; 0 is an irregular stream.
    dtype : dtype or None
        Type of its values; None is text.
    channels : sequence of (str, str, str)
        Label, type and unit of each channel.
    described : str
        XML that describes the stream further.
    """
    fmt = "string" if dtype is None else _FORMATS[dtype.str[1:]]
    each = "".join(
        f"<channel><label>{escape(label)}</label><type>{what}</type><unit>{unit}</unit></channel>"
        for label, what, unit in channels
    )
    xml = (
        f"{_XML}<info><name>{escape(name)}</name><type>{kind}</type><channel_count>{n_chans}</channel_count>"
        f"<nominal_srate>{sfreq!r}</nominal_srate><channel_format>{fmt}</channel_format>"
        f"<desc><channels>{each}</channels>{described}</desc></info>"
    )
    return _chunk(_STREAM_HEADER, struct.pack("<I", stream) + xml.encode())


def samples(stream: int, stamps: NDArray[np.float64], values: NDArray[Any]) -> bytes:
    """Return samples, shape (n_samples, n_chans), with their stamps in seconds."""
    rows = np.empty(len(stamps), np.dtype([("n", "u1"), ("stamp", "<f8"), ("values", values.dtype, (values.shape[1],))]))
    rows["n"], rows["stamp"], rows["values"] = 8, stamps, values
    return _chunk(_SAMPLES, struct.pack("<IBI", stream, 4, len(rows)) + rows.tobytes())


def text(stream: int, stamp: float, value: str) -> bytes:
    """Return one sample of text."""
    data = value.encode()
    return _chunk(_SAMPLES, struct.pack("<IBIBdBI", stream, 4, 1, 8, stamp, 4, len(data)) + data)


def clock_offset(stream: int, time: float, offset: float) -> bytes:
    """Return a measurement, at `time`, of the seconds that bring the stamps of a stream to the clock of the recorder."""
    return _chunk(_CLOCK_OFFSET, struct.pack("<Idd", stream, time, offset))


def boundary() -> bytes:
    """Return a mark at which a reader of a damaged file can begin again."""
    return _chunk(_BOUNDARY, _BOUNDARY_UUID)


def stream_footer(stream: int) -> bytes:
    """Return the end of a stream."""
    return _chunk(_FOOTER, struct.pack("<I", stream) + f"{_XML}<info/>".encode())


def _chunk(tag: int, content: bytes) -> bytes:
    return b"\x08" + struct.pack("<QH", len(content) + 2, tag) + content
