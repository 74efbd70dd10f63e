"""Defines the errors of the library. Each message says what is wrong and how to mend it."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

REPOSITORY = "https://github.com/sjepa-deploy/sjepa-deploy"
"""Address of the source code."""


class SjepaError(Exception):
    """Base of every error that a user can mend.

    Parameters
    ----------
    problem : str
        One sentence on what is wrong.
    mend : str
        One sentence on how to mend it.
    """

    exit_code = 2
    """Exit status of a command that ends with this error."""

    def __init__(self, problem: str, mend: str) -> None:
        super().__init__(f"{problem} {mend}")
        self.problem = problem
        self.mend = mend

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception would call the class with the one message: a worker's error would then break the pool that waits for it.
        return _rebuilt, (type(self), self.args, vars(self))


def _rebuilt(kind: type[SjepaError], args: tuple[Any, ...], state: dict[str, Any]) -> SjepaError:
    """Return a pickled error unchanged, without a call of the constructor of its class."""
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class SpecError(SjepaError, ValueError):
    """Reports a model specification that describes no model."""


class MontageError(SjepaError, ValueError):
    """Reports channel names or positions that are unknown, missing or contradictory."""


class CheckpointError(SjepaError, ValueError):
    """Reports a checkpoint that cannot be read, or that belongs to another model."""


class DataError(SjepaError, ValueError):
    """Reports training data, targets or a split that a model cannot learn from."""


class NoWindowsError(DataError):
    """Reports a recording that gives no window to learn from. Of several recordings, such ones are skipped."""


class TrainingError(SjepaError):
    """Reports a training run that cannot start or cannot go on."""


class CollapseError(TrainingError):
    """Reports a pretraining that ended with a model that nobody should use."""

    exit_code = 1


class NoGainError(TrainingError):
    """Reports a calibration that makes a model no better on trials that it was not fitted on."""

    exit_code = 1


class TrainingStoppedError(TrainingError):
    """Reports a training run that was stopped from outside. The run can go on from its last whole epoch.

    Parameters
    ----------
    problem, mend : str
        See `SjepaError`. A command adds to `mend` the line that continues the run.
    exit_code : int
        Exit status of the command: 128 and the number of the signal, as shells count, or 2.
    """

    def __init__(self, problem: str, mend: str, *, exit_code: int) -> None:
        super().__init__(problem, mend)
        self.exit_code = exit_code


class ExportError(SjepaError):
    """Reports an export that cannot be written, or a graph that does not pass the checks."""


class BundleError(SjepaError):
    """Reports a bundle that is missing, incomplete, altered, or of another schema."""


class BackendError(SjepaError):
    """Reports a backend that is unknown, cannot load here, or cannot run this bundle."""


class EngineError(BackendError):
    """Reports an engine that is missing, was made for something else, is corrupt, or could not be built."""


class ServingError(BackendError):
    """Reports a server that cannot be started or reached, or that does not serve the requested model."""


class RefusedError(ServingError):
    """Reports a request that was refused or never left. Nothing was computed, and the request may be sent again."""


class UnansweredError(ServingError):
    """Reports a request without an answer. The server may have executed the request."""


class InputError(SjepaError, ValueError):
    """Reports EEG windows that break the model's input contract."""


class RecordingError(SjepaError, ValueError):
    """Reports a recording that cannot be read or does not fit the model."""


class TooShortError(RecordingError):
    """Reports a recording that is shorter than the zero-phase filter of the preprocessing."""


class StreamError(SjepaError):
    """Reports a live stream that cannot be found, breaks the model's contract, or was lost for good."""


class CommandError(SjepaError, ValueError):
    """Reports a command that a live decoder cannot take."""


class DecisionError(SjepaError, ValueError):
    """Reports a decision layer that is missing, damaged, of another bundle, or cannot be fitted."""


class FeedbackError(SjepaError):
    """Reports a feedback socket that cannot be served with the given options."""


class DashboardError(SjepaError):
    """Reports a dashboard that cannot be served with the given options."""


class BenchmarkError(SjepaError):
    """Reports a benchmark that cannot run, or a benchmark report that cannot be read or written."""


class OutputError(SjepaError):
    """Reports a file or folder that a command may not replace or cannot write."""


class RegressionError(BenchmarkError):
    """Reports that a benchmark found a backend slower than before."""

    exit_code = 1


class MissingDependencyError(SjepaError, ImportError):
    """Reports that a package that this function needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs {package}, which is not installed.",
            f"Install it with: {install_line(extra)} (the extra [{extra}])."
            if extra
            else f"Install it with: pip install {package}.",
        )


class ParityError(SjepaError):
    """Reports a backend whose outputs differ from the reference by more than the tolerance."""

    exit_code = 1


def install_line(extra: str) -> str:
    """Return the command that installs the packages of an extra, for every way to install sjepa-deploy itself.

    The command names the packages, as the metadata of the installed sjepa-deploy lists them: the name ``sjepa-deploy`` is on no
    package index, and an editable installation stays as it is. Where sjepa-deploy runs without being installed, the command
    names its repository.
    """
    try:
        packages = _packages(extra)
    except importlib.metadata.PackageNotFoundError:
        packages = [f"sjepa-deploy[{extra}] @ git+{REPOSITORY}"]
    return " ".join(("pip install", *(shlex.quote(package) for package in packages)))


def _packages(extra: str) -> list[str]:
    """Return the requirements of an extra. Other extras of sjepa-deploy inside it are resolved."""
    packages: list[str] = []
    for requirement in importlib.metadata.requires("sjepa-deploy") or ():
        package, _, marker = (part.strip() for part in requirement.partition(";"))
        if marker.replace("'", '"') == f'extra == "{extra}"':
            included = re.fullmatch(r"sjepa-deploy\[(.+)\]", package)
            packages += _packages(included[1]) if included else [package]
    return packages


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return `names` as text for a message: at most `most` names, and the number of the other names."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def counted(names: Iterable[str] | Mapping[str, int]) -> str:
    """Return each name with how often it is there, as text for a message: "left (12), right (11)"; "none" without names."""
    return listed([f"{name} ({n})" for name, n in sorted(Counter(names).items())], 20) or "none"
