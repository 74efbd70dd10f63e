"""Asks a model on a Triton server as if it were a backend of this machine.

A request has a deadline, is never repeated unasked, and no answer is taken that another model may have given.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import (
    BackendError,
    InputError,
    MissingDependencyError,
    RefusedError,
    ServingError,
    SjepaError,
    UnansweredError,
    listed,
)
from sjepa_deploy.runtime.backend import Backend, FloatArray, Turn
from sjepa_deploy.serving.contract import (
    BUNDLE_PARAMETER,
    CHECKED_PARAMETER,
    CONTRACT_KEY,
    CONTRACT_PARAMETER,
    STEPS_PARAMETER,
    Contract,
    contract_id,
)
from sjepa_deploy.serving.shared_memory import SharedWindows
from sjepa_deploy.spec import ModelSpec, RunPrecision, Unit

DEFAULT_PORT = 8001
DEFAULT_TIMEOUT = 1.0

_RECONNECT = [  # milliseconds; by default gRPC waits up to two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 250),
]
_PAUSE = 0.05

# How gRPC and Triton say that a request was not carried out. Whatever else has the status UNAVAILABLE may have been.
_NOT_THERE = (
    "failed to connect to all addresses",
    "DNS resolution failed",
    "not at ready state",
    "is not ready",
    "Server is stopping",
    "Unable to find shared memory region",  # a server that was started again
    "max allowed is",  # somebody's request of no windows was in the batch: Triton takes its channels for windows and drops all
)
_OVERLOADED = ("Exceeds maximum queue size", "Request timeout expired")


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """An Answer holds what came back for one request.

    Attributes
    ----------
    output : array of float32, shape (batch, ...)
        The outputs.
    version : str
        Version of the model that gave them.
    request_id : str
        Name of the request.
    attempts : int
        How often it was sent; more than once only where the ones before were not carried out, or a repetition was asked for.
    """

    output: FloatArray
    version: str
    request_id: str
    attempts: int


class Client(Backend):
    """A Client calls a model on a Triton server like one on this machine.

    A client without a bundle follows new versions of the model as long as montage, unit and outputs stay the same. A client of
    a bundle takes answers of that bundle alone. The server compares both for every request, so that this holds after a restart
    too. One thread at a time, as with every backend; clients are independent of each other.

    Parameters
    ----------
    address : str
        HOST:PORT/MODEL of the gRPC service; the port is 8001 where it is not said.
    bundle : Bundle or None
        The only bundle that may answer.
    spec : ModelSpec or None
        What the model must be, where there is no bundle.
    timeout : float
        Seconds that a call may take, waiting for the server's return included. The server is told, and drops what is late.
    resend_unanswered : bool
        Whether a request that the server may have carried out is sent again when its connection breaks. Otherwise it is
        reported as an `UnansweredError`.
    shared_memory : bool
        Whether windows and outputs go through shared memory; client and server must share a host.

    Raises
    ------
    ServingError
        If the server is not there, has no such model, or serves another one than `bundle` or `spec`.
    MissingDependencyError
        If tritonclient is not installed.
    """

    def __init__(
        self,
        address: str,
        *,
        bundle: Bundle | None = None,
        spec: ModelSpec | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        resend_unanswered: bool = False,
        shared_memory: bool = False,
    ) -> None:
        try:
            self._grpc = importlib.import_module("tritonclient.grpc")
        except ModuleNotFoundError as e:
            raise MissingDependencyError("tritonclient", "serve") from e
        self.url, self.model = parse_address(address)
        self.name = f"{'triton-shm' if shared_memory else 'triton'}:{self.url}/{self.model}"
        self.timeout = timeout
        self._bundle, self._wanted = bundle, spec if bundle is None else bundle.spec
        self._unit: Unit = self._wanted.unit if self._wanted is not None else "uV"
        self._resend = resend_unanswered
        self._memory = SharedWindows() if shared_memory else None
        self._server: Any = self._grpc.InferenceServerClient(self.url, channel_args=_RECONNECT)
        self._current = False
        self._turn = Turn()
        try:
            self._connect(time.monotonic() + timeout)
        except ServingError:
            self._server.close()
            raise

    @property
    def spec(self) -> ModelSpec:
        """Return the model's contract."""
        return self.manifest.spec

    def run(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg`, shape (batch, n_chans, n_times), unchecked, as every backend does. See `infer` for errors.

        A batch larger than the server takes is sent in parts.
        """
        size = self.max_batch or len(eeg)
        parts = [self._infer_after(len(self.spec.signal.steps), eeg[i : i + size]) for i in range(0, len(eeg), size)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    @property
    def finishes(self) -> bool:
        """Return whether the model does the steps on windows."""
        n_windows = len(self.spec.signal.window_steps)
        return 0 < n_windows <= len(self.contract.model_steps)

    def run_unfinished(self, eeg: FloatArray) -> FloatArray:
        """Run the model on `eeg` before the steps on windows, which the model does. See `infer` for errors."""
        return self._infer_after(len(self.spec.signal.stream_steps), eeg)

    def _infer_after(self, n_steps: int, eeg: FloatArray) -> FloatArray:
        return self.infer(eeg, checked=True, n_steps=n_steps).output

    def __call__(self, eeg: FloatArray) -> FloatArray:
        """Decode `eeg`, shape (batch, n_chans, n_times); the server checks the windows. See `infer` for errors."""
        return self.infer(eeg).output

    def infer(
        self, eeg: FloatArray, *, checked: bool = False, timeout: float | None = None, n_steps: int | None = None
    ) -> Answer:
        """Send one request.

        Parameters
        ----------
        eeg : array of float32, shape (batch, n_chans, n_times)
            Windows in `contract.unit`, after the first `n_steps` steps of the signal.
        checked : bool
            Whether the server leaves NaN and amplitudes unjudged.
        timeout : float or None
            Seconds that it may take; None for the client's.
        n_steps : int or None
            Steps that the windows went through; None for `contract.client_steps`. The model does those that lack.

        Raises
        ------
        InputError
            If the windows have another shape or dtype, or the server refuses them.
        RefusedError
            If nothing was computed: the queue was full or too slow, or the server did not come back in time.
        UnansweredError
            If the server may have computed an answer that did not arrive.
        ServingError
            If the server failed, or serves another model now.
        BackendError
            If the client was closed, or another thread is in a call.
        """
        self._turn.begin()
        try:
            return self._infer(eeg, checked, n_steps, time.monotonic() + (self.timeout if timeout is None else timeout))
        finally:
            self._turn.end()

    def _infer(self, eeg: FloatArray, checked: bool, n_steps: int | None, ends: float) -> Answer:
        if eeg.dtype != np.float32 or eeg.shape[1:] != self.spec.input_shape or not len(eeg):
            raise InputError(
                f"{self.name} takes no {eeg.dtype} of shape {eeg.shape}.",
                f"Send float32 of shape (batch, {', '.join(map(str, self.spec.input_shape))}).",
            )
        request_id = uuid.uuid4().hex
        attempts = 0
        while True:
            try:
                if not self._current:
                    self._connect(ends)
                attempts += 1
                output, version = self._send(eeg, request_id, checked, n_steps, ends)
                return Answer(output=output, version=version, request_id=request_id, attempts=attempts)
            except _NotThereError:  # nothing was computed
                self._current = False
                if not _pause(ends):
                    raise
            except UnansweredError:
                self._current = False
                if not (self._resend and _pause(ends)):
                    raise

    def close(self) -> None:
        """Release the connection and the shared memory."""
        if self._turn.closed:
            return
        self._turn.close()
        if self._memory is not None:
            self._memory.close(self._server)
        self._server.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _connect(self, ends: float) -> None:
        """Read what the server serves now, and refuse another model than the one that is meant.

        Raises
        ------
        _NotThereError
            If the server does not come by the time `ends`.
        ServingError
            If it serves another model.
        """
        while True:
            try:
                left = _left(ends)
                config = self._server.get_model_config(self.model, client_timeout=left).config
                versions = self._server.get_model_metadata(self.model, client_timeout=left).versions
                break
            except self._grpc.InferenceServerException as e:
                if not _pause(ends):
                    raise _NotThereError(
                        f"The server at {self.url} does not offer {self.model} ({e.message()}).",
                        "Start it with sjepa-serve, or check host, port and name of the model.",
                    ) from e
        self.contract = Contract.loads(config.parameters[CONTRACT_KEY].string_value, self.model)
        self.precision = self.contract.precision
        self.max_batch: int = config.max_batch_size
        served = {v: self.contract.manifests[v] for v in sorted(versions, key=int) if v in self.contract.manifests}
        if not served:
            raise ServingError(f"No version of {self.model} at {self.url} is ready.", "Look at the server's log.")
        self._newest, self.manifest = next(reversed(served.items()))
        if self._wanted is None:
            self._wanted, self._unit = self.manifest.spec, self.contract.unit
        self._compare(self._wanted, self._unit)
        self._version = ""
        self._parameters: dict[str, Any] = {CONTRACT_PARAMETER: contract_id(self._wanted, self._unit)}
        if self._bundle is not None:
            digest = self._bundle.manifest.digest
            same = [version for version, manifest in served.items() if manifest.digest == digest]
            if not same:
                raise ServingError(
                    f"{self.name} serves another bundle than {self._bundle.path}, though with the same montage.",
                    "Serve this bundle, or open the one that is served.",
                )
            self._version = self._newest = same[-1]
            self.manifest = served[self._version]
            self._parameters[BUNDLE_PARAMETER] = digest
        if self._memory is not None:
            self._memory.forget()
        self._current = True

    def _compare(self, wanted: ModelSpec, unit: Unit) -> None:
        """Raise if the served model takes other windows, or gives other outputs, than the one that is meant."""
        there, here = _fields(self.manifest.spec), _fields(wanted)
        says = [
            f"{name} is {_short(there[name])} there and {_short(here[name])} here" for name in there if there[name] != here[name]
        ]
        if self.contract.unit != unit:
            says.append(f"windows are in {self.contract.unit} there and in {unit} here")
        if says:
            raise ServingError(
                f"{self.name} is another model than the one that is meant: {'; '.join(says)}.",
                "Open the bundle that is served, or serve the one that is meant.",
            )

    def _send(self, eeg: FloatArray, request_id: str, checked: bool, n_steps: int | None, ends: float) -> tuple[FloatArray, str]:
        """Send `eeg` once, and return the outputs and the version that gave them."""
        spec = self.spec
        shape = (len(eeg), *spec.output_shape)
        window = self._grpc.InferInput(spec.input_name, eeg.shape, "FP32")
        wanted = self._grpc.InferRequestedOutput(spec.output_name)
        n_steps = len(self.contract.client_steps) if n_steps is None else n_steps
        left = _left(ends)
        try:
            region = None if self._memory is None else self._memory.place(self._server, eeg, shape, left)
            if region is None:
                window.set_data_from_numpy(eeg)
            else:
                window.set_shared_memory(region.name, region.input_bytes)
                wanted.set_shared_memory(region.name, region.output_bytes, region.input_bytes)
            result = self._server.infer(
                self.model,
                [window],
                model_version=self._version,
                outputs=[wanted],
                request_id=request_id,
                timeout=round(left * 1e6),
                client_timeout=left,
                parameters=self._parameters | {CHECKED_PARAMETER: checked, STEPS_PARAMETER: n_steps},
            )
        except self._grpc.InferenceServerException as e:
            raise self._understood(e, request_id) from e
        response = result.get_response()
        given = tuple(response.outputs[0].shape) if len(response.outputs) == 1 else None
        if (response.id, given) != (request_id, shape) or self._version not in ("", response.model_version):
            raise ServingError(
                f"The server at {self.url} answered request {response.id} with shape {given}, not {request_id} with {shape}.",
                "Do not use this server.",
            )
        if response.model_version != self._newest:
            self._current = False  # a new version answered: read its manifest before the next request
        output = result.as_numpy(spec.output_name) if region is None else region.read()
        return output, response.model_version

    def _understood(self, error: Any, request_id: str) -> SjepaError:
        """Return our error for one of tritonclient's."""
        status, message = str(error.status()), str(error.message())
        where = f"The server at {self.url}"
        if status.endswith("NOT_FOUND") or any(words in message for words in _NOT_THERE):
            return _NotThereError(f"{where} was not ready for {self.model} ({message}).", "Start it, or wait longer.")
        if status.endswith("INVALID_ARGUMENT"):
            return InputError(f"{where} refused the windows: {message}", "Send what the model's spec says.")
        if any(words in message for words in _OVERLOADED):
            return RefusedError(f"{where} is overloaded and refused a request ({message}).", "Send less, or add servers.")
        if status.endswith(("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED")):
            return UnansweredError(
                f"{where} did not answer request {request_id} ({message}); it may have decoded it.",
                "Count the window as lost, or send it again.",
            )
        return ServingError(f"{where} failed on request {request_id} ({message}).", "Look at its log.")


class _NotThereError(RefusedError):
    """Says that the server is not there, or not ready: the client connects again and tries once more."""


def _left(ends: float) -> float:
    return max(0.001, ends - time.monotonic())


def _pause(ends: float) -> bool:
    """Wait a little, and return whether there is time for another attempt."""
    if time.monotonic() + _PAUSE >= ends:
        return False
    time.sleep(_PAUSE)
    return True


def _fields(spec: ModelSpec) -> dict[str, Any]:
    """Return the fields of a model and of its signal side by side."""
    own = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    signal = own.pop("signal")
    return own | {field.name: getattr(signal, field.name) for field in dataclasses.fields(signal)}


def _short(value: object) -> str:
    """Return `value` for a message: of many channels, the first ones."""
    if isinstance(value, tuple):
        return listed(map(str, value), most=4)
    return f"{value}"


def parse_address(address: str) -> tuple[str, str]:
    """Return host with port and the model's name of HOST:PORT/MODEL or HOST/MODEL.

    Raises
    ------
    BackendError
        If it is neither.
    """
    found = re.fullmatch(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?/(?P<model>[A-Za-z0-9_.-]+)", address)
    if found is None:
        raise BackendError(f"{address!r} is no address of a served model.", "Write triton:HOST:PORT/MODEL.")
    return f"{found['host']}:{found['port'] or DEFAULT_PORT}", found["model"]


def connect(bundle: Bundle, name: str, precision: RunPrecision) -> Client:
    """Open the backend triton:HOST:PORT/MODEL, or triton-shm:..., which must serve `bundle` in `precision`.

    Raises
    ------
    BackendError
        If it does not.
    """
    scheme, _, address = name.partition(":")
    client = Client(address, bundle=bundle, shared_memory=scheme == "triton-shm")
    if client.precision != precision:
        served = client.precision
        client.close()
        raise BackendError(f"{name} computes in {served}, not in {precision}.", f"Use --precision {served}.")
    return client
