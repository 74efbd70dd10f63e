"""References EEG to the average of its channels."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Dtype = TypeVar("Dtype", bound=np.floating[Any])


def average_reference(samples: NDArray[Dtype], axis: int) -> NDArray[Dtype]:
    """Return `samples` without the mean of all channels, which lie along `axis`."""
    referenced: NDArray[Dtype] = samples - samples.mean(axis=axis, keepdims=True)
    return referenced
