"""``sjepa-export`` turns a checkpoint into a verified bundle."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape

from sjepa_deploy.bundle import MAX_BATCH, check_writable
from sjepa_deploy.cli import console, entry, options, parity_table, print_json, spec_lines, task
from sjepa_deploy.cli.contract import Contract, of_the_model
from sjepa_deploy.cli.hand_out import Publication, hand_out
from sjepa_deploy.cli.hand_out import publication as publication_options
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.cli.task import EventChoice
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.eeg.units import conversion
from sjepa_deploy.errors import ExportError, MissingDependencyError, RecordingError, listed
from sjepa_deploy.spec import PRECISIONS, RUN_PRECISIONS, VARIANTS, ModelSpec, Precision, RunPrecision, graph_precision

if TYPE_CHECKING:
    from sjepa_deploy.bundle import Bundle
    from sjepa_deploy.evaluation.task import TaskParity
    from sjepa_deploy.models.checkpoint import Checkpoint
    from sjepa_deploy.models.networks import SignalJEPAModule
    from sjepa_deploy.models.resolve import Assumption
    from sjepa_deploy.runtime.backend import FloatArray

TRITON_PLATFORMS = ("python", "onnxruntime", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Says where the weights come from, and what their shapes do not tell.

    Attributes
    ----------
    variant : str or None
        Model to export; the checkpoint's where there is one.
    checkpoint : Path or None
        Folder or file of the weights. None makes them random.
    prefix : str or None
        What stands before the model's keys.
    allow_left_out : tuple of str
        Weights or modules that may be left out.
    n_heads, strides, sfreq_features, max_norm
        See `sjepa_deploy.models.encoder_sizes`. None says nothing.
    """

    variant: str | None
    checkpoint: Path | None
    prefix: str | None
    allow_left_out: tuple[str, ...]
    n_heads: int | None
    strides: tuple[int, ...] | None
    sfreq_features: float | None
    max_norm: float | None


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """Says which graphs are written, and what judges them.

    Attributes
    ----------
    precisions : tuple of Precision
        One graph each; the first is the bundle's default.
    opset, max_batch : int
        ONNX opset and largest batch.
    static_batch : int or None
        The only batch size, in place of 1 to `max_batch`.
    seed : int
        Seed of random weights and of the windows that parity is judged with.
    parity_data : Path or None
        EEG of the user to judge with as well.
    interpolate : float
        Largest share of the model's channels that is interpolated where a recording lacks them.
    rename : tuple of str
        "THEIRS=MINE": channels of recordings that get other names.
    check_unit : bool
        Whether recordings are refused whose amplitudes no EEG has.
    """

    precisions: tuple[Precision, ...]
    opset: int
    max_batch: int
    static_batch: int | None
    seed: int
    parity_data: Path | None
    interpolate: float
    rename: tuple[str, ...]
    check_unit: bool

    @property
    def facts(self) -> options.SignalFacts:
        """What the user says of recordings."""
        return options.SignalFacts(unit=None, ch_names=None, rename=self.rename, sfreq=None)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Says on which events the live decoder is compared with the model.

    Attributes
    ----------
    task_data : Path or None
        Recording with these events.
    classes, column
        See `sjepa_deploy.cli.task.EventChoice`.
    """

    task_data: Path | None
    classes: tuple[str, ...] | None
    column: str | None

    def choice(self, contract: Contract, spec: ModelSpec) -> EventChoice:
        """Return the events to judge: those that the user names, or the model's."""
        window = spec.signal.event_window
        events = contract.events or (() if window is None else window.events)
        if not events:
            raise click.UsageError("--task-data needs events: name them with --events (or all, or FILE.tsv).")
        return EventChoice(events=events, tmin=contract.tmin, classes=self.classes, column=self.column)


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Says what is written.

    Attributes
    ----------
    out : Path or None
        Folder of the bundle.
    force : bool
        Whether a bundle that is there is replaced.
    engines : tuple of str
        TensorRT engines to build: precisions, or "auto" or "none" alone.
    triton : Path or None
        Triton model repository to add the bundle to.
    triton_platform : str
        Runtime of the graph in Triton.
    """

    out: Path | None
    force: bool
    engines: tuple[str, ...]
    triton: Path | None
    triton_platform: str


def _graphs(
    precisions: tuple[RunPrecision, ...], interpolate: float | None, rename: tuple[str, ...] | None, **values: Any
) -> Graphs:
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise click.UsageError(f"{unknown[0]!r} is not a precision of a graph. Use a list of {listed(PRECISIONS)}.")
    kept = tuple(name for name in precisions if name in PRECISIONS) or PRECISIONS
    return Graphs(precisions=kept, interpolate=interpolate or 0.0, rename=rename or (), **values)


def _outputs(engines: tuple[str, ...], **values: Any) -> Outputs:
    if len(engines) > 1 and {"auto", "none"} & {*engines}:
        raise click.UsageError("--engine takes auto, none, or precisions.")
    return Outputs(engines=engines, **values)


@options.command
@options.fills(
    "weights",
    Weights,
    click.option(
        "--variant", type=click.Choice([*VARIANTS, "all"]), help="Model to export. Without it the checkpoint names the model."
    ),
    click.option(
        "-k",
        "--checkpoint",
        type=options.path,
        help="Folder or file of the weights, or org/name[@revision] of the Hub; else random.",
    ),
    options.rare(click.option("--prefix", help="What stands before the model's keys in a checkpoint that holds several models.")),
    options.rare(options.allow_left_out),
    options.untold,
    title="Model",
)
@of_the_model
@options.fills(
    "graphs",
    _graphs,
    options.precisions,
    options.rare(click.option("--opset", type=int, default=17, help="ONNX opset.")),
    click.option("--max-batch", type=click.IntRange(min=1, max=MAX_BATCH), default=64, help="Largest batch of windows."),
    options.rare(
        click.option(
            "--static-batch", type=click.IntRange(min=1, max=MAX_BATCH), help="The only batch size, in place of 1 to --max-batch."
        )
    ),
    options.seed,
    click.option("--parity-data", type=options.path, help="Recording, or .npy of windows, to judge with as well."),
    options.rare(options.interpolate, options.rename),
    options.check_unit,
    title="Graphs, and what judges them",
)
@options.fills(
    "judged",
    Judged,
    click.option("--task-data", type=options.path, help="Recording with events on which the live decoder is judged too."),
    options.rare(task.labels),
    title="Graphs, and what judges them",
)
@options.fills(
    "outputs",
    _outputs,
    options.out_folder("sjepa-VARIANT"),
    options.force,
    options.several(
        "--engine",
        "engines",
        choices=("auto", "none", *RUN_PRECISIONS),
        default=("auto",),
        help="TensorRT engines to build for this machine: precisions, or none. auto builds one for every graph where TensorRT "
        "and a GPU are there.",
    ),
    click.option("--triton", type=options.path, help="Triton model repository to add the bundle to."),
    options.rare(
        click.option(
            "--triton-platform", type=click.Choice(TRITON_PLATFORMS), default="python", help="Runtime of the graph in Triton."
        )
    ),
    title=options.OUTPUT,
)
@publication_options
@options.json_output
def export(
    *,
    weights: Weights,
    contract: Contract,
    graphs: Graphs,
    judged: Judged,
    outputs: Outputs,
    publication: Publication,
    json_output: bool,
) -> None:
    """Export a SignalJEPA model into a bundle, and prove that it equals the PyTorch model.

    The bundle is a folder that any machine decodes with. Every graph is compared with the model in float64; if one differs by
    more than its tolerance, nothing is written and the exit status is 1. The first of --precision is the bundle's default.

    With --task-data the bundle then decodes the events of a recording three ways, as sjepa-stream --check --events does: the exit
    status is 1 if the live decoder does not decide as the model did.
    """
    for package in ("torch", "onnx", "onnxscript", "safetensors"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(package, "export")
    publication.check(force=outputs.force, one_model=weights.variant != "all")
    screen = console(json_output)
    if weights.variant != "all":
        bundle = _export_one(screen, weights, contract, graphs, judged, outputs)
        result = _judge(screen, bundle, contract, graphs, judged)
        pushed = hand_out(screen, bundle, weights.checkpoint, publication)
        if json_output:
            print_json(_summary(bundle) | ({} if result is None else {"task": result}) | pushed)
        if result is not None:
            task.require_passed(result)
        return
    if judged.task_data is not None:
        raise ExportError("Random weights have no task.", "Leave --task-data out, or name a checkpoint.")
    if weights.checkpoint is not None:
        raise ExportError("A checkpoint holds one variant.", "Leave --variant all out.")
    folders = {name: (outputs.out or Path("sjepa-all")) / name for name in VARIANTS}
    for folder in folders.values():
        check_writable(folder, force=outputs.force)
    bundles = [
        _export_one(screen, replace(weights, variant=name), contract, graphs, judged, replace(outputs, out=folder))
        for name, folder in folders.items()
    ]
    if json_output:
        print_json([_summary(bundle) for bundle in bundles])


def _export_one(
    screen: Console, weights: Weights, contract: Contract, graphs: Graphs, judged: Judged, outputs: Outputs
) -> Bundle:
    from sjepa_deploy.bundle import Provenance
    from sjepa_deploy.export.to_bundle import ExportParityError, to_bundle
    from sjepa_deploy.learning.origin import nameless
    from sjepa_deploy.models.checkpoint import load_model, read_checkpoint
    from sjepa_deploy.models.networks import build_model
    from sjepa_deploy.models.resolve import resolve_spec

    if outputs.out is not None:
        check_writable(outputs.out, force=outputs.force)
    read = None
    if weights.checkpoint is not None:
        read = read_checkpoint(
            weights.checkpoint, prefix=weights.prefix, allow_left_out=weights.allow_left_out, max_norm=weights.max_norm
        )
    if weights.variant is None and read is None:
        raise ExportError(
            "Neither --variant nor --checkpoint was given.", "Name one; with --variant alone the weights are random."
        )
    asked, montage = contract.ask(read.known.get("event_window") if read else None, judged=judged.task_data is not None)
    asked["encoder"] = {name: getattr(weights, name) for name in ("n_heads", "strides", "sfreq_features")}
    if weights.variant is not None:
        asked["variant"] = weights.variant
    spec, assumed = resolve_spec(asked, read, asked_montage=montage)
    if read is not None and not contract.assume_signal:
        _require_confirmed(screen, read, assumed)
    told = tuple(map(str, assumed))
    out = outputs.out or Path(f"sjepa-{spec.variant}")
    check_writable(out, force=outputs.force)
    _check_more(outputs, graphs.precisions, spec)
    if judged.task_data is not None:  # a mistake costs no export
        task.read_task(judged.task_data, judged.choice(contract, spec), spec, graphs.facts)
    seed, parity_data = graphs.seed, graphs.parity_data
    eeg = None if parity_data is None else _parity_eeg(parity_data, spec, graphs)
    if read is None:
        model = build_model(spec, seed=seed)
        provenance = Provenance(source="random", format="initialisation", seed=seed, notes=told)
    else:
        model = load_model(read, spec)
        provenance = Provenance(
            source=read.file_name,
            format=read.file_format,
            sha256=read.sha256,
            notes=read.notes + _length_note(read.known, model, eeg, parity_data, seed) + told,
        )
    try:
        with progress(f"{spec.variant}: exporting", total=2 + 2 * len(graphs.precisions)) as steps:
            bundle = to_bundle(
                model,
                out,
                weights=provenance,
                precisions=graphs.precisions,
                opset=graphs.opset,
                max_batch=graphs.max_batch,
                static_batch=graphs.static_batch,
                parity_windows=None if eeg is None else _windows(eeg, spec),
                check_unit=graphs.check_unit,
                seed=seed,
                force=outputs.force,
                training=None if read is None else nameless(read.training),
                progress=lambda text: steps.begin(f"{spec.variant}: {text}"),
            )
    except ExportParityError as e:
        screen.print(parity_table(e.results, f"{spec.variant}: parity with the PyTorch model in float64"))
        raise
    _report(screen, bundle, read is None)
    _build_engines(screen, bundle, outputs.engines)
    if outputs.triton is not None:
        _add_to_triton(screen, bundle, outputs.triton, outputs.triton_platform)
    n, path = len(bundle.manifest.parity), escape(str(bundle.path))
    screen.print(f"[bold green]exported:[/] {n} graph{'s' * (n > 1)} equal to PyTorch. Next: sjepa-verify {path}", soft_wrap=True)
    return bundle


def _judge(screen: Console, bundle: Bundle, contract: Contract, graphs: Graphs, judged: Judged) -> TaskParity | None:
    """Compare the live decoder with the model on the events of ``--task-data``."""
    from sjepa_deploy.runtime.predictor import load

    if judged.task_data is None:
        return None
    with load(bundle, check_unit=False) as predict:
        return task.judge_task(
            screen,
            predict,
            judged.task_data,
            judged.choice(contract, bundle.spec),
            graphs.facts,
            interpolate=graphs.interpolate,
            check_unit=graphs.check_unit,
        )


def _check_more(outputs: Outputs, precisions: tuple[Precision, ...], spec: ModelSpec) -> None:
    """Check, before the export, what is made of the bundle after the export.

    Raises
    ------
    ExportError
        If an engine needs a graph that is not exported, or the model does not fit the model of the repository.
    BackendError, MissingDependencyError
        If engines are asked for and cannot be built here.
    """
    from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
    from sjepa_deploy.runtime.gpu.cuda import Device

    asked = [name for name in RUN_PRECISIONS if name in outputs.engines]
    for name in asked:
        if graph_precision(name) not in precisions:
            raise ExportError(
                f"A {name} engine is built from the {graph_precision(name)} graph, which is not exported.",
                f"Add {graph_precision(name)} to --precision, or leave {name} out of --engine.",
            )
    if asked:
        TensorRT("tensorrt")
        Device().close()
    if outputs.triton is not None:
        from sjepa_deploy.export.to_triton import check_served

        check_served(spec, outputs.triton)


def _require_confirmed(screen: Console, read: Checkpoint, assumed: tuple[Assumption, ...]) -> None:
    """Refuse to export a checkpoint whose signal is assumed, and list what is assumed with the flag that changes it."""
    if not any(each.of_signal for each in assumed):
        return
    name = read.file_name
    for note in read.notes:
        screen.print(f"note: {escape(note)}", soft_wrap=True)
    screen.print(f"Of {escape(name)} is assumed:", soft_wrap=True)
    for each in assumed:
        screen.print(f"  {escape(str(each))}", soft_wrap=True)
    raise ExportError(
        f"Neither {name} nor a flag says all of the signal that the model learned from, and wrong steps change decisions without "
        "any error.",
        "Confirm the list above with --assume-signal, or say otherwise with these flags or with --signal FILE.",
    )


def _add_to_triton(screen: Console, bundle: Bundle, repository: Path, platform: Any) -> None:
    from sjepa_deploy.export.to_triton import to_triton

    model = to_triton(bundle, repository, platform=platform)
    screen.print(f"{model.name}: version {model.version} for {platform} in {escape(str(repository))}", soft_wrap=True)


def _build_engines(screen: Console, bundle: Bundle, asked: tuple[str, ...]) -> None:
    """Build the engines that ``--engine`` asks for; where "auto" builds none, say why."""
    if asked == ("none",):
        return
    from sjepa_deploy.cli.build import build_engines
    from sjepa_deploy.export.to_tensorrt import why_no_engines
    from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT

    if asked != ("auto",):
        build_engines(bundle, tuple(name for name in RUN_PRECISIONS if name in asked), screen)
    elif reason := why_no_engines():
        screen.print(f"No TensorRT engines were built: {reason} On the machine that decodes: sjepa-build {bundle.path}")
    else:
        can = TensorRT("tensorrt").precisions
        build_engines(bundle, tuple(p for p in bundle.precisions if p in can), screen)


def _length_note(
    known: dict[str, Any], model: SignalJEPAModule, eeg: FloatArray | None, parity_data: Path | None, seed: int
) -> tuple[str, ...]:
    """Measure what another length than the trained one changes, on the parity data where they are long enough."""
    from sjepa_deploy.eeg.synthetic import eeg_windows
    from sjepa_deploy.export.window_length import MAX_WINDOWS, compare_window_lengths

    spec = model.spec
    trained: int = known.get("n_times", spec.n_times)
    if trained == spec.n_times:
        return ()
    note = f"made for windows of {trained} samples, exported for {spec.n_times}"
    if spec.replace(n_times=trained).n_tokens_per_channel != spec.n_tokens_per_channel:
        return (note,)  # the base model: its features are others
    if spec.signal.window_steps or not spec.signal.in_unit:
        return (note,)  # windows of both lengths are not cut from one stretch
    longest = max(trained, spec.n_times)
    if eeg is not None and eeg.shape[-1] >= longest and (eeg.ndim == 3 or eeg.shape[-1] >= 2 * longest):
        assert parity_data is not None, "it is what was read"
        stretches, what = _stretches(eeg, longest, longest // 4), parity_data.name
    else:
        microvolts = eeg_windows(MAX_WINDOWS, spec.n_chans, longest, spec.sfreq, np.random.default_rng(seed))
        stretches, what = microvolts * np.float32(conversion("uV", spec.unit)), "synthetic EEG"
    change = compare_window_lengths(model, trained, stretches, what)
    return (note if change is None else f"{note}: {change}",)


def _parity_eeg(path: Path, spec: ModelSpec, graphs: Graphs) -> FloatArray:
    """Return EEG in the unit of the spec: windows (n, n_chans, n_times) of an array, or a recording (n_chans, n_samples)."""
    from sjepa_deploy.eeg.recording import fit_recording, read_recording
    from sjepa_deploy.export.to_bundle import real_eeg

    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise RecordingError(f"{path} is missing or no array ({e}).", "Give a .npy of windows, or a recording.") from e
        return real_eeg(array, spec, check_unit=graphs.check_unit)
    raw = read_recording(path, rename=parse_rename(graphs.rename, RecordingError))
    return fit_recording(raw, spec.signal, interpolate=graphs.interpolate, check_unit=graphs.check_unit).data


def _stretches(eeg: FloatArray, n_times: int, hop: int) -> FloatArray:
    """Cut a recording; windows stay as they are."""
    from sjepa_deploy.eeg.windows import windows

    return windows(eeg, n_times, hop) if eeg.ndim == 2 else eeg


def _windows(eeg: FloatArray, spec: ModelSpec) -> FloatArray:
    """Cut a recording into windows with all steps; windows stay as they are."""
    from sjepa_deploy.eeg.chain import finish_windows

    return finish_windows(spec.signal, _stretches(eeg, spec.n_times, spec.n_times)) if eeg.ndim == 2 else eeg


def _report(screen: Console, bundle: Bundle, random: bool) -> None:
    manifest, spec = bundle.manifest, bundle.spec
    screen.print(parity_table(manifest.parity, f"{spec.variant}: parity with the PyTorch model in float64"))
    for note in manifest.weights.notes:
        screen.print(f"note: {escape(note)}", soft_wrap=True)
    if random:
        screen.print("[bold yellow]The weights are random: no checkpoint was given. The predictions mean nothing.[/]")
    size = sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file()) / 1e6
    shape = f"{spec.n_chans} channels x {spec.n_times} samples at {spec.sfreq:g} Hz in {spec.unit}"
    path = escape(str(bundle.path))
    for line in spec_lines(spec):
        screen.print(escape(line), soft_wrap=True)
    screen.print(f"[bold]{path}[/]: {spec.variant}, {shape}, {', '.join(bundle.precisions)}, {size:.1f} MB", soft_wrap=True)
    if spec.tail > 0:
        screen.print(
            f"The newest {spec.n_times - spec.shortest_n_times} samples of a window enter no token: decisions are "
            f"{spec.tail:.3g} s old. --n-times {spec.shortest_n_times} takes the same weights without this, and measures what it "
            f"changes.",
            soft_wrap=True,
        )


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
