"""Finds what is too large for a precision: weights before an export, and products after an export that failed."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sjepa_deploy.errors import ExportError
from sjepa_deploy.export.rewrite import DTYPES, Product, set_precision
from sjepa_deploy.models.networks import SignalJEPAModule, reference_mode
from sjepa_deploy.parity import Reference
from sjepa_deploy.spec import Precision


def check_weights_fit(model: SignalJEPAModule, precisions: tuple[Precision, ...]) -> None:
    """Compare the weights of all products of a rewritten model with the largest number of each precision.

    Raises
    ------
    ExportError
        If a weight would become infinite.
    """
    for precision in precisions:
        most = torch.finfo(DTYPES[precision]).max
        for name, module in model.named_modules():
            for part, weight in module.named_parameters(recurse=False) if isinstance(module, Product) else ():
                if (largest := float(weight.abs().max())) > most:
                    raise ExportError(
                        f"{name}.{part} holds {largest:.3g}, and the largest number of {precision} is {most:,.0f}.",
                        f"Leave {precision} out with --precision: bf16 and fp32 hold numbers to 3e38.",
                    )


def overflowing(model: SignalJEPAModule, precision: Precision, reference: Reference) -> str | None:
    """Return which part of a rewritten model gives infinity in `precision`, and for which window, or None if no part does."""
    typed = copy.deepcopy(model)
    set_precision(typed, precision)
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> None:
        def see(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            values = [value for value in (*inputs, output) if isinstance(value, Tensor)]
            *before, after = (bool(value.isfinite().all()) for value in values)
            if all(before) and not after:
                found.append(name)

        module.register_forward_hook(see)

    for name, module in typed.named_modules():
        watch(name, module)
    most = torch.finfo(DTYPES[precision]).max
    for kind, window, output in zip(reference.kinds, reference.inputs, reference.outputs, strict=True):
        if np.isfinite(output).all():
            with reference_mode(typed):
                typed(torch.from_numpy(window[None]))
            if found:  # a module ends before the one that it is part of
                return f"values in {found[0] or 'the model'} exceed {most:,.0f}, the largest number of {precision}, for {kind}"
    return None
