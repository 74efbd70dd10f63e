"""Which figures of an H100 does the README show? Writes its tables from the result files that they name.

python benchmarks/readme_tables.py    # after naming other results below; a test compares
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).with_name("results")
REPORT, COPIES = "latency_H100_2026-11-28", "gpu_batches_H100_2026-11-28"
BEGIN, END = "<!-- figures: written by benchmarks/readme_tables.py -->\n", "<!-- end of figures -->\n"

NAMES = {"prelocal": "PreLocal", "postlocal": "PostLocal", "contextual": "Contextual"}
BACKENDS = {
    "cuda-in-place": "ours, [`cuda`](docs/fused.md)",
    "tensorrt-in-place": "TensorRT 8.6",
    "ort-cuda-in-place": "ONNX Runtime, CUDA graph",
    "torch-cuda-graph-in-place": "PyTorch, CUDA graph",
}
MODELS = (("prelocal", "fp32"), ("postlocal", "fp32"), ("contextual", "fp32"), ("contextual", "fp16"))
SIZES = (1, 4, 16, 64, 256, 1024)
CURVES = {"ours": ("cuda-in-place",), "TensorRT 8.6": ("tensorrt-",), "PyTorch": ("torch-",)}
"""Who has a row for each model: beginnings of the names of the backends, of which the fastest at each size counts."""


def read(name: str) -> Any:
    """Return the content of a result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(*rows: list[str]) -> str:
    """Return rows as Markdown, the first one as the head."""
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def one_window(report: Any) -> str:
    """Return the table of one window, back to back: the median of each backend for each model, in us."""
    medians = {}
    for cell in report["cells"]:
        key = cell["key"]
        if key["scenario"] == "back-to-back" and key["batch"] == 1:
            figures = {found["percent"]: found["value"] for found in cell["latency"]["percentiles"]}
            medians[key["backend"], key["bundle"], key["precision"]] = figures[50.0]["value"]
    rows = [[name, *(f"{medians[(backend, *model)]:.0f}" for model in MODELS)] for backend, name in BACKENDS.items()]
    return table(["one window, us", *(f"{NAMES[variant]} {precision}" for variant, precision in MODELS)], *rows)


def over_the_batch(report: Any, copied: float) -> str:
    """Return the table of the latency over the batch size, in us: each one at its fastest setting at each size."""
    medians: dict[tuple[str, str, int], dict[str, float]] = {}
    for cell in report["cells"]:
        key = cell["key"]
        if key["scenario"] == "throughput" and cell["parity"] and (value := cell["latency"]["percentiles"][0]["value"]):
            model = (key["bundle"].removesuffix("-1024"), key["precision"], key["batch"])
            medians.setdefault(model, {})[key["backend"]] = value["value"]
    rows = []
    for variant, precision in MODELS:
        for who, names in CURVES.items():
            found = [medians[variant, precision, size] for size in SIZES]
            fastest = [min(us for name, us in each.items() if name.startswith(names)) for each in found]
            rate = SIZES[-1] / fastest[-1] * 1e6
            name = f"{NAMES[variant]} {precision}, {who}"
            rows.append([name, *(f"{us:,.0f}" for us in fastest), f"{rate:,.0f}", f"{rate / copied:.0%}"])
    return table(["windows of a call", *(f"{size:,}" for size in SIZES), "a second", "of the copies"], *rows)


def figures() -> str:
    """Return the tables with the sentences that name their results."""
    report = read(REPORT)
    copied = read(COPIES)["cases"]["all:all:copies"]["1024"]["windows/s"]
    (torch,) = report["environment"]["versions"]["torch"]
    return (
        "On an H100, a call with one window that is in pinned memory already, prediction back on the host, median\n"
        f"([report](benchmarks/results/{REPORT}.md)):\n\n"
        f"{one_window(report)}\n"
        "Median latency of a call in us over the batch size, windows in pinned memory and predictions back, each one at its\n"
        "fastest setting: TensorRT with kernels for 1, 32 or 1,024 windows, as CUDA graphs where it takes them; PyTorch\n"
        f"{torch} as a CUDA graph, compiled or eager, the fast path of its transformer on or off. The last columns: windows a\n"
        f"second at 1,024, and their share of the {copied:,.0f} that copying the windows alone allows\n"
        f"([report](benchmarks/results/{REPORT}.md), [copies](benchmarks/results/{COPIES}.md)):\n\n"
        f"{over_the_batch(report, copied)}"
    )


def readme(text: str) -> str:
    """Return the text of the README with its figures made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{figures()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
