import copy
import importlib
import multiprocessing
import pickle
import pkgutil
from types import SimpleNamespace

import pytest

import sjepa_deploy
from sjepa_deploy.errors import InputError, MissingDependencyError, SjepaError, TrainingStoppedError
from sjepa_deploy.export.to_bundle import ExportParityError
from sjepa_deploy.runtime.backends.engine_judge import EngineParityError


def every_kind() -> list[type[SjepaError]]:
    """Return all classes of errors of the package, those that a module keeps for itself too."""
    for module in pkgutil.walk_packages(sjepa_deploy.__path__, "sjepa_deploy."):
        importlib.import_module(module.name)
    found, waiting = [], [SjepaError]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return sorted({kind for kind in found if kind.__module__.startswith("sjepa_deploy")}, key=lambda kind: kind.__name__)


def made(kind: type[SjepaError]) -> SjepaError:
    if issubclass(kind, MissingDependencyError):
        return kind("torch", "export")
    result = SimpleNamespace(passed=False, precision="fp16", backend="ort-cpu", failure="differs")
    if issubclass(kind, ExportParityError):
        return kind((result,))
    if issubclass(kind, EngineParityError):
        return kind(result, "in memory")
    if issubclass(kind, TrainingStoppedError):
        return kind("The run was stopped.", "Start it again.", exit_code=143)
    return kind("The window is of another model.", "Use that one.")


@pytest.mark.parametrize("carry", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_every_error_survives_a_copy(carry):
    kinds = every_kind()
    assert len(kinds) > 20
    for kind in kinds:
        error = made(kind)
        error.noted = "beside"
        back = carry(error)
        assert type(back) is kind
        assert (str(back), back.args, vars(back)) == (str(error), error.args, vars(error))


def fail(_) -> None:
    raise InputError("The window is of another model.", "Use that one.")


def test_an_error_of_a_worker_reaches_who_waits():
    """A pool waits for ever for an error that cannot be unpickled."""
    with multiprocessing.get_context("forkserver").Pool(1) as pool, pytest.raises(InputError) as caught:
        pool.map_async(fail, [0]).get(timeout=60)
    assert (caught.value.problem, caught.value.mend) == ("The window is of another model.", "Use that one.")
