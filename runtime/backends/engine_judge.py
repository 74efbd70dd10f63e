"""Judges engines: runs a plan on the reference windows of its bundle, and looks at the types of its layers."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import ParityError
from sjepa_deploy.parity import ParityResult, check_parity
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.backends.engine_precision import judge_types, stored_weights, summarise_layers, weight_samples
from sjepa_deploy.runtime.backends.engine_runner import CaptureError, EngineRunner
from sjepa_deploy.runtime.backends.engines import BuildSettings, LayerSummary
from sjepa_deploy.runtime.backends.tensorrt_api import TensorRT
from sjepa_deploy.runtime.gpu.cuda import Device
from sjepa_deploy.spec import RunPrecision

logger = logging.getLogger(__name__)


class EngineParityError(ParityError):
    """Reports that the outputs of an engine differ from the PyTorch model.

    Parameters
    ----------
    result : ParityResult
        Measured parity of the engine.
    when : str
        When the engine was judged, e.g. "after the build".
    mend : str
        What became of the engine, and what helps.
    """

    def __init__(
        self,
        result: ParityResult,
        when: str,
        mend: str = "It was not kept. Try --optimization-level 2, or another precision.",
    ) -> None:
        super().__init__(f"The {result.precision} engine {result.failure}, {when}.", mend)
        self.result = result


def engine_batch_sizes(settings: BuildSettings) -> tuple[int, ...]:
    """Return the batch sizes that an engine is judged at: 1, 2, 3, 8 and the largest, within the profile."""
    low, high = settings.min_batch, settings.max_batch
    return tuple(sorted({min(max(size, low), high) for size in (1, 2, 3, 8, high)}))


@dataclass(frozen=True, kw_only=True)
class EngineTypes:
    """Holds the types that an engine computes in.

    Attributes
    ----------
    layers : LayerSummary
        From the engine inspector.
    computes_in : {"fp32", "tf32", "fp16", "bf16"}
        Precision of the engine.
    evidence : str
        Reason to believe `computes_in`.
    """

    layers: LayerSummary
    computes_in: RunPrecision
    evidence: str


class EngineJudge:
    """Judges plans of one bundle in one precision on one GPU.

    Parameters
    ----------
    bundle : Bundle
        The bundle, with its graphs and its reference windows.
    precision : {"fp32", "tf32", "fp16", "bf16"}
        Precision that was asked for.
    settings : BuildSettings
        Profile of the engines.
    api : TensorRT
        TensorRT that deserialises the plans.
    device : Device
        GPU that runs the engines.
    """

    def __init__(self, bundle: Bundle, precision: RunPrecision, settings: BuildSettings, api: TensorRT, device: Device) -> None:
        self._bundle, self._precision, self._sizes = bundle, precision, engine_batch_sizes(settings)
        self._api, self._device = api, device

    def types(self, plan: bytes) -> EngineTypes:
        """Return the types that the engine of `plan` computes in.

        Raises
        ------
        EngineError
            If TensorRT refuses the plan, or an fp32 engine may use TensorFloat-32.
        """
        layers = summarise_layers(self._api.inspect(self._api.deserialize(plan)))
        samples = weight_samples(self._bundle.graph_path(self._precision).read_bytes())
        computes_in, evidence = judge_types(layers, self._precision, stored_weights(plan, samples))
        return EngineTypes(layers=layers, computes_in=computes_in, evidence=evidence)

    def parity(self, plan: bytes) -> ParityResult:
        """Return the parity of the engine's outputs with the PyTorch model, passed or not.

        An engine that no CUDA graph takes is judged without a graph, with a warning.
        """
        try:
            return self._compare(plan, BackendOptions())
        except CaptureError as e:
            logger.warning("%s It is judged without a graph.", e.problem)
            return self._compare(plan, BackendOptions(cuda_graph=False))

    def _compare(self, plan: bytes, options: BackendOptions) -> ParityResult:
        runner = EngineRunner(self._api, self._device, [plan], self._bundle.spec, options)
        try:
            reference = self._bundle.reference()
            return check_parity(runner.run, reference, backend=self._api.flavour, precision=self._precision, sizes=self._sizes)
        finally:
            runner.close()
