"""Holds the networks in PyTorch, reads and writes their checkpoints, and transfers weights between them."""

from sjepa_deploy.models.networks import (
    MODELS,
    SignalJEPA,
    SignalJEPA_Contextual,
    SignalJEPA_PostLocal,
    SignalJEPA_PreLocal,
    SignalJEPAModule,
    build_model,
    reference_mode,
)

__all__ = [
    "build_model",
    "SignalJEPA",
    "SignalJEPA_PreLocal",
    "SignalJEPA_PostLocal",
    "SignalJEPA_Contextual",
    "SignalJEPAModule",
    "MODELS",
    "reference_mode",
]
