"""Holds the options by which ``sjepa-export`` is told what a model takes and gives, and what they ask for together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click

from sjepa_deploy.cli import options, task
from sjepa_deploy.eeg.events import ALL
from sjepa_deploy.eeg.montage import Montage, read_montage
from sjepa_deploy.eeg.signal_file import read_signal
from sjepa_deploy.eeg.steps import Phase
from sjepa_deploy.eeg.steps.changed import changed_steps
from sjepa_deploy.errors import InputError
from sjepa_deploy.spec import UNITS_IN_VOLTS, EventWindow, Task, Unit


@dataclass(frozen=True, kw_only=True)
class Contract:
    """Holds what the user says of the model's input and outputs. None takes the checkpoint's value, or the default contract's.

    Attributes
    ----------
    signal : Path or None
        File of the signal; flags must not contradict the file.
    montage, channels, n_times, sfreq, unit
        Of the signal.
    reference : tuple of str or None
        "average" or "none" alone, or names of channels.
    band : (float, float) or None
        Edges in Hz; 0 leaves a side open.
    notch : float or None
        Mains frequency in Hz; 0 is none.
    phase : {"causal", "zero-phase"} or None
        Form of the filters of training.
    events : tuple of str
        Events that the windows belong to; empty where none are named.
    tmin : float or None
        Start of the windows in seconds after their events.
    task, n_outputs, class_names, output_unit, spatial_filters
        Of the model.
    assume_signal : bool
        Whether the user confirms what is assumed of the signal.
    """

    signal: Path | None
    montage: str | None
    channels: tuple[str, ...] | None
    n_times: int | None
    sfreq: float | None
    unit: Unit | None
    reference: tuple[str, ...] | None
    band: tuple[float, float] | None
    notch: float | None
    phase: Phase | None
    events: tuple[str, ...]
    tmin: float | None
    assume_signal: bool
    task: Task | None
    n_outputs: int | None
    class_names: tuple[str, ...] | None
    output_unit: str | None
    spatial_filters: int | None

    def ask(self, known: EventWindow | None, *, judged: bool) -> tuple[dict[str, Any], Montage | None]:
        """Return the fields for `sjepa_deploy.models.resolve.resolve_spec`, and the montage.

        Parameters
        ----------
        known : EventWindow or None
            Of the checkpoint.
        judged : bool
            Whether the events choose what of a recording is judged. Then they only name the model's where nothing else does.

        Raises
        ------
        InputError
            If flags contradict each other, or the file of the signal.
        """
        fields = {
            "n_times": self.n_times,
            "sfreq": self.sfreq,
            "unit": self.unit,
            "phase": self.phase,
            "task": self.task,
            "n_outputs": self.n_outputs,
            "class_names": self.class_names,
            "output_unit": self.output_unit,
            "n_spat_filters": self.spatial_filters,
        }
        asked: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
        named, montage = self._channels()
        asked |= named
        stated = {} if self.signal is None else read_signal(self.signal)
        names = asked.get("ch_names") if montage is None else montage.ch_names
        asked["preprocessing"] = self._changes(stated, names)
        asked["event_window"] = self._event_window(stated, known, judged=judged)
        if montage is not None and "ch_names" in stated:
            self._refuse("--montage", montage.ch_names, stated, "ch_names")
            montage = None if "positions" in stated else montage
        for name, flag in FLAGS.items():
            if name in asked and name in stated:
                self._refuse(flag, asked[name], stated, name)
        return stated | asked, montage

    def _channels(self) -> tuple[dict[str, Any], Montage | None]:
        """Return the channels that flags name, with their montage where it is known."""
        chosen = None if self.montage is None else read_montage(self.montage)
        if self.channels is None:
            return {}, chosen
        if len(self.channels) == 1 and self.channels[0].isdecimal():
            if chosen is not None:
                raise InputError(
                    "--montage and a number of channels contradict each other.", "Name the channels, or leave one flag out."
                )
            return {"n_chans": int(self.channels[0])}, None
        if chosen is not None:
            return {}, chosen.pick(self.channels)
        return {"ch_names": self.channels, "n_chans": len(self.channels)}, None

    def _changes(self, stated: dict[str, Any], ch_names: tuple[str, ...] | None) -> dict[str, Any]:
        """Return the steps that flags change, see `changed_steps`."""
        changes: dict[str, Any] = {}
        if self.reference is not None:
            alone = self.reference[0] if len(self.reference) == 1 and self.reference[0] in ("average", "none") else None
            changes["reference"] = alone or self.reference
        if self.band is not None:
            changes |= {name: edge or None for name, edge in zip(("l_freq", "h_freq"), self.band, strict=True)}
        if self.notch is not None:
            changes["notch"] = self.notch or None
        if changes and "steps" in stated:
            changed = changed_steps(stated["steps"], changes, stated.get("ch_names", ch_names))
            self._refuse("--reference, --band or --notch", changed, stated, "steps")
        return changes

    def _event_window(self, stated: dict[str, Any], known: EventWindow | None, *, judged: bool) -> dict[str, Any]:
        """Return the fields of `EventWindow` that are named, and take the window out of `stated`."""
        window: EventWindow | None = stated.pop("event_window", None)
        named: dict[str, Any] = {} if self.tmin is None else {"start": self.tmin}
        chosen = self.events == (ALL,) or any(name.endswith(".tsv") for name in self.events)
        if chosen and not judged:
            raise click.UsageError(f"--events {self.events[0]} chooses events of a recording: name it with --task-data.")
        if self.events and not chosen and not (judged and any(each is not None and each.events for each in (window, known))):
            named["events"] = self.events
        if window is None:
            return named
        told = {"start": window.start} | ({"events": window.events} if window.events else {})
        for name in {*named} & {*told}:
            self._refuse({"start": "--tmin", "events": "--events"}[name], named[name], told, name)
        return told | named

    def _refuse(self, flag: str, value: object, stated: dict[str, Any], name: str) -> None:
        """Refuse a flag whose value is not the one in the file of the signal."""
        if value != stated[name]:
            raise InputError(f"{flag} contradicts the {name} in {self.signal}.", "Leave the flag out, or change the file.")


FLAGS = {
    "ch_names": "--channels",
    "n_chans": "--channels",
    "n_times": "--n-times",
    "sfreq": "--sfreq",
    "unit": "--unit",
    "phase": "--phase",
}
"""Flag of each field of a signal that a file may state too, and that is compared as it is."""

of_the_model = options.fills(
    "contract",
    Contract,
    click.option(
        "--signal",
        type=options.path,
        help="YAML or JSON file of the signal that the model learned from: steps, phase, event window, unit, channels.",
    ),
    options.montage,
    click.option(
        "--channels",
        type=options.Names(),
        metavar="A,B,...",
        help="Channels of the model in order (picked from --montage), or their number.",
    ),
    options.n_times,
    options.model_sfreq,
    click.option("--unit", type=click.Choice(list(UNITS_IN_VOLTS)), help="Unit of the model's input."),
    click.option(
        "--reference",
        type=options.Names(),
        metavar="average|none|A,B,...",
        help="Reference that recordings are brought to: the average of the model's channels, their own, or electrodes.",
    ),
    click.option(
        "--band",
        nargs=2,
        type=float,
        metavar="LOW HIGH",
        help="Band in Hz that recordings are filtered to; 0 leaves a side open.",
    ),
    options.rare(
        click.option("--notch", type=float, metavar="HZ", help="Mains frequency that is removed with its harmonics; 0 is none.")
    ),
    click.option("--phase", type=click.Choice(get_args(Phase)), help="Form of the filters that made the training windows."),
    options.several(
        "--events", help="Events that the windows of the model belong to; with --task-data those to judge, all or FILE.tsv too."
    ),
    task.tmin,
    click.option(
        "--assume-signal", is_flag=True, help="Confirm what is assumed of the signal where neither checkpoint nor flags tell."
    ),
    click.option("--task", type=click.Choice(get_args(Task)), help="What the outputs are for."),
    options.rare(click.option("--n-outputs", type=int, help="Outputs of the model.")),
    click.option(
        "--class-names", type=options.Names(), metavar="A,B,...", help="Names of the outputs; two names for a single output."
    ),
    options.rare(click.option("--output-unit", metavar="UNIT", help="Unit of the outputs of a regression, such as s.")),
    options.spatial_filters,
    title="What the model takes and gives",
)
"""Hands a `Contract` to the command as ``contract``."""
