"""Finds checkpoints: at a path of this machine, or by name on the Hugging Face Hub, whose files are kept in its cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sjepa_deploy.errors import CheckpointError, MissingDependencyError

HUB_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
"""``org/name``, or ``org/name@revision`` with a branch, a tag or a commit."""

FILES = ("config.json", "signal.json", "model.safetensors", "pytorch_model.bin")
"""Files of a checkpoint, the configuration first. Of the last two, which hold the weights, the first that is there is fetched."""

WEIGHTS = FILES[2:]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Says where a checkpoint is.

    Attributes
    ----------
    path : Path
        File or folder on this machine.
    name : str
        What it is called: the name of the file or folder, or ``org/name@commit`` of the Hub.
    """

    path: Path
    name: str


def find_checkpoint(where: Path | str) -> Place:
    """Return where a checkpoint is, after fetching it from the Hub where `where` is no path of this machine and a Hub name.

    The Hub's own variables hold: ``HF_ENDPOINT`` names another server, ``HF_HUB_OFFLINE=1`` takes the cache alone, ``HF_HOME``
    is where the cache is.

    Raises
    ------
    CheckpointError
        If there is no such path, and no such model on the Hub or in its cache; or the Hub cannot be reached.
    MissingDependencyError
        If huggingface_hub is not installed.
    """
    path = Path(where)
    match = HUB_NAME.fullmatch(str(where))
    if path.exists() or match is None:
        return Place(path=path, name=path.name)
    return _fetch(match["repository"], match["revision"])


def _fetch(repository: str, revision: str | None) -> Place:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as e:
        raise MissingDependencyError("huggingface_hub", "hub") from e
    called = repository if revision is None else f"{repository}@{revision}"
    fetched: dict[str, Path] = {}
    try:
        for name in FILES:
            if name in WEIGHTS and any(each in fetched for each in WEIGHTS):
                continue
            try:
                file = Path(hf_hub_download(repository, name, revision=revision))
            except LocalEntryNotFoundError:
                if name in (FILES[0], WEIGHTS[-1]):  # offline, a file that was not there cannot be told from one not fetched
                    raise
                continue
            except EntryNotFoundError:
                continue
            fetched[name] = file
            revision = file.parent.name  # the commit: a branch may move between two files
    except RepositoryNotFoundError as e:
        raise CheckpointError(
            f"There is no {called}, neither as a path nor on the Hugging Face Hub (a private one needs `hf auth login`).",
            "Check the name.",
        ) from e
    except RevisionNotFoundError as e:
        raise CheckpointError(f"{repository} on the Hugging Face Hub has no revision {revision}.", "Check the name.") from e
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as e:
        raise CheckpointError(
            f"There is no path {called}, and the model of that name on the Hugging Face Hub is neither in the cache nor within "
            f"reach ({type(e).__name__}).",
            "Check the path, or fetch it once where the Hub can be reached (HF_HUB_OFFLINE unset).",
        ) from e
    except HFValidationError as e:
        raise CheckpointError(f"There is no path {called}, and no model can be called so on the Hub ({e}).", "Check it.") from e
    if not any(each in fetched for each in WEIGHTS):
        raise CheckpointError(f"{called} on the Hugging Face Hub holds no {WEIGHTS[0]}.", "Name a model's repository.")
    folder = next(iter(fetched.values())).parent
    return Place(path=folder, name=f"{repository}@{folder.name[:12]}")
