"""Small models and their bundles, and what a careless or a malicious hand does to a bundle."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from sjepa_deploy.bundle import Bundle, Provenance
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.spec import EncoderSpec, ModelSpec

MONTAGE = read_montage("sjepa-62").pick(["F3", "Fz", "F4", "C3", "Cz", "C4", "P3", "P4"])
RANDOM = Provenance(source="random", format="initialisation", seed=0)


def small_spec(variant="prelocal", **changes) -> ModelSpec:
    """Return the spec of a model with 8 channels, three outputs and, where it has a transformer, two layers."""
    known = {
        "n_chans": 8,
        "n_times": 200,
        "sfreq": 100.0,
        "n_outputs": 3,
        "ch_names": MONTAGE.ch_names,
        "positions": MONTAGE.positions,
        "encoder": EncoderSpec(n_layers=2, n_decoder_layers=1),
        "phase": "zero-phase",
    }
    return ModelSpec.of(variant=variant, **known | changes)


def export_small(path, spec, *, model_seed=0, **options) -> Bundle:
    """Export a model with random weights; fp32 alone and batches to 4 unless told otherwise."""
    known = {"weights": RANDOM, "precisions": ("fp32",), "max_batch": 4}
    return to_bundle(build_model(spec, seed=model_seed), path, **known | options)


def copy_bundle(bundle, path) -> Path:
    """Copy a shared bundle to a place where a test may alter it."""
    return Path(shutil.copytree(bundle.path, path))


def edit_manifest(path, edit: Callable[[dict], object], *, sign=True) -> None:
    """Let `edit` change the manifest of the bundle at `path`, and sign it again: the digest keeps nobody from doing so."""
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    edit(data)
    if sign:
        canonical = json.dumps(data | {"digest": ""}, sort_keys=True, separators=(",", ":"))
        data["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps(data))


def rehash(path, *names) -> None:
    """Put the hashes of altered files into the manifest and sign it again."""
    hashes = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names}
    edit_manifest(path, lambda data: data["files"].update(hashes))


def flip_byte(file, at=-1000) -> None:
    """Change one bit of one byte."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def listing(folder) -> dict[str, bytes | None]:
    """Return every path under `folder`, hidden ones too, with the content of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}
