"""Samples per second of JEPA pretraining: ours against braindecode's modules in the same Lightning loop.

On a machine with GPUs, from a checkout, without installing anything but torch, lightning, numpy, safetensors:

    PYTHONPATH=. python benchmarks/training_speed.py --braindecode FILE --out benchmarks/results/training_speed_HARDWARE_DATE
    PYTHONPATH=. python benchmarks/training_speed.py --networks 'ours,ours compiled' --devices 2 --out ...

FILE is braindecode's models/signal_jepa.py; what it imports and the loop does not need is stubbed (`load_braindecode`). The same
loss, masks, batches, optimiser and EMA drive all networks: "braindecode" and "ours" as they are, "ours compiled" as with
``--compile`` of sjepa-pretrain, "ours MODE" and "braindecode MODE" with that mode of torch.compile.

Every cell (network, shape, precision) is a process of its own. All compile and warm up at the same time; then they take turns,
one at a time, and wait without work in between, so that each repeat of a cell lies beside the same repeat of the others. A cell
that fails, or is not ready in time, loses only itself. At the end each cell traces a few steps: how long the GPU works in one.
``--device cpu`` with small --batch-sizes is a dry run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path
from statistics import median

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy

ROOT = Path(__file__).parents[1]


def import_sjepa() -> None:
    """Make `sjepa_deploy` importable from a checkout that is not installed, links or not."""
    try:
        import sjepa_deploy  # noqa: F401
    except ImportError:
        package = types.ModuleType("sjepa_deploy")
        package.__path__ = [str(ROOT / "sjepa_deploy")]
        sys.modules["sjepa_deploy"] = package


import_sjepa()

from braindecode_alone import BraindecodeJEPA, load_braindecode  # noqa: E402

from sjepa_deploy.eeg.montage import read_montage  # noqa: E402
from sjepa_deploy.learning.loop import Engine, SeedEpochs  # noqa: E402
from sjepa_deploy.learning.masking import Masking  # noqa: E402
from sjepa_deploy.learning.pretrain import PretrainConfig, PretrainModule  # noqa: E402
from sjepa_deploy.spec import EncoderSpec, ModelSpec  # noqa: E402

MONTAGES = {129: "GSN-HydroCel-129", 62: "sjepa-62"}
TURN_SECONDS = 60
TRACED_STEPS = 5
HEADINGS = (
    *("shape", "batch", "precision", "network", "samples/s (median)", "range", "ms a step"),
    *("GPU ms", "kernels", "reserved MiB", "against braindecode"),
)


class Batches(torch.utils.data.IterableDataset):
    """The same two batches over and over, already on the device: the loop is measured, not a disk."""

    def __init__(self, batch: int, shape: tuple[int, int], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = [(10 * torch.randn(batch, *shape, generator=generator)).to(device) for _ in range(2)]
        self.targets = torch.zeros(batch, device=device)

    def __iter__(self):
        while True:
            for eeg in self.batches:
                yield eeg, self.targets


class Turns(lightning.Callback):
    """Warms up, then takes `repeats` turns of `steps` steps when told to, then traces some steps.

    What is to be told lies in `folder`: ``ready`` and ``turn-K.json`` from the first process, ``go-K`` from the parent.
    """

    def __init__(self, folder: Path, *, warmup: int, steps: int, repeats: int) -> None:
        self.folder, self.warmup, self.steps, self.repeats = folder, warmup, steps, repeats
        self.turn = -1
        self.due = warmup

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """Measure, and wait for the next turn."""
        cuda = module.device.type == "cuda"
        if cuda and trainer.global_step == self.warmup // 2:  # leave out what compiling needed
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if trainer.global_step < self.due:
            return
        if cuda:
            torch.cuda.synchronize()
        if self.turn < 0:
            self.say(trainer, "ready", {})
        else:
            seconds = (time.perf_counter() - self.start) / (self.due - self.first)
            if self.turn < self.repeats:
                peak = torch.cuda.max_memory_reserved() / 2**20 if cuda else None
                answer = {"ms_per_step": seconds * 1e3, "peak_memory_mib": peak, "loss": float(outputs["loss"].detach())}
            else:
                self.profile.stop()
                answer = traced(self.profile, self.due - self.first, self.folder)
            self.say(trainer, f"turn-{self.turn}.json", answer)
        self.turn += 1
        if self.turn > self.repeats:
            trainer.should_stop = True
            return
        while not (self.folder / f"go-{self.turn}").exists():
            time.sleep(0.002)
        self.first = trainer.global_step
        self.due = self.first + (self.steps if self.turn < self.repeats else TRACED_STEPS)
        if self.turn == self.repeats:
            activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()
        self.start = time.perf_counter()

    def say(self, trainer, name: str, content: dict) -> None:
        """Write a file at once."""
        if trainer.is_global_zero:
            (self.folder / "part").write_text(json.dumps(content))
            (self.folder / "part").rename(self.folder / name)


def traced(profile: torch.profiler.profile, steps: int, folder: Path) -> dict:
    """Return the GPU's work in a step: milliseconds in which it had any, kernels, and the kernels that take longest."""
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    busy, end = 0.0, 0.0
    times: dict[str, list[float]] = {}
    for event in sorted(work, key=lambda e: e["ts"]):
        finish = event["ts"] + event["dur"]
        busy += max(0.0, finish - max(end, event["ts"]))
        end = max(end, finish)
        times.setdefault(event["name"][:100], []).append(event["dur"])
    longest = sorted(times.items(), key=lambda item: -sum(item[1]))[:15]
    return {
        "gpu_ms_per_step": busy / 1e3 / steps,
        "kernels_per_step": len(work) / steps,
        "longest": {name: {"ms": sum(us) / 1e3 / steps, "calls": len(us) / steps} for name, us in longest},
    }


def build(network: str, shape: tuple[int, int], batch: int, args: argparse.Namespace) -> PretrainModule:
    """Return what sjepa-pretrain would train, or the same around braindecode's modules."""
    n_chans, n_times = shape
    family, _, mode = network.partition(" ")
    montage = read_montage(MONTAGES[n_chans])
    encoder = EncoderSpec(n_layers=args.layers, n_decoder_layers=min(4, args.layers))
    spec = ModelSpec.of(
        variant="base",
        n_chans=n_chans,
        n_times=n_times,
        sfreq=128.0,
        ch_names=montage.ch_names,
        positions=montage.positions,
        encoder=encoder,
    )
    engine = Engine(batch_size=batch, weight_decay=0.01, compile=network == "ours compiled")
    masking = Masking(mode=args.mask, radius=args.radius)
    module = PretrainModule(PretrainConfig(masking=masking, encoder=encoder, engine=engine), spec)
    if family == "braindecode":
        bd = load_braindecode(args.braindecode)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = bd.SignalJEPA(
                n_chans=n_chans,
                n_times=n_times,
                sfreq=128.0,
                chs_info=[{"ch_name": n, "loc": list(p)} for n, p in zip(montage.ch_names, montage.positions, strict=True)],
                transformer__num_encoder_layers=encoder.n_layers,
                transformer__num_decoder_layers=encoder.n_decoder_layers,
            )
        theirs.load_state_dict(module.jepa.base.state_dict())
        module.jepa = BraindecodeJEPA(theirs)
    if mode and mode != "compiled":
        module.jepa.compile(dynamic=False, mode=mode)
    return module


def take_turns(cell: dict, folder: Path, args: argparse.Namespace) -> None:
    """Train one cell, in turns."""
    shape = (cell["n_chans"], cell["n_times"])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    turns = Turns(folder, warmup=args.warmup, steps=args.steps, repeats=args.repeats)
    module = build(cell["network"], shape, cell["batch"], args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="gpu" if args.device == "cuda" else "cpu",
            devices=args.devices,
            max_epochs=1,
            precision={"bf16": "bf16-mixed", "fp32": "32-true"}[cell["precision"]],
            strategy=DDPStrategy() if args.devices > 1 else "auto",
            callbacks=[SeedEpochs(0), turns],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        batches = torch.utils.data.DataLoader(Batches(cell["batch"], shape, device), batch_size=None)
        trainer.fit(module, train_dataloaders=batches)


class Cell:
    """The process of one cell, from its parent's side."""

    def __init__(self, cell: dict, folder: Path) -> None:
        self.cell, self.folder = cell, folder
        folder.mkdir()
        command = [sys.executable]
        if cell["devices"] > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cell["devices"])]
        command += [__file__, *sys.argv[1:], "--cell", json.dumps(cell), "--folder", str(folder)]
        # A cache of its own: one that is killed while it compiles leaves half a library there.
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)

    def wait_for(self, name: str, deadline: float) -> dict | None:
        """Return what the process says under that name, or None where it ended or time ran out."""
        while not (self.folder / name).exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return json.loads((self.folder / name).read_text())

    def turn(self, number: int) -> dict | None:
        """Let it take a turn, and return what it found."""
        (self.folder / f"go-{number}").touch()
        return self.wait_for(f"turn-{number}.json", time.monotonic() + TURN_SECONDS)

    def end(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def failure(self, stage: str) -> dict:
        """End the process, and return its last words."""
        ended = self.process.poll() is not None
        self.end()
        words = (self.folder / "log").read_text().strip().splitlines()[-6:]
        return self.cell | {"stage": stage, "error": ("" if ended else "out of time; ") + " | ".join(words)[-600:]}


def measure(cells: list[dict], args: argparse.Namespace) -> dict:
    """Return rows, traces and failures of all cells."""
    rows, traces, failures = [], [], []
    start = time.monotonic()
    running: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            running = [Cell(cell, Path(folder) / str(i)) for i, cell in enumerate(cells)]
            started = list(running)
            for cell in started:
                if cell.wait_for("ready", start + args.prepare_seconds) is None:
                    failures.append(cell.failure("prepare"))
                    running.remove(cell)
                    print("failed:", failures[-1], flush=True)
                else:
                    print(f"ready after {time.monotonic() - start:.0f} s: {cell.cell}", flush=True)
            for number in range(args.repeats + 1):
                for cell in list(running):
                    if time.monotonic() - start > args.seconds:
                        print(f"out of time before turn {number} of {cell.cell}", flush=True)
                        continue
                    found = cell.turn(number)
                    if found is None:
                        failures.append(cell.failure(f"turn {number}"))
                        running.remove(cell)
                        print("failed:", failures[-1], flush=True)
                    elif number < args.repeats:
                        speed = cell.cell["batch"] * cell.cell["devices"] / found["ms_per_step"] * 1e3
                        rows.append(cell.cell | {"repeat": number, "samples_per_s": speed} | found)
                        print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
                    else:
                        traces.append(cell.cell | found)
        finally:
            for cell in running:
                cell.end()
    return {"rows": rows, "traces": traces, "failures": failures}


def same_loss(args: argparse.Namespace) -> float:
    """Return the difference of the two networks' losses for the same weights, batch and masks, without dropout."""
    ours, theirs = (build(network, (62, 408), 4, args) for network in ("ours", "braindecode"))
    eeg, masks = 10 * torch.randn(4, 62, 408), ours.sampler(4)
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        return abs(float(ours.jepa.eval()(eeg, masks) - theirs.jepa.eval()(eeg, masks)))


def versions(commit: str | None) -> dict[str, str]:
    """Return what was measured with."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "lightning": lightning.__version__}
    found["commit"] = commit or output_of("git", "rev-parse", "--short", "HEAD")
    if torch.cuda.is_available():
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        return found | {"driver": driver, "device": torch.cuda.get_device_name()}
    return found | {"device": f"{os.cpu_count()} CPU cores"}


def output_of(*command: str) -> str:
    """Return what a command prints, or nothing where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return ""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--braindecode", type=Path)
    parser.add_argument("--networks", default="braindecode,ours,ours compiled")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--shapes", default="129x200,62x2048")
    parser.add_argument("--batch-sizes", default="256,32", help="one a shape")
    parser.add_argument("--precisions", default="bf16,fp32")
    parser.add_argument("--mask", choices=["block", "fixed"], default="block")
    parser.add_argument("--radius", type=float, default=0.6)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prepare-seconds", type=float, default=300, help="a cell that is not ready then is given up")
    parser.add_argument("--seconds", type=float, default=900, help="no turn starts later")
    parser.add_argument("--commit", help="where git is missing")
    parser.add_argument("--out", type=Path, help="without suffix: .json and .md are written")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell is not None:
        take_turns(args.cell, args.folder, args)
        return
    networks = args.networks.split(",")
    if "braindecode" in args.networks:
        if args.braindecode is None:
            parser.error("braindecode needs --braindecode FILE")
        print(f"losses for the same weights differ by {same_loss(args):.1e}", flush=True)
    shapes = [tuple(map(int, text.split("x"))) for text in args.shapes.split(",")]
    cells = [
        {"network": network, "n_chans": c, "n_times": t, "batch": batch, "precision": precision, "devices": args.devices}
        for (c, t), batch in zip(shapes, map(int, args.batch_sizes.split(",")), strict=True)
        for precision in args.precisions.split(",")
        for network in networks
    ]
    # No path of the machine goes into a result.
    command = re.sub(r"(--(?:braindecode|out)) \S+", r"\1 FILE", " ".join(sys.argv[1:]))
    result = {"versions": versions(args.commit), "command": f"python benchmarks/training_speed.py {command}"} | measure(
        cells, args
    )
    print(table(result))
    if args.out is not None:
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(result))


def table(result: dict) -> str:
    """Return the medians as Markdown."""
    lines = [
        "# Pretraining speed",
        "",
        ", ".join(f"{k} {v}" for k, v in result["versions"].items()),
        "",
        f"`{result['command']}`",
        "",
        f"| {' | '.join(HEADINGS)} |",
        "| --- " * len(HEADINGS) + "|",
    ]
    names = ("n_chans", "n_times", "batch", "precision", "network")
    by_cell: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        by_cell.setdefault(tuple(row[n] for n in names), []).append(row)
    traces = {tuple(trace[n] for n in names): trace for trace in result["traces"]}
    speed = {key: median(r["samples_per_s"] for r in rows) for key, rows in by_cell.items()}
    for key, rows in by_cell.items():
        n_chans, n_times, batch, precision, network = key
        speeds = [r["samples_per_s"] for r in rows]
        baseline = speed.get((*key[:4], "braindecode"))
        trace = traces.get(key, {})
        columns = (
            f"{n_chans} x {n_times}",
            batch,
            precision,
            network,
            f"{speed[key]:.0f}",
            f"{min(speeds):.0f} to {max(speeds):.0f}",
            f"{median(r['ms_per_step'] for r in rows):.1f}",
            f"{trace['gpu_ms_per_step']:.1f}" if trace else "",
            f"{trace['kernels_per_step']:.0f}" if trace else "",
            f"{rows[-1]['peak_memory_mib'] or 0:.0f}",
            f"{speed[key] / baseline:.2f}" if baseline else "",
        )
        lines.append(f"| {' | '.join(map(str, columns))} |")
    lines += [
        f"\nFailed: {f['network']}, {f['n_chans']} x {f['n_times']}, {f['precision']}: {f['stage']}" for f in result["failures"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
