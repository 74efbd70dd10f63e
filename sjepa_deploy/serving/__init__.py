"""Many subjects, one engine: Triton Inference Server from a bundle, and its client."""

from sjepa_deploy.serving.client import Answer, Client
from sjepa_deploy.serving.server import Server

__all__ = ["Client", "Answer", "Server"]
