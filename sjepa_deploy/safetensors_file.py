"""Reads safetensors files with NumPy alone, which machines that decode have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import BundleError
from sjepa_deploy.files import load_json

KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def read_safetensors(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the arrays of a safetensors file in float64, by name: the length of a JSON header, the header, the data.

    Raises
    ------
    BundleError
        If the file is no safetensors file of floating-point numbers.
    """
    content = path.read_bytes()
    try:
        start = 8 + int.from_bytes(content[:8], "little")
        header = load_json(content[8:start], finite=False)
        arrays = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                flat = np.frombuffer(content[start + first : start + last], KINDS[entry["dtype"]])
                arrays[name] = flat.reshape(entry["shape"]).astype(np.float64)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BundleError(f"{path} holds no weights that can be read ({e}).", "Export the bundle again.") from e
    return arrays
