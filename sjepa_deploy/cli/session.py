"""``sjepa-session`` shows, replays and exports the runs that ``sjepa-stream --session`` recorded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.errors import ParityError, StreamError
from sjepa_deploy.runtime.live.adapt import Adapter
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorder import Recorder
from sjepa_deploy.runtime.live.records import RunLabels
from sjepa_deploy.runtime.live.replay import replay
from sjepa_deploy.runtime.session.bids import export_run
from sjepa_deploy.runtime.session.folder import read_run, record_run, room, run_labels, run_path, runs_of

LITTLE_ROOM_S = 3600.0
"""Seconds of recording for which a disk should have room when a run begins."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Says in which session the run of a stream is recorded.

    Attributes
    ----------
    folder : Path or None
        Folder of the experiment; None: the run belongs to no session.
    subject, task_label : str or None
        Labels of the run.
    run : int or None
        Number of the run; None is the next one.
    session_label : str or None
        Label of the session.
    """

    folder: Path | None
    subject: str | None
    task_label: str | None
    run: int | None
    session_label: str | None

    def labels(self) -> RunLabels | None:
        """Return the labels of the run, once it is known that it is not there; None outside of a session."""
        given = {"--subject": self.subject, "--task": self.task_label, "--run": self.run, "--session-label": self.session_label}
        if self.folder is None:
            if any(value is not None for value in given.values()):
                raise click.UsageError(f"{', '.join(given)} are of --session FOLDER.")
            return None
        if self.subject is None or self.task_label is None:
            raise click.UsageError("--session needs --subject and --task: labels of letters and digits.")
        return run_labels(self.folder, subject=self.subject, task=self.task_label, run=self.run, session=self.session_label)

    def record(self, screen: Console, decoder: Decoder, labels: RunLabels, *, adapter: Adapter | None) -> Recorder:
        """Record the run of `decoder`, and tell where, and how much room the disk has."""
        assert self.folder is not None
        recorder = record_run(decoder, self.folder, labels, adapter=adapter)
        free, seconds = room(decoder, self.folder)
        style = "" if seconds > LITTLE_ROOM_S else "[bold yellow]"
        screen.print(
            f"recorded: {escape(str(run_path(self.folder, labels)))}; {style}the disk has {free / 1e9:.3g} GB free, for "
            f"{seconds / 3600:.3g} hours",
            soft_wrap=True,
        )
        return recorder


kept = options.fills(
    "kept",
    Kept,
    click.option("--session", "folder", type=options.path, help="Folder to record the run in, with --subject and --task."),
    options.rare(click.option("--subject", metavar="LABEL", help="Subject of the run: a label that names nobody.")),
    options.rare(click.option("--task", "task_label", metavar="LABEL", help="Task of the run.")),
    options.rare(click.option("--run", type=click.IntRange(min=1), help="Number of the run.  [default: the next one]")),
    options.rare(click.option("--session-label", metavar="LABEL", help="Session of the subject, where there are several.")),
    title=options.OUTPUT,
)


@options.command
@click.argument("action", type=click.Choice(["show", "replay", "export"]))
@click.argument("folder", type=options.path)
@click.argument("target", type=options.path, required=False)
@click.option("--date/--no-date", default=True, help="Whether an export tells when each run began.")
@options.force
@options.backend_choice()
@options.json_output
def session(
    action: str,
    folder: Path,
    target: Path | None,
    *,
    date: bool,
    force: bool,
    choice: options.BackendChoice,
    json_output: bool,
) -> None:
    """Tell what the runs in FOLDER are, decode them again, or export them. FOLDER may be one run.

    show FOLDER lists the runs. replay FOLDER BUNDLE decodes them again with BUNDLE and compares every decision and state; the
    exit status is 1 if one differs. export FOLDER BIDS writes them into a BIDS folder: samples, events, bad channels, and the
    decisions as a derivative.
    """
    if (target is None) != (action == "show"):
        raise click.UsageError(
            {"show": "show takes FOLDER alone.", "replay": "Give FOLDER BUNDLE."}.get(action, "Give FOLDER BIDS.")
        )
    screen, files = console(json_output), runs_of(folder)
    if action == "show":
        _show(screen, files, json_output)
    elif action == "replay":
        assert target is not None
        _replay(screen, files, target, choice, json_output)
    else:
        assert target is not None
        _export(screen, files, target, json_output, date=date, force=force)


def _show(screen: Console, files: list[Path], json_output: bool) -> None:
    told = []
    for file in files:
        run = read_run(file)
        assert run.run.labels is not None
        seconds = sum(len(chunk.stamps) for chunk in run.chunks) / run.run.stream.sfreq
        events = dict(Counter(one.event.description for one in run.events))
        told.append(
            {"run": str(file), "labels": run.run.labels, "seconds": seconds, "events": events, "n_decisions": len(run.rows)}
            | {"n_without_decision": len(run.undecided), "bundle": run.run.bundle, "bundle_digest": run.run.bundle_digest}
        )
        began = run.run.labels.started[:16].replace("T", " ")
        names = ", ".join(f"{name} ({n})" for name, n in events.items()) or "none"
        screen.print(
            f"[bold]{file.stem}[/]: {began} UTC, {seconds:.1f} s; events: {escape(names)}; "
            f"{len(run.rows)} decisions with {escape(Path(run.run.bundle).name)} ({run.run.bundle_digest[:12]}), "
            f"events without one: {len(run.undecided)}",
            soft_wrap=True,
        )
    screen.print(f"runs: {len(files)}")
    if json_output:
        print_json(told)


def _replay(screen: Console, files: list[Path], bundle: Path, choice: options.BackendChoice, json_output: bool) -> None:
    opened, results = Bundle.open(bundle), []
    if len(files) > 1:
        _check_bundle(files, opened)
    for file in files:
        record = read_run(file)
        with choice.load(opened, precision=record.run.precision, check_unit=False) as predict:
            result = replay(predict, record)
        results.append(result)
        screen.print(
            f"{file.name}: {result.n_decisions} decisions on {result.n_samples} samples: {len(result.differ)} differ, "
            f"{len(result.missing)} are missing; {result.n_states} states: {len(result.states_differ)} differ",
            soft_wrap=True,
        )
    if json_output:
        print_json(results)
    if wrong := [file.name for file, result in zip(files, results, strict=True) if not result.passed]:
        raise ParityError(f"The replay differs in {', '.join(wrong)}.", "Use the backend and release of the record.")
    screen.print(f"replayed: {len(files)} of {len(files)}, with every decision and state as it was")


def _check_bundle(files: list[Path], bundle: Bundle) -> None:
    """Refuse, before anything is decoded, runs of which some were decoded with another bundle."""
    runs = [(file, read_run(file).run) for file in files]
    if all(run.bundle_digest == bundle.manifest.digest for _, run in runs):
        return
    told = ", ".join(f"{file.name} with {Path(run.bundle).name} ({run.bundle_digest[:12]})" for file, run in runs)
    raise StreamError(
        f"{bundle.path.name} ({bundle.manifest.digest[:12]}) is another bundle than that of some runs: {told}.",
        "Name the file of a run in place of the folder, with the bundle of the run.",
    )


def _export(screen: Console, files: list[Path], root: Path, json_output: bool, *, date: bool, force: bool) -> None:
    notes = {}
    for file in files:
        notes[str(file)] = export_run(file, root, with_date=date, force=force)
        screen.print(escape(file.name), soft_wrap=True)
        for note in notes[str(file)]:
            screen.print(f"  {escape(note)}", soft_wrap=True)
    screen.print(f"exported: {len(files)} of {len(files)} to {escape(str(root))}", soft_wrap=True)
    if json_output:
        print_json({"bids": str(root), "runs": notes})


main = entry("session")
