"""From a SignalJEPA EEG model's PyTorch checkpoint to a verified, real-time decoder."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.spec import EncoderSpec, ModelSpec, Preprocessing

try:
    __version__ = _version("sjepa-deploy")
except _PackageNotFoundError:  # a checkout on the path of a decoding box
    __version__ = "0+uninstalled"

__all__ = [
    "load",
    "BackendOptions",
    "Predictor",
    "Decoder",
    "StreamConfig",
    "Decision",
    "DecisionLayer",
    "Bundle",
    "ModelSpec",
    "EncoderSpec",
    "Preprocessing",
    "SjepaError",
]
