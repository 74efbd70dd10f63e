"""What can go wrong: one small hierarchy, whose messages say what to do next."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterable
from typing import Any

REPOSITORY = "https://github.com/sjepa-deploy/sjepa-deploy"
"""Where the source is."""


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
    """Return a pickled error as it was, whatever its class asks for when one is made."""
    error = kind.__new__(kind, *args)
    vars(error).update(state)
    return error


class SpecError(SjepaError, ValueError):
    """A model specification that describes no model."""


class MontageError(SjepaError, ValueError):
    """Channel names or positions that are unknown, missing or contradictory."""


class CheckpointError(SjepaError, ValueError):
    """A checkpoint that cannot be read, or is not of the model asked for."""


class DataError(SjepaError, ValueError):
    """Training data, targets or a split that cannot be learned from."""


class TrainingError(SjepaError):
    """A training run that cannot start, or cannot go on."""


class TrainingStoppedError(TrainingError):
    """A training run that was stopped from outside, and goes on from its last whole epoch.

    Parameters
    ----------
    problem, mend : str
        See `SjepaError`. A command adds the line that goes on to `mend`.
    exit_code : int
        Exit status of the command: 128 and the number of the signal, as shells count, or 2.
    """

    def __init__(self, problem: str, mend: str, *, exit_code: int) -> None:
        super().__init__(problem, mend)
        self.exit_code = exit_code


class ExportError(SjepaError):
    """An export that could not be written, or whose graph is not what it must be."""


class BundleError(SjepaError):
    """A bundle that is missing, incomplete, altered, or of another schema."""


class BackendError(SjepaError):
    """A backend that is unknown, cannot load here, or cannot run this bundle."""


class EngineError(BackendError):
    """An engine that is missing, made for something else, corrupt, or could not be built."""


class ServingError(BackendError):
    """A server that cannot be started or reached, or does not serve what was asked for."""


class RefusedError(ServingError):
    """A request that was refused or never left: nothing was computed, and it may be sent again."""


class UnansweredError(ServingError):
    """A request whose answer did not come, and that the server may have executed."""


class InputError(SjepaError, ValueError):
    """EEG windows that break the model's input contract."""


class RecordingError(SjepaError, ValueError):
    """A recording that cannot be read or does not fit the model."""


class TooShortError(RecordingError):
    """A recording that is shorter than the zero-phase filter of the preprocessing."""


class StreamError(SjepaError):
    """A live stream that cannot be found, breaks the model's contract, or was lost for good."""


class DashboardError(SjepaError):
    """A dashboard that cannot be served as asked."""


class BenchmarkError(SjepaError):
    """A benchmark that cannot be run, or a report of one that cannot be read or written."""


class OutputError(SjepaError):
    """A file or folder that a command may not replace, or cannot write."""


class RegressionError(BenchmarkError):
    """A benchmark that found a backend slower than before."""

    exit_code = 1


class MissingDependencyError(SjepaError, ImportError):
    """A package that this function needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"This needs {package}, which is not installed.",
            f"Install it with: {install_line(extra)} (the extra [{extra}])."
            if extra
            else f"Install it with: pip install {package}.",
        )


class ParityError(SjepaError):
    """A backend whose outputs differ from the reference by more than the tolerance."""

    exit_code = 1


def install_line(extra: str) -> str:
    """Return the command that installs what an extra brings, wherever sjepa-deploy itself was installed from.

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
    """Return what an extra asks for, with the extras of sjepa-deploy that it includes resolved."""
    packages: list[str] = []
    for requirement in importlib.metadata.requires("sjepa-deploy") or ():
        package, _, marker = (part.strip() for part in requirement.partition(";"))
        if marker.replace("'", '"') == f'extra == "{extra}"':
            included = re.fullmatch(r"sjepa-deploy\[(.+)\]", package)
            packages += _packages(included[1]) if included else [package]
    return packages


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return `names` as text for a message: at most `most` of them, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
