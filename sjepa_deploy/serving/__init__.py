"""Serves bundles to many subjects with Triton Inference Server, and asks such servers."""

from sjepa_deploy.serving.client import Answer, Client
from sjepa_deploy.serving.server import Server

__all__ = ["Client", "Answer", "Server"]
