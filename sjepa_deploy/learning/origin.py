"""Records whose EEG a model has seen, and refuses a test on it.

A model has seen the subjects and recordings that it learned from and that its best epoch was chosen by, and those that its base
model has seen. Recordings are known by a hash of their samples too, as files are copied and renamed.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import DataError, listed
from sjepa_deploy.files import bytes_hash, canonical_json
from sjepa_deploy.learning.data import Split, Windows
from sjepa_deploy.serialize import DecodeError, decode, encode

SPLIT_FILE = "split.tsv"
"""File of a model's folder that lists every window and its part."""

ORIGIN_KEY = "origin"
"""Key of a checkpoint's training record that holds an `Origin`."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Says whose EEG a model has seen.

    Attributes
    ----------
    subjects : tuple of str
        Names of the subjects, sorted.
    recordings : dict of str to str
        `samples_hash` of the recordings by their names.
    """

    subjects: tuple[str, ...] = ()
    recordings: dict[str, str] = field(default_factory=dict)


def samples_hash(pieces: Iterable[NDArray[Any]]) -> str:
    """Return the hash of a recording, which does not depend on the names and the order of channels, the unit and offsets.

    Hashed is whether each sample is larger than the one before it. Channels that never rise are left out.

    Parameters
    ----------
    pieces : iterable of ndarray, shape (..., n_chans, n_samples)
        The whole recording, or its windows in pieces.

    Returns
    -------
    str
        32 hexadecimal digits; "" if all channels are left out.
    """
    hashers: list[Any] = []
    rising: set[int] = set()
    for piece in pieces:
        hashers = hashers or [hashlib.sha256() for _ in range(piece.shape[-2])]
        for i, hasher in enumerate(hashers):
            rises = np.diff(piece[..., i, :], axis=-1) > 0
            hasher.update(np.packbits(rises).tobytes())
            rising |= {i} if rises.any() else set()
    digests = sorted(hashers[i].digest() for i in rising)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32] if digests else ""


def data_hashes(windows: Windows, split: Split) -> dict[str, str]:
    """Return what a run that is resumed must find unchanged: hashes of its recordings, its labels and its parts."""
    places = windows.subject.astype(str), windows.session.astype(str), windows.recording.astype(str)
    labels = b"" if windows.targets is None else windows.targets.tobytes()
    return {
        "recordings": bytes_hash(canonical_json([windows.eeg.shape, windows.hashes]).encode() + windows.onset.tobytes()),
        "labels": bytes_hash(labels + canonical_json(windows.class_names).encode()),
        "parts": bytes_hash(
            b"".join(part.astype("<i8").tobytes() for part in (split.train, split.val, split.test))
            + canonical_json([place.tolist() for place in places]).encode()
        ),
    }


def check_twins(hashes: Iterable[tuple[str, str]]) -> None:
    """Refuse a recording that is there under two names, as (name, hash) pairs: its windows would lie in two parts.

    Raises
    ------
    DataError
        If so.
    """
    names: dict[str, str] = {}
    for name, digest in hashes:
        twin = names.setdefault(digest, name) if digest else name
        if twin != name:
            raise DataError(
                f"{twin} and {name} hold the same samples: one could be trained on and the other tested on.",
                "Leave one of them out.",
            )


def origin_of(windows: Windows, split: Split, base: Origin | None = None) -> Origin:
    """Return the origin of a model that is trained and validated on parts of `windows`, and made from `base`."""
    rows = np.concatenate([split.train, split.val])
    known = base or Origin()
    recordings = {str(name): windows.hashes.get(str(name), "") for name in np.unique(windows.recording[rows])}
    return Origin(
        subjects=tuple(sorted({*map(str, windows.subject[rows]), *known.subjects})), recordings=known.recordings | recordings
    )


def stored_origin(training: dict[str, Any]) -> Origin | None:
    """Return the origin in a checkpoint's training record. Checkpoints of other programs and older releases have none."""
    try:
        return decode(Origin, training[ORIGIN_KEY]) if ORIGIN_KEY in training else None
    except DecodeError:
        return None


def nameless(training: dict[str, Any], more: Iterable[str] = ()) -> dict[str, Any]:
    """Return a training record for a bundle, which goes to other people: it knows recordings by their hashes, and no names.

    Parameters
    ----------
    training : dict
        Record of the checkpoint.
    more : iterable of str
        Hashes of recordings that the model has seen since.
    """
    origin = stored_origin(training) or Origin()
    digests = {*origin.recordings.values(), *more} - {""}
    return {ORIGIN_KEY: encode(Origin(recordings={digest: digest for digest in sorted(digests)}))}


def check_unseen(base: Origin, windows: Windows, split: Split) -> None:
    """Refuse to test on subjects and recordings that the base model has seen.

    Raises
    ------
    DataError
        If there are such.
    """
    subjects = sorted(set(windows.subject[split.test]) & set(base.subjects))
    if subjects:
        raise DataError(
            f"The base model has seen {len(subjects)} of the test part's subjects: {listed(subjects)}.",
            "Pretrain and fine-tune with the same --split, --split-seed, --n-folds and --fold, or on other people; "
            "--allow-overlap takes the base model nevertheless (names that mean other people, or EEG without its labels).",
        )
    known = {digest: name for name, digest in base.recordings.items() if digest}
    tested = {str(name): windows.hashes.get(str(name), "") for name in np.unique(windows.recording[split.test])}
    if same := [f"{name} (seen as {known[digest]})" for name, digest in tested.items() if digest in known]:
        raise DataError(
            f"The base model has seen {len(same)} of the test part's recordings: {listed(same)}.",
            "Test on other recordings; --allow-overlap takes the base model nevertheless.",
        )


def split_table(windows: Windows, split: Split) -> bytes:
    """Return the part of every window as a tab-separated table. Windows in the gaps between parts have the part "gap"."""
    parts = np.full(len(windows), "gap", dtype="<U5")
    for name in ("train", "val", "test"):
        parts[getattr(split, name)] = name
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", lineterminator="\n")
    labelled = windows.targets is not None
    table.writerow(["subject", "session", "recording", "onset", *(["label"] if labelled else []), "part"])
    for i, part in enumerate(parts):
        onset = "n/a" if np.isnan(windows.onset[i]) else f"{windows.onset[i]:.6g}"
        label = [windows.label(i)] if labelled else []
        table.writerow([windows.subject[i], windows.session[i], windows.recording[i], onset, *label, part])
    return text.getvalue().encode(errors="backslashreplace")  # names of files may be no UTF-8
