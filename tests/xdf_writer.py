"""Writes XDF files from the specification alone (github.com/sccn/xdf/wiki/Specifications), for tests of what reads them."""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

FILE_HEADER, STREAM_HEADER, SAMPLES, CLOCK_OFFSET, BOUNDARY, STREAM_FOOTER = range(1, 7)
FORMATS = {np.dtype("<f4"): "float32", np.dtype("<f8"): "double64", np.dtype("<i2"): "int16", np.dtype("<i4"): "int32"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """One stream of a file.

    Attributes
    ----------
    name, kind : str
        Name and type, such as "amp" and "EEG".
    samples : array of shape (n_samples, n_chans), or list of str
        Strings are markers, one a sample.
    stamps : array, shape (n_samples,)
        Seconds on the clock of LSL.
    rate : float
        Nominal rate in Hz; 0 is irregular.
    channels : list of dict
        What the description says of each channel: label, unit, type.
    """

    name: str
    kind: str
    samples: np.ndarray | list[str]
    stamps: np.ndarray
    rate: float = 0.0
    channels: list[dict[str, str]] = field(default_factory=list)


def write_xdf(path: Path, *streams: Stream, chunk: int = 500) -> Path:
    """Write `streams` to `path`, in chunks of at most `chunk` samples."""
    parts = [b"XDF:", _chunk(FILE_HEADER, _xml("info", {"version": "1.0"}))]
    for number, stream in enumerate(streams, 1):
        parts.append(_chunk(STREAM_HEADER, struct.pack("<I", number) + _header(stream)))
        for start in range(0, len(stream.stamps), chunk):
            stop = min(start + chunk, len(stream.stamps))
            samples = b"".join(_sample(stream.stamps[i], stream.samples[i]) for i in range(start, stop))
            parts.append(_chunk(SAMPLES, struct.pack("<IBI", number, 4, stop - start) + samples))
            parts.append(_chunk(CLOCK_OFFSET, struct.pack("<Idd", number, stream.stamps[start], 0.0)))
    for number, stream in enumerate(streams, 1):
        ends = {"first_timestamp": stream.stamps[0], "last_timestamp": stream.stamps[-1], "sample_count": len(stream.stamps)}
        parts.append(_chunk(STREAM_FOOTER, struct.pack("<I", number) + _xml("info", ends)))
    path.write_bytes(b"".join(parts))
    return path


def _chunk(tag: int, content: bytes) -> bytes:
    return struct.pack("<BIH", 4, len(content) + 2, tag) + content


def _sample(stamp: float, value: np.ndarray | str) -> bytes:
    if isinstance(value, str):
        text = value.encode()
        return struct.pack("<BdBI", 8, stamp, 4, len(text)) + text
    return struct.pack("<Bd", 8, stamp) + value.tobytes()


def _header(stream: Stream) -> bytes:
    marker = isinstance(stream.samples, list)
    fields = {
        "name": stream.name,
        "type": stream.kind,
        "channel_count": 1 if marker else stream.samples.shape[1],
        "nominal_srate": stream.rate,
        "channel_format": "string" if marker else FORMATS[stream.samples.dtype],
    }
    root = _element("info", fields)
    channels = ElementTree.SubElement(ElementTree.SubElement(root, "desc"), "channels") if stream.channels else None
    for described in stream.channels:
        channels.append(_element("channel", described))
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _xml(tag: str, fields: dict[str, object]) -> bytes:
    return ElementTree.tostring(_element(tag, fields), encoding="utf-8", xml_declaration=True)


def _element(tag: str, fields: dict[str, object]) -> ElementTree.Element:
    root = ElementTree.Element(tag)
    for name, value in fields.items():
        ElementTree.SubElement(root, name).text = str(value)
    return root
