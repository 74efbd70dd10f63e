"""Reads and writes a signal as a file: ``signal.json`` beside a checkpoint, or what ``sjepa-export --signal`` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sjepa_deploy.errors import SpecError
from sjepa_deploy.files import json_file, load_json, write_atomically
from sjepa_deploy.serialize import DecodeError, decode_fields
from sjepa_deploy.spec import SIGNAL_FIELDS, SignalSpec

SIGNAL_FILE = "signal.json"
"""Name of the file in folders of checkpoints."""


def write_signal(path: Path | str, signal: SignalSpec) -> None:
    """Write `signal` as JSON, whole or not at all."""
    write_atomically(Path(path), json_file(signal))


def read_signal(path: Path | str) -> dict[str, Any]:
    """Read what a file says of a signal.

    Parameters
    ----------
    path : Path or str
        A JSON file, or a YAML file (``.yaml``, ``.yml``) with the same keys: the fields of `sjepa_deploy.spec.SignalSpec`, each
        step an object with its name under ``step`` and its fields. A field that is not there says nothing.

    Returns
    -------
    dict of str to object
        The fields of `SignalSpec` that the file holds.

    Raises
    ------
    SpecError
        If the file is missing or damaged, or holds an unknown key or step, a value of the wrong type or an impossible value.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        data = _yaml(content) if path.suffix in (".yaml", ".yml") else load_json(content)
        return decode_fields(SignalSpec, data)
    except OSError as e:
        raise SpecError(f"The signal {path} cannot be read ({e.strerror or e}).", "Check the path.") from e
    except SpecError as e:
        raise SpecError(f"{path}: {e.problem}", e.mend) from e
    except DecodeError as e:
        hint = " YAML reads 1e-3 as text: write 0.001 or 1.0e-3." if "not str" in str(e) else ""
        raise SpecError(f"{path} describes no signal: {e}.", f"The keys at its top are {', '.join(SIGNAL_FIELDS)}.{hint}") from e
    except (ValueError, RecursionError) as e:
        raise SpecError(f"{path} is neither JSON nor, named .yaml, YAML ({e}).", "Mend it, or write the signal again.") from e


def _yaml(content: bytes) -> Any:
    """Parse YAML. Errors are of the kinds that JSON gives."""
    import yaml

    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as e:
        raise ValueError(str(e)) from e
