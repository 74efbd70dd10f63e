"""Whether pretraining collapses: the default model on synthetic EEG, with and without warm-up, clipping and another EMA.

    python benchmarks/collapse.py --out benchmarks/results/collapse_HARDWARE_DATE

Every case is pretrained in a plain loop with `sjepa_deploy.learning.pretrain.JEPA`, on a GPU if there is one. Kept are, for each
epoch, the spread of the teacher's embeddings over the validation windows, and the validation L1 over that of the mean embedding.
Case 4 of 4 channels takes Fz, Cz, T7 and Pz.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sjepa_deploy.learning.data import DataConfig, Synthetic, split_windows
from sjepa_deploy.learning.loading import load_windows
from sjepa_deploy.learning.masking import Masking, MaskSampler
from sjepa_deploy.learning.pretrain import JEPA, spread_of
from sjepa_deploy.models.networks import SignalJEPA, build_model
from sjepa_deploy.spec import EncoderSpec, ModelSpec

FOUR: dict[str, Any] = {"montage": "sjepa-62", "ch_names": ("Fz", "Cz", "T7", "Pz")}
FAST = {"epochs": 12, "start": 0.986, "end": 0.986}
CASES: list[dict[str, Any]] = [
    *({"seed": seed} for seed in range(5)),
    *({"seed": seed, "clip": None} for seed in range(2)),
    *({"seed": seed, "warm": 0} for seed in range(2)),
    *({"seed": seed, "data": FOUR} for seed in range(3)),
    {"seed": 0, "data": FOUR, "warm": 0, "clip": None},
    *({"seed": seed, **FAST} for seed in range(2)),
    {"seed": 0, "epochs": 12},
]


def pretrain(
    seed: int,
    epochs: int = 40,
    warm: int = 100,
    clip: float | None = 1.0,
    start: float = 0.999,
    end: float = 0.9999,
    data: dict[str, Any] | None = None,
) -> list[tuple[float, float]]:
    """Return spread and relative L1 of every epoch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = DataConfig(synthetic=Synthetic(seed=seed), **(data or {}))
    windows = load_windows(config)
    split = split_windows(windows, config)
    eeg = torch.from_numpy(windows.eeg).to(device)
    spec = ModelSpec(variant="base", encoder=EncoderSpec(), **windows.model_fields)
    assert spec.positions is not None
    torch.manual_seed(seed)
    base = build_model(spec, seed=seed)
    assert isinstance(base, SignalJEPA)
    jepa, sampler = JEPA(base).to(device), MaskSampler(Masking(), spec.positions).to(device)
    parameters = [p for p in jepa.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    step, epochs_seen, train = 0, [], torch.from_numpy(split.train)
    for _ in range(epochs):
        jepa.train()
        for batch in train[torch.randperm(len(train))].split(32):
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / max(1, warm))
            optimizer.zero_grad()
            jepa(eeg[batch], sampler(len(batch))).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            step += 1
            jepa.follow(start + (end - start) * min(1.0, step / 75_000))
        jepa.eval()
        with torch.no_grad():
            seen = eeg[split.val]
            local, positions = jepa.tokens(seen)
            target = jepa.target(local, positions)
            spread, l1_mean = spread_of(target)
            masks = sampler(len(seen))
            loss = jepa.loss(jepa.predict(local, positions, masks), target, masks)
            epochs_seen.append((float(spread), float(loss / l1_mean)))
    return epochs_seen


def main() -> None:
    """Run all cases and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are written")
    args = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append({"case": case, "epochs": pretrain(**case)})
        print(json.dumps(rows[-1]), flush=True)
    lines = ["# collapse", "", "| case | spread / relative L1, each fourth epoch and the last |", "| --- | --- |"]
    for row in rows:
        seen = [*row["epochs"][::4], row["epochs"][-1]]
        lines.append(f"| {row['case']} | {', '.join(f'{spread:.2f} / {l1:.2f}' for spread, l1 in seen)} |")
    args.out.with_suffix(".json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
