"""Which figures of an H100 does the README show? Writes its tables from the result files that they name.

python benchmarks/readme_tables.py    # after naming other results below; a test compares
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).with_name("results")
ONE_WINDOW, BATCHES = "latency_H100_2026-11-25", "gpu_batches_H100_2026-11-28"
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


def over_the_batch(cases: Any) -> str:
    """Return the table of the latency over the batch size: ours and PyTorch's fastest setting, in us, and windows a second."""
    rows = []
    for variant, precision in MODELS:
        ours = cases[f"{variant}:{precision}:curve"]["auto"]
        settings = {name: found for name, found in cases[f"{variant}:{precision}:torch"].items() if name.startswith(precision)}
        theirs = {size: min((found[str(size)] for found in settings.values() if str(size) in found),
                            key=lambda figures: figures["median"], default=None) for size in SIZES}  # fmt: skip
        name = f"{NAMES[variant]} {precision}"
        for who, at in ((f"{name}, ours", {size: ours[str(size)] for size in SIZES}), (f"{name}, PyTorch", theirs)):
            medians = ["" if at[size] is None else f"{at[size]['median']:,.0f}" for size in SIZES]
            rows.append([who, *medians, f"{at[SIZES[-1]]['windows/s']:,.0f}"])
    return table(["windows of a call", *(f"{size:,}" for size in SIZES), "a second"], *rows)


def figures() -> str:
    """Return the tables with the sentences that name their results."""
    batches = read(BATCHES)
    copied = batches["cases"]["all:all:copies"]["1024"]["windows/s"]
    return (
        "On an H100, a call with one window that is in pinned memory already, prediction back on the host, median\n"
        f"([report](benchmarks/results/{ONE_WINDOW}.md)):\n\n"
        f"{one_window(read(ONE_WINDOW))}\n"
        "Median latency of a call in us over the batch size, windows in pinned memory and predictions back. PyTorch\n"
        f"{batches['torch']} is at its fastest setting: a CUDA graph, the fast path of its transformer on or off. Last column:\n"
        f"windows a second at 1,024; copying the windows alone allows {copied:,.0f}\n"
        f"([report](benchmarks/results/{BATCHES}.md), [curves](benchmarks/results/{BATCHES}.html)):\n\n"
        f"{over_the_batch(batches['cases'])}"
    )


def readme(text: str) -> str:
    """Return the text of the README with its figures made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{figures()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
