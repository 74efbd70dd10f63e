"""How long does a call take over the batch size? Draws the page of a result of `gpu_batches.py`, without a GPU.

    python benchmarks/batches_page.py benchmarks/results/gpu_batches_H100_2026-11-28.json

The page has a curve of the latency for each model and precision, and a table of all medians, as pages of `sjepa-bench` have them.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sjepa_deploy.pages.page import Section, render_page
from sjepa_deploy.runtime.bench import report_plots, report_tables
from sjepa_deploy.runtime.bench.cells import Cell, CellKey, Estimate, Latency, Percentile
from sjepa_deploy.spec import RunPrecision

KERNELS = {"auto": "cuda", "window": "cuda, one at a time", "batch": "cuda, many at a time"}
LEAD = (
    "Median of host wall times of one call: windows in the backend's own pinned memory, outputs back on the host. PyTorch "
    "replays one CUDA graph with its copies inside; the fast path of its transformer, on or off, stands beside its name. The "
    "backend cuda measures each size at its first call, and takes the faster of two kinds of kernels: those of one window at a "
    "time, and those of many."
)


def calls(data: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, dict[str, float]]]]:
    """Yield variant, backend, precision and the figures at each size of everything that was timed from pinned memory."""
    for case, content in data["cases"].items():
        variant, precision, kind = case.split(":")
        if kind == "curve":
            yield from ((variant, name, precision, content[kernels]) for kernels, name in KERNELS.items() if kernels in content)
        elif kind == "torch":
            for name, sizes in content.items():
                if isinstance(sizes, dict):
                    computed_in, path = name.split(", ", 1)
                    yield variant, f"PyTorch, {path}" if variant == "contextual" else "PyTorch", computed_in, sizes


def cells(data: dict[str, Any]) -> list[Cell]:
    """Return the medians as cells of the scenario "throughput"; the result has no samples."""
    found = []
    for variant, backend, precision, sizes in calls(data):
        for size, at in sizes.items():
            if size.isdecimal():  # others are of windows in other places
                median = Percentile(percent=50.0, value=Estimate(value=at["median"]), n_needed=1)
                unknown = dict.fromkeys(("min_us", "mean_us", "max_us"), math.nan)
                key = CellKey(
                    scenario="throughput", bundle=variant, backend=backend, precision=_known(precision), batch=int(size)
                )
                latency = Latency(n=int(at["n"]), n_blocks=1, percentiles=(median,), **unknown)
                found.append(Cell(id=f"c{len(found):03}", key=key, parity=None, latency=latency))
    return found


def _known(precision: str) -> RunPrecision:
    assert precision in ("fp32", "tf32", "fp16", "bf16")
    return precision  # type: ignore[return-value]


def write(result: Path) -> Path:
    """Write the page beside `result`, and return its path."""
    data = json.loads(result.read_text(encoding="utf-8"))
    found = cells(data)
    models = dict.fromkeys((cell.key.bundle, cell.key.precision) for cell in found)
    draw = tuple(
        functools.partial(
            report_plots.latency_curve,
            [cell for cell in found if (cell.key.bundle, cell.key.precision) == model],
            f"{model[0]} {model[1]}: latency of a call over the batch size",
        )
        for model in models
    )
    section = Section(
        name="curve",
        title="Latency over the batch size",
        lead=LEAD,
        tables=(report_tables.curve_table(found),),
        draw=(draw,),
    )
    page = result.with_suffix(".html")
    text = render_page(
        maker="gpu_batches.py",
        title=data["gpu"],
        facts=(f"PyTorch {data['torch']}", f"Python {data['python']}", f"commit {data['commit']}"),
        command="\n".join(data["commands"]),
        sections=(section,),
    )
    page.write_text(text, encoding="utf-8")
    return page


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
