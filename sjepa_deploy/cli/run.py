"""``sjepa-run`` decodes a recording."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import click
import numpy as np
from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.eeg.epochs import holds_windows, read_windows
from sjepa_deploy.eeg.names import parse_rename
from sjepa_deploy.eeg.recording import UNIT_MEND, check_amplitude, fit_recording, read_recording
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.files import written_whole
from sjepa_deploy.runtime.backend import FloatArray
from sjepa_deploy.spec import ModelSpec


@options.command
@options.bundle
@click.argument("recording", type=options.path)
@options.out_file
@options.force
@click.option("--hop", type=float, help="Seconds from one window to the next.  [default: one window]")
@options.interpolate
@options.check_unit
@options.signal_facts
@options.backend_choice()
@options.json_output
def run(
    bundle: Path,
    recording: Path,
    *,
    out: Path | None,
    force: bool,
    hop: float | None,
    interpolate: float | None,
    check_unit: bool,
    facts: options.SignalFacts,
    choice: options.BackendChoice,
    json_output: bool,
) -> None:
    """Decode RECORDING with BUNDLE into a table of time and prediction.

    The table is tab-separated. Without --out it goes to standard output. The recording passes the preprocessing that the bundle
    asks for: channels picked by name, zero-phase band-pass, resampling, reference, unit. No window reaches over a pause. The time
    of a row is that of the window's last sample, in seconds from the start of the recording. Of windows that are cut already
    (*-epo.fif, or an array of windows) each gives a row.
    """
    out = None if out == options.STDOUT else out
    if json_output and out is None:
        raise click.UsageError("--json needs --out: standard output cannot hold both.")
    options.check_file(out, force=force)
    screen = console(json_output or out is None)
    opened = Bundle.open(bundle)
    spec = opened.spec
    step = spec.n_times if hop is None else _samples(hop, spec)
    if holds_windows(recording):
        if hop is not None:
            raise click.UsageError(f"{recording.name} holds windows, which are decoded as they are. Leave out --hop.")
        cut = read_windows(recording, spec.signal, unit=facts.unit)
        if check_unit:
            check_amplitude(cut.eeg, spec.sfreq, UNIT_MEND, unit=spec.unit)
        pieces, times, steps = [cut.eeg], cut.times, cut.steps
        told = [*steps]
    else:
        raw = read_recording(
            recording,
            sfreq=facts.sfreq,
            unit=facts.unit,
            ch_names=facts.ch_names,
            row_names=spec.ch_names,
            rename=parse_rename(facts.rename, RecordingError),
        )
        fitted = fit_recording(raw, spec.signal, interpolate=interpolate or 0.0, check_unit=check_unit)
        pieces, steps = fitted.windows(step), fitted.steps
        times = fitted.times(fitted.window_starts(step) + spec.n_times - 1)
        told = [f"has {fitted.n_found} of the model's {spec.n_chans} channels", *steps]
    with choice.load(opened, check_unit=False) as predict:  # the recording was judged as a whole
        for note in told:
            screen.print(f"recording: {escape(note)}", soft_wrap=True)
        with screen.status("decoding"):
            outputs = np.concatenate([predict.predict(piece) for piece in pieces])
    try:
        with contextlib.nullcontext(sys.stdout) if out is None else _whole_file(out) as stream:
            _write(stream, times, outputs, spec)
    except BrokenPipeError:
        raise  # click ends quietly where a reader like `head` has seen enough
    except OSError as e:
        raise RecordingError(
            f"{out or 'Standard output'} cannot be written ({e.strerror}).", "Choose another --out, or free some space."
        ) from e
    if opened.manifest.weights.random:
        screen.print("[bold yellow]The weights of this bundle are random: the predictions mean nothing.[/]")
    where = "" if out is None else f" in [bold]{escape(str(out))}[/]"
    every = "" if holds_windows(recording) else f" every {step / spec.sfreq:g} s"
    screen.print(f"{len(times)} windows of {spec.n_times / spec.sfreq:g} s{every} decoded{where}", soft_wrap=True)
    if json_output:
        print_json(
            {
                "bundle": str(bundle),
                "recording": str(recording),
                "out": str(out),
                "n_windows": len(times),
                "hop": step / spec.sfreq,
                "signal": spec.signal,
                "steps": steps,
                "random_weights": opened.manifest.weights.random,
            }
        )


def _samples(hop: float, spec: ModelSpec) -> int:
    if not 0.5 < hop * spec.sfreq < 2**31:
        seconds = 1 / spec.sfreq
        raise click.UsageError(f"--hop is {hop:g} s, a sample of this model {seconds:g} s: use {seconds:g} or more.")
    return round(hop * spec.sfreq)


@contextlib.contextmanager
def _whole_file(path: Path) -> Iterator[IO[str]]:
    """Open `path` for writing. A file is written whole or not at all; devices and pipes are written as they are."""
    if path.exists() and not path.is_file():
        with path.open("w", newline="") as stream:
            yield stream
        return
    with written_whole(path.resolve()) as partial, partial.open("w", newline="") as stream:
        yield stream


def _write(stream: IO[str], times: np.ndarray[tuple[int], np.dtype[np.float64]], outputs: FloatArray, spec: ModelSpec) -> None:
    rows = outputs.reshape(len(outputs), -1)
    if spec.class_names is not None:
        names = list(spec.class_names)
    elif rows.shape[1] == 1:
        names = [spec.output_name]
    else:
        names = [f"{spec.output_name}_{i}" for i in range(rows.shape[1])]
    stream.write("\t".join(["time", *names]) + "\n")
    for time, row in zip(times, rows, strict=True):
        stream.write("\t".join([f"{time:.6f}", *(f"{value:.9g}" for value in row)]) + "\n")
    stream.flush()


main = entry("run")
