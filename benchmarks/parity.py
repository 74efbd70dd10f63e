"""How close are the exported graphs to the PyTorch model in float64? The measurement behind the tolerances.

Exports random models over a grid of variants, channels, lengths, filters and outputs, judges every precision on the synthetic
windows, and for 32 channels at 128 Hz on a real recording too.

    python benchmarks/parity.py --recording eeglab_data.set --out benchmarks/results/parity_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, write_result

from sjepa_deploy.bundle import Provenance
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.recording import fit_recording, read_recording
from sjepa_deploy.eeg.windows import windows
from sjepa_deploy.export.to_bundle import ExportParityError, to_bundle
from sjepa_deploy.models.networks import SignalJEPAModule, build_model
from sjepa_deploy.spec import PRECISIONS, VARIANTS, ModelSpec

GRID = [(129, 200, 4, 1), (129, 152, 4, 2), (62, 2048, 4, 4), (32, 408, 8, 2), (8, 280, 2, 3), (1, 200, 1, 1)]
"""Channels, samples, filters, outputs."""


def random_model(spec: ModelSpec, seed: int) -> SignalJEPAModule:
    """Return a model whose normalisations and biases are random too, as after training."""
    model = build_model(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def judge(spec: ModelSpec, seed: int, max_batch: int, real: np.ndarray | None = None) -> list[dict[str, Any]]:
    weights = Provenance(source="random", format="initialisation", seed=seed)
    model = random_model(spec, seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            bundle = to_bundle(
                model, Path(folder) / "bundle", weights=weights, max_batch=max_batch, parity_windows=real, seed=seed
            )
            results = bundle.manifest.parity
        except ExportParityError as e:
            results = e.results
    return [dataclasses.asdict(result) for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recording", type=Path, required=True, help="a recording of 32 named channels with positions, 128 Hz")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    montage = read_montage("GSN-HydroCel-129")
    rows = []
    for variant in VARIANTS:
        for seed, (n_chans, n_times, n_filters, n_outputs) in enumerate(GRID):
            spec = ModelSpec.of(
                variant=variant,
                n_chans=n_chans,
                n_times=n_times,
                sfreq=100.0,
                n_outputs=n_outputs,
                n_spat_filters=n_filters,
                positions=montage.positions[:n_chans],
            )
            case = f"{n_chans} x {n_times}, {n_filters} filters, {n_outputs} outputs"
            rows += [{"variant": variant, "case": case} | r for r in judge(spec, seed, max_batch=8 if n_times > 1000 else 64)]
        raw = read_recording(args.recording)
        positions = tuple(tuple(map(float, ch["loc"][:3])) for ch in raw.info["chs"])
        spec = ModelSpec.of(
            variant=variant,
            n_chans=32,
            n_times=256,
            sfreq=128.0,
            ch_names=tuple(raw.ch_names),
            positions=positions,
            phase="zero-phase",
        )
        real = windows(fit_recording(raw, spec.signal).data, spec.n_times, spec.n_times)
        rows += [{"variant": variant, "case": f"{args.recording.name}, 32 x 256"} | r for r in judge(spec, 9, 64, real)]
    lines = [
        "| variant | case | precision | max abs | / scale | allowed | / spread | 1 - cosine | flips | passed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        flips = "" if r["decision_flips"] is None else f"{r['decision_flips']} of {r['n_rows']}"
        lines.append(
            f"| {r['variant']} | {r['case']} | {r['precision']} | {r['max_abs']:.1e} | {r['max_error']:.1e} "
            f"| {r['tolerance']:.0e} | {r['max_relative_to_spread']:.1e} | {max(0, 1 - r['cosine']):.1e} "
            f"| {flips} | {'yes' if r['passed'] else 'NO'} |"
        )
    worst = {p: max(r["max_error"] for r in rows if r["precision"] == p) for p in PRECISIONS}
    lines += ["", "Largest error over scale: " + ", ".join(f"{p} {e:.1e}" for p, e in worst.items()) + "."]
    write_result(args.out, {"machine": describe_machine(), "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
