"""Warns of recordings that a bundle's model has learned from: figures on them flatter the model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.learning.origin import samples_hash, stored_origin

if TYPE_CHECKING:
    import mne

log = logging.getLogger(__name__)


def warn_if_seen(bundle: Bundle, raw: mne.io.BaseRaw, name: str) -> bool:
    """Log a warning if the model has seen a recording, and return whether it has.

    Parameters
    ----------
    bundle : Bundle
        The bundle. Bundles of older releases and of foreign checkpoints know no recordings.
    raw : mne.io.BaseRaw
        The recording as it is read, in any unit.
    name : str
        Name of the recording in the warning.
    """
    origin = stored_origin(bundle.training())
    seen = origin is not None and bool(origin.recordings) and samples_hash([raw.get_data()]) in origin.recordings.values()
    if seen:
        log.warning("The model has learned from %s: figures on it flatter the model. Use recordings that it has not seen.", name)
    return seen
