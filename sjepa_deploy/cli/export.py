"""``sjepa-export``: from a checkpoint to a verified bundle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.markup import escape

from sjepa_deploy.bundle import check_writable
from sjepa_deploy.cli import console, entry, parity_table, print_json
from sjepa_deploy.eeg.montage import Montage, read_montage
from sjepa_deploy.errors import ExportError, InputError, MissingDependencyError, RecordingError
from sjepa_deploy.spec import PRECISIONS, UNITS_IN_VOLTS, VARIANTS, ModelSpec, Precision

if TYPE_CHECKING:
    from sjepa_deploy.bundle import Bundle
    from sjepa_deploy.models.networks import SignalJEPAModule
    from sjepa_deploy.runtime.backend import FloatArray

TRITON_PLATFORMS = ("python", "onnxruntime", "tensorrt")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--variant", type=click.Choice([*VARIANTS, "all"]), help="Model to export. With a checkpoint it is read from there."
)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Folder or file of the weights. Without it they are random.")
@click.option("--prefix", help="What stands before the model's keys in a checkpoint that holds several models.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the bundle.  [default: sjepa-VARIANT]")
@click.option(
    "--precision", default=",".join(PRECISIONS), help="Graphs to write, separated by commas; the first is the bundle's default."
)
@click.option("--montage", help="Channels with positions: a montage of MNE, or a file with name, x, y, z in metres.")
@click.option("--channels", help="Channel names in order, separated by commas (picked from --montage), or their number.")
@click.option("--n-times", type=int, help="Samples of a window.")
@click.option("--sfreq", type=float, help="Sampling rate in Hz.")
@click.option("--unit", type=click.Choice(list(UNITS_IN_VOLTS)), help="Unit of the input.")
@click.option("--n-outputs", type=int, help="Outputs of the model.")
@click.option("--class-names", help="Names of the outputs, separated by commas.")
@click.option("--spatial-filters", type=int, help="Spatial filters of the model.")
@click.option("--reference", type=click.Choice(["average", "none"]), help="Reference that recordings are brought to.")
@click.option(
    "--band", nargs=2, type=float, metavar="LOW HIGH", help="Band in Hz that recordings are filtered to; 0 leaves a side open."
)
@click.option("--opset", type=int, default=17, help="ONNX opset.")
@click.option("--max-batch", type=click.IntRange(min=1), default=64, help="Largest batch of windows.")
@click.option("--static-batch", type=click.IntRange(min=1), help="The only batch size, in place of 1 to --max-batch.")
@click.option("--seed", type=int, default=0, help="Seed of random weights and of the windows that parity is judged with.")
@click.option("--parity-data", type=click.Path(path_type=Path), help="Recording, or .npy of windows, to judge with as well.")
@click.option(
    "--engine",
    "engines",
    default="auto",
    help="TensorRT engines to build for this machine: none, or a list of fp32, tf32, fp16, bf16. auto builds one for every graph "
    "where TensorRT and a GPU are there.",
)
@click.option("--triton", type=click.Path(path_type=Path), help="Triton model repository to add the bundle to.")
@click.option("--triton-platform", type=click.Choice(TRITON_PLATFORMS), default="python", help="What runs the graph in Triton.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")
def export(
    variant: str | None, checkpoint: Path | None, prefix: str | None, out: Path | None, json_output: bool, **flags: Any
) -> None:
    """Export a SignalJEPA model into a bundle, and prove that it equals the PyTorch model.

    The bundle is a folder that any machine decodes with. Every graph is compared with the model in float64; if one differs by
    more than its tolerance, nothing is written and the exit status is 1.
    """
    for package in ("torch", "onnx", "onnxscript", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "export")
    if variant == "all":
        if checkpoint is not None:
            raise ExportError("A checkpoint holds one variant.", "Leave --variant all out.")
        folders = {name: (out or Path("sjepa-all")) / name for name in VARIANTS}
        for folder in folders.values():
            check_writable(folder, force=flags["force"])
        bundles = [_export_one(name, None, None, folder, json_output, **flags) for name, folder in folders.items()]
    else:
        bundles = [_export_one(variant, checkpoint, prefix, out, json_output, **flags)]
    if json_output:
        print_json([_summary(b) for b in bundles] if variant == "all" else _summary(bundles[0]))


def _export_one(
    variant: str | None,
    checkpoint: Path | None,
    prefix: str | None,
    out: Path | None,
    json_output: bool,
    *,
    precision: str,
    opset: int,
    max_batch: int,
    static_batch: int | None,
    seed: int,
    parity_data: Path | None,
    engines: str,
    triton: Path | None,
    triton_platform: str,
    force: bool,
    **flags: Any,
) -> Bundle:
    from sjepa_deploy.bundle import Provenance
    from sjepa_deploy.cli.build import parse_precisions
    from sjepa_deploy.export.to_bundle import ExportParityError, to_bundle
    from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
    from sjepa_deploy.models.networks import build_model
    from sjepa_deploy.models.resolve import resolve_spec

    screen = console(json_output)
    precisions = _precisions(precision)
    if engines not in ("auto", "none"):
        parse_precisions(engines)  # before anything is written
    read = read_checkpoint(checkpoint, prefix=prefix) if checkpoint else None
    if variant is None and read is None:
        raise ExportError(
            "Neither --variant nor --checkpoint was given.", "Name one; with --variant alone the weights are random."
        )
    asked, montage = _asked(variant, **flags)
    spec, assumed = resolve_spec(asked, read, asked_montage=montage)
    out = out or Path(f"sjepa-{spec.variant}")
    eeg = None if parity_data is None else _parity_eeg(parity_data, spec)
    if read is None:
        model = build_model(spec, seed=seed)
        weights = Provenance(source="random", format="initialisation", seed=seed, notes=assumed)
    else:
        model = load_model(read, spec)
        weights = Provenance(
            source=read.file_name,
            format=read.file_format,
            sha256=read.sha256,
            notes=read.notes + _length_note(read.known, model, eeg, parity_data, seed) + assumed,
        )
    try:
        with screen.status("exporting") as status:
            bundle = to_bundle(
                model,
                out,
                weights=weights,
                precisions=precisions,
                opset=opset,
                max_batch=max_batch,
                static_batch=static_batch,
                parity_windows=None if eeg is None else _stretches(eeg, spec.n_times, spec.n_times),
                seed=seed,
                force=force,
                progress=lambda text: status.update(f"{spec.variant}: {text}"),
            )
    except ExportParityError as e:
        screen.print(parity_table(e.results, f"{spec.variant}: parity with the PyTorch model in float64"))
        raise
    _report(screen, bundle, read is None)
    _build_engines(screen, bundle, engines)
    if triton is not None:
        _add_to_triton(screen, bundle, triton, triton_platform)
    return bundle


def _add_to_triton(screen: Any, bundle: Bundle, repository: Path, platform: Any) -> None:
    from sjepa_deploy.export.to_triton import to_triton

    model = to_triton(bundle, repository, platform=platform)
    screen.print(f"{model.name}: version {model.version} for {platform} in {escape(str(repository))}", soft_wrap=True)


def _build_engines(screen: Any, bundle: Bundle, asked: str) -> None:
    """Build what ``--engine`` asks for; where "auto" builds nothing, say why."""
    if asked == "none":
        return
    from sjepa_deploy.cli.build import build_engines, parse_precisions
    from sjepa_deploy.export.to_tensorrt import why_no_engines
    from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT

    if asked != "auto":
        build_engines(bundle, parse_precisions(asked), screen)
    elif reason := why_no_engines():
        screen.print(f"No TensorRT engines were built: {reason} On the machine that decodes: sjepa-build {bundle.path}")
    else:
        can = TensorRT("tensorrt").precisions
        build_engines(bundle, tuple(p for p in bundle.precisions if p in can), screen)


def _precisions(text: str) -> tuple[Precision, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := [name for name in names if name not in PRECISIONS]:
        raise ExportError(f"{unknown[0]!r} is not a precision.", f"Use a list of {', '.join(PRECISIONS)}.")
    if not names:
        raise ExportError("--precision names no precision.", f"Use a list of {', '.join(PRECISIONS)}.")
    return names  # type: ignore[return-value]


def _asked(
    variant: str | None, *, montage: str | None, channels: str | None, **flags: Any
) -> tuple[dict[str, Any], Montage | None]:
    names = {
        "n_times": "n_times",
        "sfreq": "sfreq",
        "unit": "unit",
        "n_outputs": "n_outputs",
        "spatial_filters": "n_spat_filters",
    }
    asked = {ours: flags[flag] for flag, ours in names.items() if flags[flag] is not None}
    if variant is not None:
        asked["variant"] = variant
    preprocessing = {} if flags["reference"] is None else {"reference": flags["reference"]}
    if flags["band"] is not None:
        preprocessing |= {name: edge or None for name, edge in zip(("l_freq", "h_freq"), flags["band"], strict=True)}
    asked["preprocessing"] = preprocessing
    if flags["class_names"] is not None:
        asked["class_names"] = tuple(name.strip() for name in flags["class_names"].split(","))
        asked.setdefault("n_outputs", len(asked["class_names"]))
    chosen = None if montage is None else read_montage(montage)
    if channels is None:
        return asked, chosen
    if channels.strip().isdecimal():
        asked["n_chans"] = int(channels)
        if chosen is not None:
            raise InputError("--montage and a number of channels say two things.", "Name the channels, or leave one flag out.")
        return asked, None
    ch_names = tuple(name.strip() for name in channels.split(","))
    if chosen is not None:
        return asked, chosen.pick(ch_names)
    asked |= {"ch_names": ch_names, "n_chans": len(ch_names)}
    return asked, None


def _length_note(
    known: dict[str, Any], model: SignalJEPAModule, eeg: FloatArray | None, parity_data: Path | None, seed: int
) -> tuple[str, ...]:
    """Say what another length than the trained one changes, measured on the parity data where they are long enough."""
    from sjepa_deploy.eeg.synthetic import eeg_windows
    from sjepa_deploy.export.window_length import MAX_WINDOWS, compare_window_lengths

    spec = model.spec
    trained: int = known.get("n_times", spec.n_times)
    if trained == spec.n_times:
        return ()
    note = f"made for windows of {trained} samples, exported for {spec.n_times}"
    if spec.replace(n_times=trained).n_tokens_per_channel != spec.n_tokens_per_channel:
        return (note,)  # the base model: its features are others
    longest = max(trained, spec.n_times)
    if eeg is not None and eeg.shape[-1] >= longest and (eeg.ndim == 3 or eeg.shape[-1] >= 2 * longest):
        assert parity_data is not None, "it is what was read"
        stretches, what = _stretches(eeg, longest, longest // 4), parity_data.name
    else:
        microvolts = eeg_windows(MAX_WINDOWS, spec.n_chans, longest, spec.sfreq, np.random.default_rng(seed))
        stretches, what = microvolts * np.float32(UNITS_IN_VOLTS["uV"] / UNITS_IN_VOLTS[spec.unit]), "synthetic EEG"
    change = compare_window_lengths(model, trained, stretches, what)
    return (note if change is None else f"{note}: {change}",)


def _parity_eeg(path: Path, spec: ModelSpec) -> FloatArray:
    """Return EEG in the unit of the spec: windows (n, n_chans, n_times) of an array, or a recording (n_chans, n_samples)."""
    from sjepa_deploy.eeg.recording import fit_recording, read_recording

    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise RecordingError(f"{path} is missing or no array ({e}).", "Give a .npy of windows, or a recording.") from e
        if array.ndim != 3 or array.shape[1:] != spec.input_shape or not len(array):
            raise RecordingError(
                f"{path} has shape {array.shape}, not (n, {spec.n_chans}, {spec.n_times}).", f"Give windows in {spec.unit}."
            )
        return np.ascontiguousarray(array, dtype=np.float32)
    return fit_recording(read_recording(path), spec, interpolate=True).data  # parity asks for real EEG, not for the right place


def _stretches(eeg: FloatArray, n_times: int, hop: int) -> FloatArray:
    """Cut a recording; windows stay as they are."""
    from sjepa_deploy.eeg.recording import windows

    return windows(eeg, n_times, hop) if eeg.ndim == 2 else eeg


def _report(screen: Any, bundle: Bundle, random: bool) -> None:
    manifest, spec = bundle.manifest, bundle.spec
    screen.print(parity_table(manifest.parity, f"{spec.variant}: parity with the PyTorch model in float64"))
    for note in manifest.weights.notes:
        screen.print(f"note: {escape(note)}", soft_wrap=True)
    if random:
        screen.print("[bold yellow]The weights are random: no checkpoint was given. The predictions mean nothing.[/]")
    size = sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file()) / 1e6
    shape = f"{spec.n_chans} channels x {spec.n_times} samples at {spec.sfreq:g} Hz in {spec.unit}"
    path = escape(str(bundle.path))
    screen.print(f"[bold]{path}[/]: {spec.variant}, {shape}, {', '.join(bundle.precisions)}, {size:.1f} MB", soft_wrap=True)
    if spec.tail > 0:
        screen.print(
            f"The newest {spec.n_times - spec.shortest_n_times} samples of a window enter no token: decisions are "
            f"{spec.tail:.3g} s old. --n-times {spec.shortest_n_times} takes the same weights without this, and measures what it "
            f"changes.",
            soft_wrap=True,
        )
    screen.print(f"Next: sjepa-verify {path}", soft_wrap=True)


def _summary(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "spec": manifest.spec,
        "graphs": manifest.graphs,
        "weights": manifest.weights,
        "random_weights": manifest.weights.random,
        "parity": manifest.parity,
    }


main = entry("export")
