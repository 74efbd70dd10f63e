"""Ends ``make demo``: tells in one table what the demonstration made and what each figure means."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def summary(folder: Path) -> Table:
    """Return what the results in `folder` say, for people.

    Parameters
    ----------
    folder : Path
        Holds what the commands of ``make demo`` printed with ``--json``: ``finetune.json``, ``verify.json``, ``stream.json``
        and, where a recording was decoded, ``run.json``.
    """
    learned, verified, live = (_read(folder / f"{name}.json") for name in ("finetune", "verify", "stream"))
    table = Table(title="What was made, and what it means", title_justify="left", show_header=False, show_lines=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()

    result = learned["result"]
    r2, chance = result["test"]["r2"], result["baseline"]["r2"]["value"]
    table.add_row(
        "the score",
        f"R2 = {r2['value']:.2f} (95 % interval {r2['low']:.2f} to {r2['high']:.2f}) on {result['n_test']} windows of "
        f"{result['split']}s that the model never saw. Chance, which is to predict the mean, has {chance:.2f}; the best possible "
        "is 0.92, since the reaction times have noise.",
    )
    parity = verified["results"][0]
    table.add_row(
        "parity",
        f"The bundle gives the outputs of the PyTorch model in float64: they differ by {parity['max_error']:.0e} of their "
        f"scale, and {parity['tolerance']:.0e} is allowed.",
    )
    counters, hop, age = live["counters"], live["hop"], live["age_of_the_newest_decisions"]
    table.add_row(
        "decisions a second",
        f"{counters['decisions'] / (counters['windows'] * hop):.1f} of {1 / hop:g} asked for; "
        f"{counters['windows'] - counters['decisions']} of {counters['windows']} windows were left out, and counted.",
    )
    table.add_row(
        "age of a decision",
        f"{_milliseconds(age['p50'])} after its newest sample (median), {_milliseconds(age['p99'])} for 99 of 100. "
        f"The filters delay {_delays(live)}.",
    )
    if (folder / "run.json").exists():
        decoded = _read(folder / "run.json")
        table.add_row(
            "the recording",
            f"{decoded['n_windows']} windows of {escape(decoded['recording'])} are decoded in {escape(decoded['out'])}: "
            f"{escape('; '.join(decoded['steps']))}. The predictions say that the path works, and nothing about the person: the "
            "model learned synthetic EEG alone, and channels that are interpolated hold nothing that the others do not.",
        )
    where, commands = escape(str(folder)), escape(str(Path(sys.executable).parent.absolute()))
    table.add_row("what there is", f"{where}/model is the PyTorch checkpoint, {where}/bundle is what decodes.")
    table.add_row(
        "what to try next",
        "make demo RECORDING=session1.edf decodes a recording.\n"
        f"sjepa-stream {where}/bundle --source lsl:NAME decodes an amplifier.\n"
        "docs/finetune.md trains on your own recordings.\n"
        f"The commands are in {commands}.",
    )
    return table


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _milliseconds(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds * 1000:.1f} ms"


def _delays(live: dict[str, Any]) -> str:
    return ", ".join(f"{hertz:g} Hz by {delay * 1000:.0f} ms" for hertz, delay in live["filter_delay"]["at_hz"])


if __name__ == "__main__":
    Console(highlight=False).print(summary(Path(sys.argv[1])))
