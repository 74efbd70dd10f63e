"""Describes a model: `ModelSpec` is the frozen contract that models, exporters, bundles and runtimes share.

Its part `SignalSpec` is all that a reader, a filter or a stream needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

from sjepa_deploy.eeg.steps import BandPass, Channels, Goal, Phase, Resample, Step, WindowStep
from sjepa_deploy.eeg.steps import Reference as ReferenceStep
from sjepa_deploy.errors import SpecError, listed
from sjepa_deploy.serialize import decode, encode

Variant = Literal["prelocal", "postlocal", "contextual", "base"]
Unit = Literal["nV", "uV", "mV", "V"]
Reference = Literal["average", "none"]
Task = Literal["classification", "regression", "features"]
Precision = Literal["fp32", "fp16", "bf16"]
RunPrecision = Literal["fp32", "tf32", "fp16", "bf16"]

VARIANTS: tuple[Variant, ...] = ("prelocal", "postlocal", "contextual", "base")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
RUN_PRECISIONS: tuple[RunPrecision, ...] = ("fp32", "tf32", "fp16", "bf16")
"""Precisions of a backend: the types of the graphs, with float32 under two names. "fp32" never uses TensorFloat-32."""

UNITS_IN_VOLTS: dict[Unit, float] = {"nV": 1e-9, "uV": 1e-6, "mV": 1e-3, "V": 1.0}


Position = tuple[float, float, float]


def graph_precision(precision: RunPrecision) -> Precision:
    """Return the precision of the graph that a backend runs in `precision`: TensorFloat-32 is a way to run the fp32 graph."""
    return "fp32" if precision == "tf32" else precision


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """Holds the sizes of the encoder that all variants share (defaults: the published models).

    Attributes
    ----------
    conv_layers : tuple of (int, int, int)
        (dim, kernel, stride) of each convolution of the feature encoder. The last dim is the embedding size.
    spat_dim, time_dim : int
        Dimensions of the spatial and of the temporal part of the position encoding.
    sfreq_features : float
        Rate of the time tokens in Hz that scales the temporal encoding (600 s at this rate).
    n_layers, n_decoder_layers, n_heads : int
        Encoder layers, decoder layers (the predictor of pretraining) and attention heads of the transformer.
    drop_prob : float
        Dropout of the feature encoder. The transformer's dropout is 0.1 as in `torch.nn.Transformer`.
    """

    conv_layers: tuple[tuple[int, int, int], ...] = ((8, 32, 8), (16, 2, 2), (32, 2, 2), (64, 2, 2), (64, 2, 2))
    spat_dim: int = 30
    time_dim: int = 34
    sfreq_features: float = 1.0
    n_layers: int = 8
    n_decoder_layers: int = 4
    n_heads: int = 8
    drop_prob: float = 0.0

    def __post_init__(self) -> None:
        if not self.conv_layers or any(min(layer) < 1 for layer in self.conv_layers):
            raise SpecError("conv_layers must hold (dim, kernel, stride) of at least 1 each.", "Give at least one layer.")
        for name, least in (("n_heads", 1), ("n_layers", 1), ("n_decoder_layers", 1), ("spat_dim", 0), ("time_dim", 0)):
            if getattr(self, name) < least:
                raise SpecError(f"{name} is {getattr(self, name)}.", f"Use {least} or more.")
        if self.emb_dim < self.spat_dim + self.time_dim or self.spat_dim % 6 or self.time_dim % 2:
            raise SpecError(
                f"A position encoding of {self.spat_dim} + {self.time_dim} dimensions does not fit {self.emb_dim}.",
                "Use a spat_dim divisible by 6, an even time_dim, and a sum of at most the last convolution's dim.",
            )
        if self.emb_dim % self.n_heads:
            raise SpecError(
                f"{self.n_heads} attention heads do not divide the embedding size {self.emb_dim}.",
                "Use a number of heads that divides it.",
            )
        if not (0 < self.sfreq_features < math.inf and 0 <= self.drop_prob < 1):
            raise SpecError(
                f"sfreq_features is {self.sfreq_features} and drop_prob {self.drop_prob}.",
                "Use a positive rate and a dropout from 0 to below 1.",
            )

    @property
    def emb_dim(self) -> int:
        """Size of an embedding."""
        return self.conv_layers[-1][0]

    @property
    def min_n_times(self) -> int:
        """Samples that the first time token needs."""
        return self.span(1)

    @property
    def max_n_tokens(self) -> int:
        """Time tokens in the 600 s that scale the temporal position encoding."""
        return int(600 * self.sfreq_features)

    def span(self, n_tokens: int) -> int:
        """Return the number of samples that make `n_tokens` successive time tokens."""
        n_times = n_tokens
        for _, kernel, stride in reversed(self.conv_layers):
            n_times = (n_times - 1) * stride + kernel
        return n_times

    def n_outputs_of_layers(self, n_times: int) -> tuple[int, ...]:
        """Return the number of time steps after each convolution for a window of `n_times` samples."""
        steps = []
        for _, kernel, stride in self.conv_layers:
            n_times = (n_times - kernel) // stride + 1
            steps.append(n_times)
        return tuple(steps)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Names band and reference: the short way to say the standard steps (`Preprocessing.steps`).

    The defaults are those of the published pretraining (Guetschel et al. 2024): average reference, 0.5 to 40 Hz.

    Attributes
    ----------
    reference : {"average", "none"}
        "average" subtracts the mean of all channels of the model; "none" leaves the recording's reference.
    l_freq, h_freq : float or None
        Edges of the band-pass in Hz; None leaves that side open (the resampler still limits the upper one).
    """

    reference: Reference = "average"
    l_freq: float | None = 0.5
    h_freq: float | None = 40.0

    def __post_init__(self) -> None:
        BandPass(l_freq=self.l_freq, h_freq=self.h_freq)  # refuses what is no band

    @classmethod
    def default(cls, sfreq: float) -> Preprocessing:
        """Return the defaults for models at `sfreq` Hz, without the edges that this rate cannot hold."""
        nyquist = sfreq / 2
        return cls(l_freq=0.5 if nyquist > 0.5 else None, h_freq=40.0 if nyquist > 40.0 else None)

    @property
    def steps(self) -> tuple[Step, ...]:
        """Return the standard steps: band-pass, rate, channels, reference."""
        band = () if self.l_freq is self.h_freq is None else (BandPass(l_freq=self.l_freq, h_freq=self.h_freq),)
        average = (ReferenceStep(),) if self.reference == "average" else ()
        return (*band, Resample(), Channels(), *average)


@dataclass(frozen=True, kw_only=True)
class EventWindow:
    """Says where a window lies after its event.

    Attributes
    ----------
    start : float
        Start of the window in seconds after the event; may be negative. The window's first sample is the one at
        ``round(start * sfreq)`` samples from the sample of the event, see `sjepa_deploy.eeg.events.window_start`.
    events : tuple of str
        Descriptions of the events that the model learned from; empty where they are not known.
    """

    start: float = 0.0
    events: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not math.isfinite(self.start):
            raise SpecError(f"The event window starts at {self.start} s.", "Use a finite time after the event.")
        if len(set(self.events)) < len(self.events) or not all(self.events):
            raise SpecError("An event of the event window is named twice, or has no name.", "Name every event once.")


@dataclass(frozen=True, kw_only=True)
class SignalSpec:
    """Describes the signal that a model takes, and the steps from a recording or a stream to it.

    Attributes
    ----------
    n_chans, n_times : int
        Shape of one window.
    sfreq : float
        Rate of the window in Hz.
    unit : {"nV", "uV", "mV", "V"}
        Unit of the signal that enters the steps. The spec holds the unit because volts in place of microvolts change the outputs
        without any error.
    ch_names : tuple of str or None
        Names of the channels in the order of the input. None if only the number of channels is known.
    positions : tuple of (float, float, float) or None
        Positions of these channels in metres in the head frame (MNE's).
    steps : tuple of Step
        What is done to the signal, in this order (`sjepa_deploy.eeg.steps.STEPS`). "resample" and "channels" stand there once
        each, and steps on windows last.
    phase : {"causal", "zero-phase"}
        Form of the steps that made the windows that the model learned from. Live decoding is causal in both cases.
    event_window : EventWindow or None
        Place of the windows after their events. None where windows belong to no events, or where this is not known.
    """

    n_chans: int
    n_times: int
    sfreq: float
    unit: Unit = "uV"
    ch_names: tuple[str, ...] | None = None
    positions: tuple[Position, ...] | None = None
    steps: tuple[Step, ...] = field(default_factory=lambda: Preprocessing().steps)
    phase: Phase = "causal"
    event_window: EventWindow | None = None

    def __post_init__(self) -> None:
        if self.unit not in UNITS_IN_VOLTS:
            raise SpecError(f"{self.unit!r} is not a unit.", f"Use one of {', '.join(UNITS_IN_VOLTS)}.")
        if self.phase not in get_args(Phase):
            raise SpecError(f"{self.phase!r} is not a phase.", f"Use {' or '.join(get_args(Phase))}.")
        for name in ("n_chans", "n_times"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}.", "Use 1 or more.")
        if not (math.isfinite(self.sfreq) and self.sfreq > 0):
            raise SpecError(f"sfreq is {self.sfreq} Hz.", "Use a positive sampling rate.")
        if self.ch_names is not None:
            _check_ch_names(self.ch_names, self.n_chans)
        if self.positions is not None:
            _check_positions(self.positions, self.n_chans)
        for kind in (Resample, Channels):
            if sum(isinstance(step, kind) for step in self.steps) != 1:
                raise SpecError(f"The steps do not hold {kind.name!r} exactly once.", f"List {kind.name!r} once among them.")
        on_windows = [isinstance(step, WindowStep) for step in self.steps]
        if on_windows != sorted(on_windows):
            late = self.steps[on_windows.index(True)].name
            raise SpecError(f"The step {late!r} works on windows and stands before steps on samples.", "List it last.")
        for step in self.steps:
            step.check(self.goal)

    @property
    def goal(self) -> Goal:
        """What the steps end with."""
        start = None if self.event_window is None else self.event_window.start
        return Goal(n_chans=self.n_chans, n_times=self.n_times, sfreq=self.sfreq, ch_names=self.ch_names, start=start)

    @property
    def stream_steps(self) -> tuple[Step, ...]:
        """The steps on samples."""
        return tuple(step for step in self.steps if not isinstance(step, WindowStep))

    @property
    def in_unit(self) -> bool:
        """Whether the steps leave the signal in its unit: no step standardises or scales it."""
        return not any(step.changes_unit for step in self.steps)

    @property
    def ends_with_average(self) -> bool:
        """Whether the last step on samples is the average reference, which may be applied twice."""
        last = self.stream_steps[-1]
        return isinstance(last, ReferenceStep) and last.channels is None

    @cached_property  # asked for at every window
    def window_steps(self) -> tuple[WindowStep, ...]:
        """The steps on windows."""
        return tuple(step for step in self.steps if isinstance(step, WindowStep))

    def uses(self, name: str, other_than_eeg: bool) -> bool:
        """Return whether a reference that stands before the channels are picked uses the channel `name` of a recording.

        The average over all channels leaves out what is `other_than_eeg` by its name.
        """
        for step in self.steps:
            if isinstance(step, Channels):
                return False
            if isinstance(step, ReferenceStep):
                named = None if step.channels is None else {each.casefold() for each in step.channels}
                if name.casefold() in named if named is not None else not other_than_eeg:
                    return True
        return False

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape of one window: (n_chans, n_times)."""
        return (self.n_chans, self.n_times)

    @property
    def seconds(self) -> float:
        """Length of a window in seconds."""
        return self.n_times / self.sfreq

    def replace(self, **changes: Any) -> SignalSpec:
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Describes one SignalJEPA model as its users see it.

    Attributes
    ----------
    variant : {"prelocal", "postlocal", "contextual", "base"}
        The fine-tuned architecture, or the base model, which outputs features.
    signal : SignalSpec
        The signal that the model takes. "contextual" and "base" need its positions.
    n_outputs, n_spat_filters : int
        Outputs, and spatial filters ("virtual channels"). The base model has neither and ignores both.
    task : {"classification", "regression", "features"}
        What the outputs are for. By default "features" of the base model, "classification" where classes are named, else
        "regression".
    class_names : tuple of str or None
        Names of the classes of a classifier: one an output, or two for a single output, the second one for values above 0.
    output_unit : str or None
        Unit of a regression's outputs, such as "s".
    encoder : EncoderSpec
        Sizes of the encoder.
    """

    variant: Variant
    signal: SignalSpec
    n_outputs: int = 1
    n_spat_filters: int = 4
    task: Task = None  # type: ignore[assignment]  # settled below
    class_names: tuple[str, ...] | None = None
    output_unit: str | None = None
    encoder: EncoderSpec = field(default_factory=EncoderSpec)

    @classmethod
    def of(cls, **fields: Any) -> ModelSpec:
        """Return the spec of `fields` of both `ModelSpec` and `SignalSpec`, side by side. `preprocessing` gives its steps."""
        return cls(signal=SignalSpec(**_take_signal(fields)), **fields)

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise SpecError(f"{self.variant!r} is not a variant.", f"Use one of {', '.join(VARIANTS)}.")
        for name in ("n_outputs", "n_spat_filters"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name} is {getattr(self, name)}.", "Use 1 or more.")
        if self.task is None:
            task = "features" if self.variant == "base" else "regression" if self.class_names is None else "classification"
            object.__setattr__(self, "task", task)
        if self.task not in get_args(Task) or (self.task == "features") != (self.variant == "base"):
            raise SpecError(
                f"{self.task!r} is no task of the {self.variant} model.",
                "Use features for the base model, else classification or regression.",
            )
        if self.n_times < (least := self.encoder.min_n_times):
            seconds, window = least / self.signal.sfreq, self.signal.event_window
            ends = "" if window is None else f", from --tmin {window.start:g} to --tmax {window.start + seconds:.6g}"
            raise SpecError(
                f"n_times is {self.n_times}, but the first time token needs {least} samples.",
                f"Use windows of at least {least} samples: {seconds:.6g} s at {self.signal.sfreq:g} Hz{ends}.",
            )
        if self.max_n_tokens < self.n_tokens_per_channel:
            raise SpecError(
                f"{self.n_times} samples make {self.n_tokens_per_channel} time tokens, more than the position encoding has "
                f"({self.max_n_tokens}).",
                "Use shorter windows.",
            )
        if self.class_names is not None:
            self._check_class_names(self.class_names)
        if self.output_unit is not None and self.task != "regression":
            raise SpecError(f"The outputs of a {self.task} have the unit {self.output_unit!r}.", "Leave the unit out.")

    def _check_class_names(self, names: tuple[str, ...]) -> None:
        if self.task != "classification":
            raise SpecError(f"The {self.task} model has class names.", "Leave them out, or set the task to classification.")
        n_classes = len(names)
        if n_classes != self.n_outputs and not (self.n_outputs == 1 and n_classes == 2):
            raise SpecError(f"There are {n_classes} class names for {self.n_outputs} outputs.", "Name every output once.")
        if len({*names, ""}) <= n_classes:
            raise SpecError("A class has an empty name, or that of another one.", "Name every output once.")
        if strange := [name for name in names if not name.isprintable()]:
            raise SpecError(f"The class name {strange[0]!r} breaks the lines of a table.", "Leave tabs and line ends out.")

    @property
    def n_chans(self) -> int:
        """Channels of one window."""
        return self.signal.n_chans

    @property
    def n_times(self) -> int:
        """Samples of one window."""
        return self.signal.n_times

    @property
    def sfreq(self) -> float:
        """Rate of the window in Hz."""
        return self.signal.sfreq

    @property
    def unit(self) -> Unit:
        """Unit of the signal that enters the steps."""
        return self.signal.unit

    @property
    def ch_names(self) -> tuple[str, ...] | None:
        """Names of the channels."""
        return self.signal.ch_names

    @property
    def positions(self) -> tuple[Position, ...] | None:
        """Positions of the channels in metres in the head frame."""
        return self.signal.positions

    @property
    def needs_positions(self) -> bool:
        """Whether the network contains a position encoder."""
        return self.variant in ("contextual", "base")

    @property
    def n_tokens_per_channel(self) -> int:
        """Time tokens of one channel."""
        return self.encoder.n_outputs_of_layers(self.n_times)[-1]

    @property
    def shortest_n_times(self) -> int:
        """Length of the shortest window with the same time tokens: all samples that the tokens are made of."""
        return self.encoder.span(self.n_tokens_per_channel)

    @property
    def tail(self) -> float:
        """Seconds at the end of a window that enter no token. A decision is this much older than the window's newest sample.

        These samples act through the statistics of the group normalisation only.
        """
        return (self.n_times - self.shortest_n_times) / self.sfreq

    @property
    def max_n_tokens(self) -> int:
        """Time tokens that the temporal position encoding can tell apart (600 s)."""
        return self.encoder.max_n_tokens if self.needs_positions else 2**31

    @property
    def input_name(self) -> str:
        """Name of the exported graph's input."""
        return "eeg"

    @property
    def output_name(self) -> str:
        """Name of the exported graph's output."""
        return "features" if self.variant == "base" else "prediction"

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of all numbers that one window gives: the classes', or numbered ones."""
        n = math.prod(self.output_shape)
        if self.class_names is not None and len(self.class_names) == n:
            return self.class_names
        return (self.output_name,) if n == 1 else tuple(f"{self.output_name}_{i}" for i in range(n))

    @property
    def outputs_told(self) -> str:
        """What the outputs are, in words. Those of a classifier are logits."""
        if self.task == "features":
            return "features of shape {} x {}".format(*self.output_shape)
        if self.task == "regression":
            unit = "" if self.output_unit is None else f" in {self.output_unit}"
            return f"{'a number' if self.n_outputs == 1 else f'{self.n_outputs} numbers'}{unit}"
        if self.n_outputs > 1:
            return f"logits of the classes {listed(self.class_names or [str(i) for i in range(self.n_outputs)], 12)}"
        below, above = self.class_names or ("0", "1")
        return f"the logit of {above}, against {below}"

    def class_of(self, outputs: Sequence[float]) -> str:
        """Return the class that the outputs of one window name: of a single output the second class for values above 0.

        Without class names the class is its number.
        """
        assert self.task == "classification"
        chosen = int(outputs[0] > 0) if len(outputs) == 1 else max(range(len(outputs)), key=outputs.__getitem__)
        return str(chosen) if self.class_names is None else self.class_names[chosen]

    @property
    def input_shape(self) -> tuple[int, int]:
        """Shape of one window: (n_chans, n_times)."""
        return (self.n_chans, self.n_times)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output for one window: (n_outputs,), for the base model (n_chans * tokens, emb_dim)."""
        if self.variant == "base":
            return (self.n_chans * self.n_tokens_per_channel, self.encoder.emb_dim)
        return (self.n_outputs,)

    def replace(self, **changes: Any) -> ModelSpec:
        """Return a copy with `changes`, see `of`."""
        if signal := _take_signal(changes):
            changes["signal"] = changes.get("signal", self.signal).replace(**signal)
        if {"variant", "class_names"} & set(changes):
            changes.setdefault("task", None)  # follows from them
        return dataclasses.replace(self, **changes)


SIGNAL_FIELDS = tuple(f.name for f in dataclasses.fields(SignalSpec))
"""Names of the fields of `SignalSpec`."""


def _take_signal(fields: dict[str, Any]) -> dict[str, Any]:
    """Take the fields of `SignalSpec` out of `fields`."""
    signal = {name: fields.pop(name) for name in SIGNAL_FIELDS if name in fields}
    if "preprocessing" in fields:
        signal["steps"] = fields.pop("preprocessing").steps
    return signal


def upgraded(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON form of a `ModelSpec`, from that of this release or of version 1, which had no `SignalSpec`.

    Version 1 means: zero-phase offline, the causal forms live, and an event window that is not known.
    """
    if "signal" in spec:
        return spec
    own = dict(spec)
    signal = {name: own.pop(name) for name in SIGNAL_FIELDS if name in own}
    stored = own.pop("preprocessing", None)
    settings = decode(Preprocessing, {} if stored is None else stored, "preprocessing")
    return own | {"signal": signal | {"steps": encode(settings.steps), "phase": "zero-phase"}}


def _check_ch_names(ch_names: tuple[str, ...], n_chans: int) -> None:
    if len(ch_names) != n_chans:
        raise SpecError(f"There are {len(ch_names)} channel names for {n_chans} channels.", "Name every channel once.")
    if not all(ch_names):
        raise SpecError("A channel has an empty name.", "Name every channel once.")
    folded = [name.casefold() for name in ch_names]
    if twice := sorted({name for name in ch_names if folded.count(name.casefold()) > 1}):
        raise SpecError(f"Channel names appear twice: {', '.join(twice)}.", "Name every channel once (case is ignored).")


def _check_positions(positions: tuple[Position, ...], n_chans: int) -> None:
    if len(positions) != n_chans:
        raise SpecError(f"There are {len(positions)} positions for {n_chans} channels.", "Give one position a channel.")
    values = [abs(x) for position in positions for x in position]
    if not all(map(math.isfinite, values)) or max(values) == 0:
        raise SpecError("The positions are not finite, or all zero.", "Give positions in metres in the head frame.")
    if max(values) > 1:
        raise SpecError(
            f"A position is {max(values):g} m from the head's centre.", "Give positions in metres, not in millimetres."
        )
