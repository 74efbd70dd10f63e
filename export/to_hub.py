"""Makes a copy of a bundle for the public, and pushes the copy to a hub of models."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np

from sjepa_deploy.bundle import REFERENCE_FILE, Bundle, write_manifest
from sjepa_deploy.card import CARD_FILE, without_names
from sjepa_deploy.errors import ExportError, MissingDependencyError
from sjepa_deploy.parity import Reference

OWN_WINDOWS = "window "
"""How kinds of reference windows begin that were cut from recordings of people."""


def public_copy(bundle: Bundle, folder: Path, card: str) -> Bundle:
    """Write a bundle that names no people, recordings and splits, and that holds no EEG of people, and open it.

    The copy has the graphs, the checkpoint and the synthetic reference windows. It lacks reference windows of recordings, results
    of tasks, decision layers and engines. The name of the checkpoint's file is left out.

    Parameters
    ----------
    bundle : Bundle
        The bundle.
    folder : Path
        An empty folder, or one to make.
    card : str
        Text of the model card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in bundle.manifest.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, folder / name)
    reference = bundle.reference()
    kept = np.array([not kind.startswith(OWN_WINDOWS) for kind in reference.kinds])
    if not kept.all():
        kinds = tuple(kind for kind, keep in zip(reference.kinds, kept, strict=True) if keep)
        Reference(kinds=kinds, inputs=reference.inputs[kept], outputs=reference.outputs[kept]).save(folder / REFERENCE_FILE)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    weights = bundle.manifest.weights
    public = dataclasses.replace(
        weights,
        source=weights.source if weights.random else "checkpoint",
        notes=tuple(without_names(note) for note in weights.notes),
    )
    write_manifest(folder, dataclasses.replace(bundle.manifest, weights=public, files={}, digest=""))
    return Bundle.open(folder)


def push(bundle: Bundle, name: str, card: str, *, private: bool = False) -> str:
    """Push the public copy of a bundle, and return the address of the pushed version.

    The token is that of ``huggingface-cli login`` or of the variable HF_TOKEN.

    Parameters
    ----------
    bundle : Bundle
        The bundle.
    name : str
        Repository, as in "org/name". A missing one is made.
    card : str
        Text of the model card.
    private : bool
        Whether a repository that is made is private.

    Raises
    ------
    ExportError
        If the name is none, or the hub refuses.
    MissingDependencyError
        If huggingface_hub is not installed.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    except ImportError as e:
        raise MissingDependencyError("huggingface_hub", "hub") from e
    if name.count("/") != 1:
        raise ExportError(f"{name!r} is no name of a repository.", "Write it as org/name.")
    api = huggingface_hub.HfApi(library_name="sjepa-deploy")
    with tempfile.TemporaryDirectory(prefix="sjepa-push-") as temporary:
        copy = public_copy(bundle, Path(temporary) / "bundle", card)
        try:
            api.create_repo(name, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=name, folder_path=copy.path, commit_message=f"sjepa-deploy bundle {copy.spec.variant}"
            )
        except HFValidationError as e:
            raise ExportError(f"{name!r} is no name of a repository.", "Write it as org/name.") from e
        except LocalTokenNotFoundError as e:
            raise ExportError("There is no token for the hub.", "Log in with huggingface-cli login, or set HF_TOKEN.") from e
        except (HfHubHTTPError, OSError) as e:
            raise ExportError(f"The hub refuses {name}: {e}.", "Check the token, its rights, and the network.") from e
    return str(done.commit_url)
