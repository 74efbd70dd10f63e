"""Reads and writes bundles. A bundle is one folder with typed ONNX graphs, the checkpoint, a parity reference and a manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.errors import BundleError, ExportError, listed
from sjepa_deploy.files import canonical_json, exchange, file_hash, folder_beside, json_file, load_json, seal, write_atomically
from sjepa_deploy.onnx_file import has_external_data, metadata_of
from sjepa_deploy.parity import ParityResult, Reference
from sjepa_deploy.safetensors_file import read_safetensors
from sjepa_deploy.serialize import DecodeError, decode, encode
from sjepa_deploy.spec import ModelSpec, Precision, RunPrecision, graph_precision, upgraded

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
REFERENCE_FILE = "reference.npz"
CHECKPOINT_FOLDER = "checkpoint"
WEIGHTS_FILE = f"{CHECKPOINT_FOLDER}/model.safetensors"
TRAINING_KEY = "sjepa_deploy_training"
"""Key of a checkpoint's config.json that holds where the weights come from."""
CHECKPOINT_FILES = (f"{CHECKPOINT_FOLDER}/config.json", WEIGHTS_FILE)
ENGINE_FOLDER = "engines"
DECISION_FOLDER = "decisions"
TASK_FOLDER = "task"
"""Folder of the results of `sjepa_deploy.evaluation.task`."""
LATER = tuple(f"{folder}/" for folder in (ENGINE_FOLDER, DECISION_FOLDER, TASK_FOLDER))
"""Folders of what is made of a bundle later: the manifest does not name their files."""
MAX_BATCH = 65_536
"""Largest batch of any graph. So many default windows take 6.8 GB."""
MAX_OPENINGS = 5
"""Most attempts to open a bundle that is replaced during the opening."""
ONNX_CONTRACT_KEY = "sjepa_deploy"
"""Key of an ONNX file's metadata that holds `graph_contract`."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Describes one ONNX file of a bundle.

    Attributes
    ----------
    file : str
        Name in the bundle.
    precision : {"fp32", "fp16", "bf16"}
        Type of the matrix products; input and output are float32.
    opset, n_nodes : int
        ONNX opset, and number of nodes that are not constants.
    max_batch : int
        Largest batch.
    static_batch : int or None
        The only batch size, where the graph has one.
    weights_sha256 : str or None
        Hash of the checkpoint's weights file that the graph was made from. The graph's metadata holds this hash too, so that a
        graph of the same model with other weights is found. None in bundles of older releases.
    """

    file: str
    precision: Precision
    opset: int
    n_nodes: int
    max_batch: int
    static_batch: int | None = None
    weights_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Says where the weights came from.

    Attributes
    ----------
    source : str
        File or folder name of the checkpoint, or "random".
    format : str
        Kind of checkpoint, or "initialisation".
    sha256 : str or None
        Hash of the weights file.
    seed : int or None
        Seed of random weights.
    notes : tuple of str
        Assumptions and changes at reading.
    """

    source: str
    format: str
    sha256: str | None = None
    seed: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def random(self) -> bool:
        """Whether the weights were never trained."""
        return self.source == "random"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Describes the contents of a bundle.

    Attributes
    ----------
    schema_version : int
        Version of this description.
    created : str
        Time of the export, ISO 8601, UTC.
    spec : ModelSpec
        The model's contract.
    graphs : tuple of Graph
        The ONNX files.
    weights : Provenance
        Where the weights came from.
    tools : dict of str to str
        Versions of the software that wrote the bundle.
    parity : tuple of ParityResult
        Parity that the export measured.
    files : dict of str to str
        sha256 of every other file.
    digest : str
        sha256 of this description without this field.
    """

    schema_version: int
    created: str
    spec: ModelSpec
    graphs: tuple[Graph, ...]
    weights: Provenance
    tools: dict[str, str]
    parity: tuple[ParityResult, ...]
    files: dict[str, str]
    digest: str = ""

    def sealed(self) -> Manifest:
        """Return a copy with the digest filled in."""
        return dataclasses.replace(self, digest=seal(encode(self)))


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Holds an open bundle. Its files were verified at opening.

    Attributes
    ----------
    path : Path
        The folder.
    manifest : Manifest
        Description of the contents.
    """

    path: Path
    manifest: Manifest
    _stamp: tuple[int, ...] | None = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path | str) -> Bundle:
        """Open a bundle and verify its manifest and the hash of every file.

        If another bundle takes the place during the opening, the new bundle is opened.

        Raises
        ------
        BundleError
            If the folder is no bundle, of a newer schema, incomplete or altered; or if a graph is of another model or of other
            weights, or has values in a file of its own, which nothing vouches for.
        """
        path = Path(path)
        for _ in range(MAX_OPENINGS):
            stamp = _stamp_of(path)
            try:
                return dataclasses.replace(cls._open(path), _stamp=stamp)
            except BundleError:
                if _stamp_of(path) == stamp:
                    raise
        raise replaced(path)

    @property
    def current(self) -> bool:
        """Whether the folder still holds the opened bundle, and no other bundle took its place."""
        return self._stamp is None or self._stamp == _stamp_of(self.path)

    @classmethod
    def _open(cls, path: Path) -> Bundle:
        try:
            manifest = _read_manifest(path)
            for name, sha256 in manifest.files.items():
                file = _inside(path, name)
                if not file.is_file():
                    raise BundleError(f"The bundle {path} lacks its file {name}.", "Copy or export the bundle again.")
                if file_hash(file) != sha256:
                    raise BundleError(
                        f"{name} of the bundle {path} was changed after it was written (its hash differs).",
                        "Copy or export the bundle again.",
                    )
        except OSError as e:
            raise BundleError(f"The bundle {path} cannot be read ({e.strerror or e}).", "Check the path and its rights.") from e
        if beyond := [graph.max_batch for graph in manifest.graphs if not 1 <= graph.max_batch <= MAX_BATCH]:
            raise BundleError(f"The manifest of {path} states batches of {beyond[0]} windows.", "Export the bundle again.")
        named = [*(graph.file for graph in manifest.graphs), REFERENCE_FILE, *CHECKPOINT_FILES]
        if unlisted := [name for name in named if name not in manifest.files]:
            raise BundleError(f"The manifest of {path} has no hash for {unlisted[0]}.", "Export the bundle again.")
        try:
            for graph in manifest.graphs:
                _check_graph(path / graph.file, graph, manifest)
        except OSError as e:
            raise BundleError(f"The bundle {path} cannot be read ({e.strerror or e}).", "Check the path and its rights.") from e
        return cls(path=path, manifest=manifest)

    @property
    def spec(self) -> ModelSpec:
        """The model's contract."""
        return self.manifest.spec

    @property
    def checkpoint(self) -> Path:
        """Folder of the PyTorch checkpoint."""
        return self.path / CHECKPOINT_FOLDER

    def weights(self) -> dict[str, NDArray[np.float64]]:
        """Return the weights of the checkpoint by name, read with NumPy alone."""
        return read_safetensors(self.path / WEIGHTS_FILE)

    def training(self) -> dict[str, Any]:
        """Return the checkpoint's record of its training, which knows recordings by hashes; empty where nothing is known."""
        config = load_json((self.path / CHECKPOINT_FILES[0]).read_bytes())
        record = config.get(TRAINING_KEY) if isinstance(config, dict) else None
        return record if isinstance(record, dict) else {}

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions that have a graph."""
        return tuple(graph.precision for graph in self.manifest.graphs)

    def graph(self, precision: RunPrecision) -> Graph:
        """Return the graph that a backend runs in `precision`.

        Raises
        ------
        BundleError
            If there is none.
        """
        wanted = graph_precision(precision)
        for graph in self.manifest.graphs:
            if graph.precision == wanted:
                return graph
        raise BundleError(
            f"The bundle {self.path} has no {wanted} graph.",
            f"Use {' or '.join(self.precisions)}, or export with --precision {wanted}.",
        )

    def graph_path(self, precision: RunPrecision) -> Path:
        """Return the path of the ONNX file of `precision`."""
        return self.path / self.graph(precision).file

    def reference(self) -> Reference:
        """Return the parity reference that the export wrote."""
        reference = Reference.load(self.path / REFERENCE_FILE)
        n = len(reference.kinds)
        shapes = (n, *self.spec.input_shape), (n, *self.spec.output_shape)
        if not n or (reference.inputs.shape, reference.outputs.shape) != shapes:
            raise BundleError(f"The reference of {self.path} does not fit its model.", "Export the bundle again.")
        return dataclasses.replace(reference, task=self.spec.task)


def replaced(path: Path) -> BundleError:
    """Return the error for a bundle that was replaced by another bundle during its opening."""
    return BundleError(f"The bundle {path} was replaced while it was opened.", "Open it again.")


def _stamp_of(path: Path) -> tuple[int, ...] | None:
    """Return numbers that tell the manifest at `path` from every later manifest there, or None if there is no manifest.

    A copy may have the time of its original (`st_mtime`) and the inode of a manifest that was deleted; `st_ctime` is its own.
    """
    try:
        found = (path / MANIFEST_FILE).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns, found.st_size


def graph_contract(
    spec: ModelSpec, *, precision: Precision, max_batch: int, static_batch: int | None, weights: str | None = None
) -> str:
    """Return the contract in an ONNX file's metadata, as canonical JSON. See `Graph` for the values."""
    contract = {"spec": encode(spec), "precision": precision, "max_batch": max_batch, "static_batch": static_batch}
    return canonical_json(contract if weights is None else contract | {"weights": weights})


def _check_graph(file: Path, graph: Graph, manifest: Manifest) -> None:
    """Compare the metadata of an ONNX file with the manifest."""
    onnx = file.read_bytes()
    try:
        stored = metadata_of(onnx).get(ONNX_CONTRACT_KEY, "")
        theirs = load_json(stored.encode()) if stored else {}
        is_external = has_external_data(onnx)
    except (ValueError, RecursionError) as e:
        raise BundleError(f"{graph.file} is no ONNX file ({e}).", "Copy or export the bundle again.") from e
    if is_external:
        raise BundleError(
            f"{graph.file} has weights in another file, which nothing vouches for.", "Export the bundle again, with this release."
        )
    if graph.weights_sha256 not in (None, manifest.files[CHECKPOINT_FILES[1]]):
        raise BundleError(
            f"The manifest says that {graph.file} was made from other weights than those in {CHECKPOINT_FOLDER}.",
            "Copy or export the bundle again.",
        )
    contract = graph_contract(
        manifest.spec,
        precision=graph.precision,
        max_batch=graph.max_batch,
        static_batch=graph.static_batch,
        weights=graph.weights_sha256,
    )
    if _has_spec(theirs):
        with contextlib.suppress(ValueError):  # a spec of other keys is told below
            theirs = theirs | {"spec": encode(decode(ModelSpec, upgraded(theirs["spec"])))}
        if canonical_json(theirs) == contract:
            return
    differs = "it has none"
    if stored:
        ours = load_json(contract.encode())
        ours, theirs = (side | spec.pop("signal", {}) | spec for side in (ours, theirs) for spec in [side.pop("spec", {})])
        differs = "it differs in " + ", ".join(sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k)))
    raise BundleError(f"The contract inside {graph.file} is not the manifest's: {differs}.", "Copy or export the bundle again.")


def _read_manifest(path: Path) -> Manifest:
    file = path / MANIFEST_FILE
    if not path.exists():
        raise BundleError(f"There is no bundle at {path}.", "Check the path, or make one with sjepa-export.")
    if not file.is_file():
        raise BundleError(f"{path} is no bundle: it holds no {MANIFEST_FILE}.", "Name the folder that sjepa-export wrote.")
    try:
        data = load_json(file.read_bytes())
    except ValueError as e:
        raise BundleError(f"{file} is not JSON ({e}).", "Copy or export the bundle again.") from e
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise BundleError(
            f"The bundle {path} has schema version {version}; this release reads up to {SCHEMA_VERSION}.",
            "Upgrade sjepa-deploy, or export with this release.",
        )
    try:
        manifest = decode(Manifest, data | {"spec": upgraded(data["spec"])} if _has_spec(data) else data)
    except ValueError as e:  # DecodeError, or a spec that describes no model
        problem = str(e) if isinstance(e, DecodeError) else f"its spec is invalid ({e})"
        raise BundleError(f"{file} does not fit the schema: {problem}.", "Copy or export the bundle again.") from e
    if manifest.digest != seal(data):
        raise BundleError(f"{file} was changed after it was written (its digest differs).", "Copy or export the bundle again.")
    return manifest


def _has_spec(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("spec"), dict)


def _inside(path: Path, name: str) -> Path:
    """Return the path of the file `name` in the bundle. Refuse names that leave the folder."""
    pure = PurePosixPath(name)
    file = path.joinpath(*pure.parts)
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts
    try:
        leaves = leaves or not file.resolve().is_relative_to(path.resolve())
    except RuntimeError:  # a loop of symbolic links, before Python 3.13
        leaves = True
    if leaves:
        raise BundleError(f"The manifest of {path} names {name!r}, which leaves the folder.", "Do not use this bundle.")
    return file


# ---- writing --------------------------------------------------------------------------------------------------------------


def check_writable(path: Path, *, force: bool = False) -> None:
    """Check that a bundle may be written to `path`.

    Raises
    ------
    ExportError
        If `path` exists and `force` is not set, `path` is no bundle, or `path` holds files that are not the bundle's.
    """
    with _as_export_errors(path):
        if path.name in ("", "..") or path.is_mount():
            raise ExportError(f"{path} cannot be replaced by a bundle: it is a mount or has no name.", "Name a new folder in it.")
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise ExportError(f"{path} exists and is no folder.", "Choose another --out.")
        if path.exists() and any(path.iterdir()):
            if not _looks_like_a_bundle(path):
                raise ExportError(
                    f"{path} is a folder with other content.", "Choose another --out; --force replaces bundles only."
                )
            if not force:
                raise ExportError(f"There is a bundle at {path} already.", "Use --force to replace it, or choose another --out.")
            if strange := _not_of_the_bundle(path):
                raise ExportError(
                    f"{path} holds files that are not the bundle's: {listed(strange)}.",
                    "Move them away, or choose another --out: --force deletes the bundle alone.",
                )


@contextlib.contextmanager
def new_bundle(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `path`, and move the folder to `path` when the block ends without an error.

    The manifest must be written last: a folder without a manifest does not open. An error or a killed process leaves `path`
    unchanged. What a killed process left beside `path` is deleted first.

    Raises
    ------
    ExportError
        If `path` exists and `force` is not set, is no bundle, or cannot be written.
    """
    with _as_export_errors(path):
        _undo_killed_move(path)
        check_writable(path, force=force)
        path.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(path) as folder:
            yield folder
            folder.chmod(0o755)
            check_writable(path, force=force)  # what took the place meanwhile is not the one that was judged
            _replace(folder, path)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in `folder`, write the manifest, and return the written manifest."""
    files = {
        file.relative_to(folder).as_posix(): file_hash(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST_FILE
    }
    manifest = dataclasses.replace(manifest, files=files).sealed()
    write_atomically(folder / MANIFEST_FILE, json_file(manifest))
    return manifest


def _looks_like_a_bundle(path: Path) -> bool:
    """Whether `path` holds a manifest of ours, intact or not: web pages and browser extensions have a manifest.json too."""
    try:
        data = load_json((path / MANIFEST_FILE).read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return False
    return isinstance(data, dict) and {"schema_version", "spec", "graphs"} <= set(data)


def _not_of_the_bundle(path: Path) -> list[str]:
    """Return the files at `path` that its manifest does not name, except what is made of the bundle later."""
    named = load_json((path / MANIFEST_FILE).read_bytes()).get("files")
    known = {MANIFEST_FILE, *(named if isinstance(named, dict) else ())}
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
    return [name for name in files if name not in known and not name.startswith(LATER)]


@contextlib.contextmanager
def _as_export_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ExportError(f"There is no space left for {path}.", "Free some, or choose another --out.") from e
        raise ExportError(f"{path} cannot be written ({e.strerror or e}).", "Choose another --out.") from e


def _replace(folder: Path, path: Path) -> None:
    """Move `folder` to `path`. If the system can exchange two folders, `path` holds a bundle at every moment.

    A folder that is not empty is not overwritten: if two exports write to one place, the second export fails here.
    """
    if not _looks_like_a_bundle(path):
        folder.rename(path)
        return
    if exchange(folder, path):
        return  # `folder` holds the old one now, which the caller deletes
    old = Path(tempfile.mkdtemp(prefix=_old(path), dir=path.parent))
    try:
        path.rename(old)
        try:
            folder.rename(path)
        except OSError:
            old.rename(path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _old(path: Path) -> str:
    """Return how the names begin under which the bundle at `path` makes room for the next one."""
    return f".{path.name}.old-"


def _undo_killed_move(path: Path) -> None:
    """Put the old bundle back if a process was killed between the two moves of `_replace`, and delete other old bundles."""
    if not path.parent.is_dir():
        return
    for old in [entry for entry in path.parent.iterdir() if entry.name.startswith(_old(path))]:
        if not path.exists() and _looks_like_a_bundle(old):
            old.rename(path)
        else:
            shutil.rmtree(old, ignore_errors=True)
