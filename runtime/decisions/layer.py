"""Runs a decision layer: outputs of a model in, states out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import DecisionError, listed
from sjepa_deploy.runtime.decisions.description import LayerDescription
from sjepa_deploy.runtime.decisions.state import State
from sjepa_deploy.runtime.decisions.step import TIME_ATOL, Machine, Moment
from sjepa_deploy.runtime.decisions.stored import layers_of, read_layer


class DecisionLayer:
    """Turns the outputs of a model into states, window after window.

    The states depend on outputs, times and flags since `restart` alone: the same windows give the same states.

    Parameters
    ----------
    description : LayerDescription
        The chain.

    Examples
    --------
    >>> layer = DecisionLayer.load("bundle")  # doctest: +SKIP
    >>> print(layer.step(outputs, time))  # doctest: +SKIP
    decided left 0.93: probability reached the threshold
    """

    def __init__(self, description: LayerDescription) -> None:
        self.description = description if description.digest else description.sealed()
        self.class_names = description.class_names or ()
        self._n_outputs = description.n_outputs
        self._refuse = frozenset(description.signal.refuse)
        gap = description.signal.max_gap
        self._max_gap = math.inf if gap is None else gap + TIME_ATOL
        self._machines = tuple(step.machine(description.n_classes) for step in description.steps)
        self._told = tuple(machine for machine in self._machines if type(machine).settled is not Machine.settled)
        self._moment = Moment()
        self._newest = -math.inf

    @classmethod
    def load(cls, bundle: Bundle | Path | str, name: str | None = None) -> DecisionLayer:
        """Open a decision layer of a bundle.

        Parameters
        ----------
        bundle : Bundle, Path or str
            The bundle.
        name : str or None
            Name of the layer. None takes the only one.

        Raises
        ------
        BundleError
            If the bundle cannot be opened.
        DecisionError
            If there is no such layer, there are several and `name` is None, or the layer is damaged or of another bundle.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        there = layers_of(bundle)
        if name is None and len(there) == 1:
            (name,) = there
        if name is None or name not in there:
            which = (
                f"no decision layer {name}" if name is not None else "several decision layers" if there else "no decision layer"
            )
            names = f"; it has {listed(there)}" if there else ""
            mend = "Name one of them." if there else f"Fit one with: sjepa-decide {bundle.path} --fit RECORDING --accept-rate 0.8"
            raise DecisionError(f"The bundle {bundle.path} has {which}{names}.", mend)
        return cls(read_layer(bundle, name))

    def step(self, outputs: NDArray[np.floating[Any]] | None, time: float, flags: Sequence[str] = ()) -> State:
        """Take the next window and return its state.

        Parameters
        ----------
        outputs : ndarray, shape (n_outputs,) or (1, n_outputs), or None
            Outputs of the model. None: the window was lost.
        time : float
            Stamp of the window's newest sample in seconds. An earlier time than before starts anew: the clock was set.
        flags : sequence of str
            What is known of the window, see `sjepa_deploy.runtime.live.decision.Decision.flags`; "new trial" begins a trial,
            "no trial" keeps a window out of the evidence of trials.

        Raises
        ------
        DecisionError
            If `outputs` has another number of values.
        """
        values: list[float] = [] if outputs is None else outputs.ravel().tolist()
        if outputs is not None and len(values) != self._n_outputs:
            raise DecisionError(f"There are {len(values)} outputs for a layer of {self._n_outputs}.", "Give those of one window.")
        moment = self._moment
        moment.fill(time, flags, values)
        if time < self._newest:
            self.restart()
        if outputs is None:
            moment.settle("no signal", "the window was lost")
        elif refused := self._refuse.intersection(flags) if flags else None:
            moment.settle("no signal", ", ".join(sorted(refused)))
        elif not all(map(math.isfinite, values)):
            moment.settle("no signal", "the outputs are not finite")
        else:
            if time - self._newest > self._max_gap:
                for machine in self._machines:
                    machine.interrupt()
            self._newest = time
        for machine in self._machines:
            machine.step(moment)
        if moment.state is None:
            moment.settle("undecided", "no step decides")
        for machine in self._told:
            machine.settled(moment)
        return self._state(moment)

    def run(
        self,
        outputs: NDArray[np.floating[Any]],
        times: Sequence[float] | NDArray[np.float64],
        flags: Iterable[Sequence[str]] | None = None,
    ) -> list[State]:
        """Return the states of windows that follow each other: those that `step` returns one by one.

        Parameters
        ----------
        outputs : ndarray, shape (n_windows, n_outputs)
            Outputs of the model.
        times : sequence of float, length n_windows
            See `step`.
        flags : iterable of sequence of str, length n_windows, or None
            See `step`.
        """
        every: Iterable[Sequence[str]] = [()] * len(outputs) if flags is None else flags
        return [self.step(row, float(time), each) for row, time, each in zip(outputs, times, every, strict=True)]

    def restart(self) -> None:
        """Forget all windows."""
        self._newest = -math.inf
        for machine in self._machines:
            machine.restart()

    def _state(self, moment: Moment) -> State:
        state, reason, values = moment.state, moment.reason, moment.values
        assert state is not None
        if state == "no signal":
            return State(state, reason)
        if not self.class_names:
            return State(state, reason, value=values[0], interval=moment.interval)
        chosen = moment.chosen
        if chosen < 0:
            return State(state, reason, None, max(values), tuple(values))
        return State(state, reason, self.class_names[chosen], values[chosen], tuple(values))
