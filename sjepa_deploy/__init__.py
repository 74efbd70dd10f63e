"""From a SignalJEPA EEG model's PyTorch checkpoint to a verified, real-time decoder."""

from importlib.metadata import version as _version

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import SjepaError
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.spec import EncoderSpec, ModelSpec, Preprocessing

__version__ = _version("sjepa-deploy")

__all__ = ["load", "Predictor", "Bundle", "ModelSpec", "EncoderSpec", "Preprocessing", "SjepaError"]
