"""Runs bundles inside Triton's Python backend. The ``model.py`` of a repository imports its classes from here.

Tensors cross to and from Triton by DLPack and not as NumPy arrays. The backend of a server is compiled against one major version
of NumPy (that in nvidia-pytriton 0.7 against 1), and gives empty outputs with the other.
"""

from __future__ import annotations

import ctypes
import importlib
import json
from pathlib import Path
from typing import Any, cast

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.eeg.chain import finish_windows
from sjepa_deploy.eeg.steps.reference import average_reference
from sjepa_deploy.eeg.units import conversion
from sjepa_deploy.errors import InputError, ServingError, listed
from sjepa_deploy.runtime.backend import Backend, BackendOptions, FloatArray
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.serving.contract import (
    BUNDLE_PARAMETER,
    CHECKED_PARAMETER,
    CONTRACT_KEY,
    CONTRACT_PARAMETER,
    STEPS_PARAMETER,
    Contract,
    contract_id,
)
from sjepa_deploy.spec import RunPrecision

BUNDLE_FOLDER = "bundle"
"""Folder of a version that holds the bundle."""

WINDOWS = "windows"
"""Tensor between the steps of an ensemble."""

_TAKEN = b"used_dltensor"


class TritonPythonModel:
    """Runs the bundle of one version on a backend of ours. Each instance is one object in a process of its own.

    The steps of the signal that work on windows are done here, as far as a request does not say that the client has done them.
    Each request is judged alone: windows that break the contract are refused with the message that a local call raises, and
    the others of its batch are decoded.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle beside ``model.py``; what is wrong with it keeps the version from loading."""
        self._triton = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        self._contract = Contract.loads(config["parameters"][CONTRACT_KEY]["string_value"], args["model_name"])
        self._bundle = Bundle.open(Path(args["model_repository"]) / args["model_version"] / BUNDLE_FOLDER)
        spec = self._bundle.spec
        self._signal = spec.signal
        self._id, self._digest = contract_id(spec, self._contract.unit), self._bundle.manifest.digest
        self._input, self._output = spec.input_name, spec.output_name
        self._open(BackendOptions(n_threads=self._contract.n_threads, device=max(0, int(args["model_instance_device_id"]))))
        # A backend on a GPU prepares each batch size at its first call. No request shall wait for that.
        self._predict.backend.warmup(tuple(range(1, config["max_batch_size"] + 1)), n_runs=1)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Decode the windows of all `requests` in one run."""
        responses: list[Any] = [None] * len(requests)
        accepted: list[tuple[int, FloatArray]] = []
        for i, request in enumerate(requests):
            try:
                accepted.append((i, self._windows(request)))
            except ServingError as e:
                responses[i] = self._refusal(e, self._triton.TritonError.NOT_FOUND)
            except InputError as e:
                responses[i] = self._refusal(e, self._triton.TritonError.INVALID_ARG)
        if accepted:
            windows = [eeg for _, eeg in accepted]
            outputs = self._run(windows[0] if len(windows) == 1 else np.concatenate(windows))
            start = 0
            for i, eeg in accepted:
                stop = start + len(eeg)
                responses[i] = self._triton.InferenceResponse([self._tensor(outputs[start:stop])])
                start = stop
        return responses

    def finalize(self) -> None:
        """Release the backend."""
        self._predict.close()

    def _open(self, options: BackendOptions) -> None:
        backend, precision = self._contract.backend, self._contract.precision
        self._predict = load(self._bundle, backend=backend, precision=precision, options=options)

    def _windows(self, request: Any) -> FloatArray:
        said = json.loads(request.parameters())
        if said.get(CONTRACT_PARAMETER, self._id) != self._id or said.get(BUNDLE_PARAMETER, self._digest) != self._digest:
            raise ServingError("This version serves another model than the client means.", "Connect again.")
        least, most = len(self._contract.client_steps), len(self._signal.steps)
        n_done = said.get(STEPS_PARAMETER, least)
        if not isinstance(n_done, int) or not least <= n_done <= most:
            raise InputError(
                f"The windows went through {n_done!r} steps, the model takes them after {least} to {most}.",
                f"Do the steps {listed(self._contract.client_steps)} in the client.",
            )
        return self._prepare(self._tensor_of(request), n_done, checked=bool(said.get(CHECKED_PARAMETER)))

    def _tensor_of(self, request: Any) -> FloatArray:
        return cast(FloatArray, np.from_dlpack(self._triton.get_input_tensor_by_name(request, self._input)))

    def _prepare(self, eeg: FloatArray, n_done: int, *, checked: bool) -> FloatArray:
        """Return windows after all steps, of which `n_done` were done."""
        windows = eeg if n_done == len(self._signal.steps) else finish_windows(self._signal, eeg)
        return windows if checked else self._predict.check(windows)

    def _run(self, eeg: FloatArray) -> FloatArray:
        return self._predict.backend.run(eeg)

    def _tensor(self, values: FloatArray) -> Any:
        """Return a tensor of Triton with a copy of `values`: a backend's buffer is overwritten by its next run."""
        capsule = values.copy().__dlpack__()
        tensor = self._triton.Tensor.from_dlpack(self._output, capsule)
        # Triton renames a capsule that it has taken, but not to what NumPy knows: it would complain on freeing it.
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), ctypes.c_char_p(_TAKEN))
        return tensor

    def _refusal(self, error: Exception, code: Any) -> Any:
        return self._triton.InferenceResponse([], self._triton.TritonError(str(error), code))


class WindowPreparation(TritonPythonModel):
    """Makes the windows that the graph takes from windows in the contract's unit and any reference: an ensemble's first step.

    The step checks the windows too, since Triton's own backends take NaN and volts without a word.
    """

    def _open(self, options: BackendOptions) -> None:
        spec = self._bundle.spec
        self._predict = Predictor(self._bundle, _NoBackend(self._contract.precision))
        self._output = WINDOWS
        self._scale = conversion(self._contract.unit, spec.unit)

    def _prepare(self, eeg: FloatArray, n_done: int, *, checked: bool) -> FloatArray:
        scaled = eeg * np.float64(self._scale)  # electrode offsets are a thousand times larger than the EEG
        if n_done < len(self._signal.stream_steps):  # only the average reference at their end can be lacking
            scaled = average_reference(scaled, axis=1)
        return super()._prepare(scaled.astype(np.float32), n_done, checked=checked)

    def _run(self, eeg: FloatArray) -> FloatArray:
        return eeg


class PreparedModel(TritonPythonModel):
    """Runs the bundle as the last step of an ensemble, in which `WindowPreparation` has checked contract and windows."""

    def _windows(self, request: Any) -> FloatArray:
        return self._tensor_of(request)


class _NoBackend(Backend):
    """Stands for the backend of a predictor that only checks."""

    name = "none"

    def __init__(self, precision: RunPrecision) -> None:
        self.precision = precision

    def run(self, eeg: FloatArray) -> FloatArray:
        raise AssertionError("this predictor only checks")

    def close(self) -> None:
        pass
