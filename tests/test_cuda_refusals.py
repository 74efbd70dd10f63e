"""What the backend `cuda` refuses: batches beyond memory, and the table of docs/fused.md with a test for each row."""

import re
from pathlib import Path

import numpy as np
import pytest
from bundles import small_spec

from sjepa_deploy.errors import BackendError, InputError
from sjepa_deploy.runtime.backend import BackendOptions
from sjepa_deploy.runtime.fused import backend as fused

ROOT = Path(__file__).parents[1]
KERNELS = ("window", "batch")


def backend_for(gpu, bundle, kernels, **options):
    gpu.multiprocessors = 4
    return fused.FusedBackend(bundle, "fp32", BackendOptions(kernels=kernels, **options))


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_batch_beyond_the_gpus_memory_is_told_and_smaller_ones_go_on(gpu, make_model, kernels):
    bundle, reference, _ = make_model(small_spec("prelocal"))
    backend = backend_for(gpu, bundle, kernels, memory="copy")
    want = backend.run(reference.inputs[:1]).copy()
    gpu.free = 3 * reference.inputs[:1].nbytes
    left = len(gpu.allocations)
    with pytest.raises(BackendError, match="out of memory") as error:
        backend.run(reference.inputs[:4])
    assert "--max-batch" in error.value.mend
    assert len(gpu.allocations) == left, "nothing of the batch is kept"
    np.testing.assert_array_equal(backend.run(reference.inputs[:1]), want)
    gpu.free = 1 << 30
    np.testing.assert_array_equal(backend.run(reference.inputs[:4])[:1], want)
    backend.close()


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_batch_beyond_the_kernels_numbers_is_refused(gpu, make_model, monkeypatch, kernels):
    """Kernels count the numbers of a batch in 32 bits."""
    bundle, reference, _ = make_model(small_spec("prelocal"))
    backend = backend_for(gpu, bundle, kernels)
    buffers = [size for _, size in backend._launcher.program.buffers] if kernels == "window" else []
    monkeypatch.setattr(fused, "MAX_ELEMENTS", 3 * max(reference.inputs[0].size, *buffers, 0))
    backend.run(reference.inputs[:2])
    with pytest.raises(InputError, match=r"batch of 3 windows .* too large.* Split it"):
        backend.run(reference.inputs[:3])
    backend.run(reference.inputs[:2])
    backend.close()


def test_every_refusal_of_the_page_has_its_test():
    page = (ROOT / "docs/fused.md").read_text().partition("## Refusals")[2].partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 12
    for row in rows:
        tests = re.findall(r"`(\w+\.py)::(\w+)`", row)
        assert tests, row
        for file, test in tests:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), row
