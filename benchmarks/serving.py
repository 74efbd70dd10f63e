"""How many subjects at 10 windows a second does one Triton server on this machine decode within 50 ms?

Streams with random phases send open loop, one window each 100 ms, each over a gRPC connection of its own on loopback; latency
counts from the time a window was due. The generator shares the processor with the server, and goes first; how late it is, and
what processor time it takes, is told apart. N grows until p99 passes the deadline or a window is refused, is narrowed down by
halving, and must hold in a longer run. Then 2N is sent for a while, and N/2 after it. Queue and compute time are the server's
own statistics. Where the processor is a virtual one, its host may take it away (`steal`).

    python benchmarks/serving.py --out benchmarks/results/serving_MACHINE_DATE [--only prelocal,contextual]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from grpc_load import Outcome, send_load
from machine import describe_machine, write_result
from tritonclient.grpc import service_pb2

import sjepa_deploy
from sjepa_deploy.bundle import Bundle, Provenance
from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.synthetic import eeg_windows
from sjepa_deploy.errors import ServingError
from sjepa_deploy.export.to_bundle import to_bundle
from sjepa_deploy.export.to_triton import to_triton
from sjepa_deploy.models.networks import build_model
from sjepa_deploy.serving import Client, Server
from sjepa_deploy.spec import ModelSpec

RATE = 10.0
DEADLINE = 0.05
VARIANTS = ("prelocal", "postlocal", "contextual")
METHOD = "/inference.GRPCInferenceService/ModelInfer"
SETTLE = 0.5  # seconds at the begin of a trial that its figures leave out
TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """What became of every window, and what the server and the machine did meanwhile."""

    due: np.ndarray
    outcome: Outcome
    server: dict[str, float]
    machine: dict[str, float]

    @property
    def refused(self) -> np.ndarray:
        return self.outcome.status != 0

    @property
    def latency(self) -> np.ndarray:
        return self.outcome.done - self.due

    def summary(self, begin: float = 0.0, end: float = math.inf) -> dict[str, Any]:
        """Return percentiles in ms over the windows that were due between `begin` and `end`; the rest is of the whole run."""
        chosen = (self.due >= begin) & (self.due < end)
        answered = chosen & ~self.refused
        from_due, from_sent = self.latency[answered] * 1e3, (self.outcome.done - self.outcome.sent)[answered] * 1e3
        late = (self.outcome.sent - self.due)[chosen] * 1e3
        known = len(from_due) > 0
        return {
            "windows": int(chosen.sum()),
            "refused": int((chosen & self.refused).sum()),
            "without_answer": int((chosen & (self.outcome.status < 0)).sum()),
            "p50_ms": float(np.percentile(from_due, 50)) if known else None,
            "p99_ms": float(np.percentile(from_due, 99)) if known else None,
            "max_ms": float(from_due.max()) if known else None,
            "p99_from_sent_ms": float(np.percentile(from_sent, 99)) if known else None,
            "generator_late_p99_ms": float(np.nanpercentile(late, 99)),
            **self.server,
            **self.machine,
        }


class Load:
    """Streams that send one window each 1/RATE seconds."""

    def __init__(self, server: Server, model: str, spec: ModelSpec, n_kinds: int = 32) -> None:
        self._server, self._model = server, model
        self._requests = []
        for i, eeg in enumerate(eeg_windows(n_kinds, *spec.input_shape, spec.sfreq, np.random.default_rng(0))):
            request = service_pb2.ModelInferRequest(model_name=model, id=str(i))
            request.inputs.add(name=spec.input_name, datatype="FP32", shape=(1, *spec.input_shape))
            request.raw_input_contents.append(eeg.astype(np.float32).tobytes())
            self._requests.append(request.SerializeToString())

    def run(self, phases: list[tuple[int, float]], seed: int = 0) -> Ran:
        """Run phases of (streams, seconds) one after another."""
        rng = np.random.default_rng(seed)
        due, streams, begin = [], [], 0.0
        for n, seconds in phases:
            offsets = np.sort(rng.uniform(0, 1 / RATE, n))
            due.append((begin + np.arange(round(seconds * RATE))[:, None] / RATE + offsets).ravel())
            streams.append(np.tile(np.arange(n), round(seconds * RATE)))
            begin += seconds
        times = np.concatenate(due)
        server, machine = self._statistics(), self._processor()
        outcome = send_load(self._server.endpoints["grpc"], METHOD, self._requests, times, np.concatenate(streams))
        time.sleep(0.1)  # the server counts a request after it has answered it
        server, machine = (_since(a, b) for a, b in ((self._statistics(), server), (self._processor(), machine)))
        n = max(1.0, server["requests"])
        of_cores = machine["wall_s"] * (os.cpu_count() or 1)
        return Ran(
            due=times,
            outcome=outcome,
            server={
                "answered": int((outcome.status == 0).sum()),
                "answered_by_server": server["requests"],
                "server_ms": server["server_ns"] / n / 1e6,
                "queue_ms": server["queue_ns"] / n / 1e6,
                "compute_ms": server["compute_ns"] / n / 1e6,
                "mean_batch": server["windows"] / max(1.0, server["runs"]),
            },
            machine={
                "server_cpu_ms": machine["server_s"] / len(times) * 1e3,
                "generator_cpu_ms": outcome.generator_s / len(times) * 1e3,
                "busy": machine["busy_s"] / of_cores,
                "steal": machine["steal_s"] / of_cores,
            },
        )

    def _statistics(self) -> dict[str, float]:
        with self._server._client() as (client, _):
            (stats,) = client.get_inference_statistics(self._model).model_stats
        s = stats.inference_stats
        return {
            "requests": s.success.count,
            "windows": stats.inference_count,
            "runs": stats.execution_count,
            "server_ns": s.success.ns,
            "queue_ns": s.queue.ns,
            "compute_ns": s.compute_input.ns + s.compute_infer.ns + s.compute_output.ns,
        }

    def _processor(self) -> dict[str, float]:
        """Return seconds of the clock, of the server's processes, of all processes, and of what the host took away."""
        assert self._server.process is not None
        server = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._server.process.pid:  # the group
                    server += int(fields[11]) + int(fields[12])
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        busy = user + nice + system + irq + softirq
        return {"wall_s": time.perf_counter(), "server_s": server / TICK, "busy_s": busy / TICK, "steal_s": steal / TICK}

    @contextlib.contextmanager
    def watched_queue(self) -> Iterator[list[int]]:
        """Give a list that gets the length of the queue ten times a second."""
        lengths: list[int] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.1):
                text = urlopen(self._server.endpoints["metrics"], timeout=10).read().decode()
                found = re.findall(rf'nv_inference_pending_request_count{{[^}}]*model="{self._model}"[^}}]*}} (\d+)', text)
                lengths.extend(map(int, found))

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield lengths
        finally:
            ended.set()
            thread.join()


def _since(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in now.items()}


class Search:
    """The search for the largest number of streams that keeps the deadline, with every trial."""

    def __init__(self, load: Load, seconds: float) -> None:
        self._load, self._seconds = load, seconds
        self.trials: list[dict[str, Any]] = []

    def largest(self, start: int) -> tuple[int, dict[str, Any]]:
        """Return the largest number, 0 if there is none, and the figures of the longer run that confirmed it."""
        low, high = 0, start
        while self._kept(high):
            low, high = high, max(high + 1, round(high * 1.3))
        while high - low > max(1, low // 16):
            middle = (low + high) // 2
            low, high = (middle, high) if self._kept(middle) else (low, middle)
        for step in range(1, 6):
            if low and self._kept(low, longer=4, tries=1):
                return low, self.trials[-1]
            low = max(0, min(low - 1, round(low * 0.93**step)))
        return 0, {}

    def _kept(self, n: int, *, longer: int = 1, tries: int = 2) -> bool:
        """Whether `n` streams keep the deadline, in one of `tries`: the machine may not be ours alone."""
        for _ in range(tries):
            ran = self._load.run([(n, self._seconds * longer)], seed=len(self.trials))
            row = {"streams": n, "seconds": self._seconds * longer, **ran.summary(begin=SETTLE)}
            self.trials.append(row)
            print(json.dumps({name: round(value, 3) for name, value in row.items() if value is not None}), flush=True)
            time.sleep(0.3)
            if row["refused"] == 0 and row["p99_ms"] < DEADLINE * 1e3:
                return True
        return False


def overload(load: Load, n: int) -> dict[str, Any]:
    """Send 2N streams for 4 s, then N/2 for 3 s. The load ends with the last window of the first phase that is really sent."""
    with load.watched_queue() as lengths:
        ran = load.run([(2 * n, 4.0), (max(1, n // 2), 3.0)], seed=1)
    sent, done = ran.outcome.sent, ran.outcome.done
    end = max(4.0, float(np.nanmax(sent[ran.due < 4.0])))
    bad = (sent > end) & (ran.refused | (done - sent > DEADLINE))
    return {
        "streams": 2 * n,
        "during": ran.summary(begin=SETTLE, end=4.0),
        "after": ran.summary(begin=end),
        "longest_queue": max(lengths),
        "recovered_after_s": float(np.nanmax(done[bad] - end, initial=0.0)),
        "messages": ran.outcome.messages,
    }


def one_client(bundle: Bundle, server: Server, model: str, n: int = 500) -> dict[str, dict[str, float]]:
    """Time single windows back to back: here, over the wire, through shared memory."""
    eeg = eeg_windows(1, *bundle.spec.input_shape, bundle.spec.sfreq, np.random.default_rng(0))
    local = sjepa_deploy.load(bundle, n_threads=1)
    address = f"{server.endpoints['grpc']}/{model}"
    rows = {}
    with local, Client(address) as wire, Client(address, shared_memory=True) as shared:
        for name, call in (("local", local), ("triton", wire), ("triton-shm", shared)):
            samples = []
            for i in range(n + 50):
                start = time.perf_counter()
                call(eeg)
                if i >= 50:
                    samples.append(time.perf_counter() - start)
            rows[name] = {f"p{q}_ms": float(np.percentile(samples, q)) * 1e3 for q in (50, 99)}
    return rows


def measure(variant: str, seconds: float) -> dict[str, Any]:
    montage = read_montage("GSN-HydroCel-129")
    spec = ModelSpec.of(
        variant=variant, n_chans=129, n_times=200, sfreq=100.0, ch_names=montage.ch_names, positions=montage.positions
    )
    with tempfile.TemporaryDirectory() as name:
        weights = Provenance(source="random", format="initialisation", seed=0)
        bundle = to_bundle(build_model(spec, seed=0), Path(name) / "bundle", weights=weights, precisions=("fp32",))
        rows: dict[str, Any] = {}
        for batched in (True, False):
            repository, kind = Path(name) / f"batched-{batched}", "batched" if batched else "alone"
            try:
                model = to_triton(bundle, repository, name=variant, batched=batched, deadline=DEADLINE)
            except ServingError as e:  # two runs do not fit into the deadline: nobody is served
                rows[kind] = {"largest": 0, "why": str(e)}
                continue
            with Server(repository) as server:
                assert server.process is not None
                os.setpriority(os.PRIO_PGRP, server.process.pid, 5)  # subjects do not wait for the server's processor
                load = Load(server, variant, spec)
                load.run([(4, 1.0)])
                one = one_client(bundle, server, variant)
                search = Search(load, seconds)
                start = max(2, int(0.25 * model.instances / (one["triton"]["p50_ms"] / 1e3) / RATE))
                n, best = search.largest(start)
                rows[kind] = {
                    "batching": vars(model.batching),
                    "instances": model.instances,
                    "largest": n,
                    "at_largest": best,
                    "overload": overload(load, n) if n else None,
                    "one_client": one,
                    "trials": search.trials,
                }
    return rows


AT_LARGEST = ("p50_ms", "p99_ms", "queue_ms", "compute_ms", "mean_batch", "server_cpu_ms", "generator_cpu_ms")


def table(rows: dict[str, Any]) -> str:
    cells = [(variant, row) for variant, kinds in rows.items() for row in kinds.values()]
    found = [(variant, row) for variant, row in cells if row["largest"]]
    lines = [
        "Two copies of the model, one thread each, on the two cores that the generator uses too. 129 channels x 200 samples.",
        "",
        *_lines(
            (
                *("variant", "batches up to", "streams with p99 < 50 ms", "without the generator's share", "p50 ms", "p99 ms"),
                *("queue ms", "compute ms"),
                *(
                    "mean batch",
                    "server's processor time ms a window",
                    "generator's",
                    "generator late, p99 ms",
                    "cores busy",
                    "steal",
                ),
            ),
            [
                (
                    variant,
                    f"{row['batching']['max_batch']}",
                    f"{row['largest']}",
                    f"{row['largest'] * (1 + row['at_largest']['generator_cpu_ms'] / row['at_largest']['server_cpu_ms']):.0f}",
                    *(f"{row['at_largest'][name]:.2f}" for name in AT_LARGEST),
                    f"{row['at_largest']['generator_late_p99_ms']:.1f}",
                    *(f"{row['at_largest'][name]:.0%}" for name in ("busy", "steal")),
                )
                if row["largest"]
                else (variant, "", "none", *[""] * 11)
                for variant, row in cells
            ],
        ),
        *(f"\n{variant}: {row['why']}" for variant, row in cells if "why" in row),
        "",
        "Twice as many for 4 s, then half as many:",
        "",
        *_lines(
            (
                *("variant", "batches up to", "streams", "refused", "without an answer", "longest queue (its limit)"),
                *("the rest, mean ms in the server", "in the queue", "p99 from sent ms", "generator late, p99 ms", "steal"),
                *("recovered after s", "p99 ms after it", "refused after it"),
            ),
            [
                (
                    variant,
                    f"{row['batching']['max_batch']}",
                    f"{over['streams']}",
                    f"{over['during']['refused'] / over['during']['windows']:.0%}",
                    f"{over['during']['without_answer']}",
                    f"{over['longest_queue']} ({row['batching']['max_queue_size']})",
                    *(f"{over['during'][name]:.1f}" for name in ("server_ms", "queue_ms", "p99_from_sent_ms")),
                    f"{over['during']['generator_late_p99_ms']:.0f}",
                    f"{over['during']['steal']:.0%}",
                    f"{over['recovered_after_s']:.2f}",
                    f"{over['after']['p99_ms']:.1f}",
                    f"{over['after']['refused']}",
                )
                for variant, row in found
                if (over := row["overload"])
            ],
        ),
        "",
        "What the server said when it refused: " + _messages(row["overload"] for _, row in found) + ".",
        "",
        "One client, one window after another, p50 (p99) in ms:",
        "",
        *_lines(
            ("variant", "here", "triton:", "triton-shm:"),
            [
                (variant, *(f"{r['p50_ms']:.2f} ({r['p99_ms']:.2f})" for r in kinds["alone"]["one_client"].values()))
                for variant, kinds in rows.items()
                if "one_client" in kinds["alone"]
            ],
        ),
    ]
    return "\n".join(lines)


def _lines(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]


def _messages(overloads: Iterator[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for over in overloads:
        for said, n in over["messages"].items():
            message = re.sub(r"^\[request id: [^]]*\] ", "", said)
            counts[message] = counts.get(message, 0) + n
    return ", ".join(f"{message!r} ({n})" for message, n in counts.items()) or "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    parser.add_argument("--only", help="variants, separated by commas; those in --out stay")
    parser.add_argument("--seconds", type=float, default=3.5, help="length of a trial")
    args = parser.parse_args()
    file = args.out.with_suffix(".json")
    rows = json.loads(file.read_text())["rows"] if args.only and file.is_file() else {}
    machine = describe_machine()
    for variant in (args.only or ",".join(VARIANTS)).split(","):
        rows[variant] = measure(variant, args.seconds)
        rows = {name: rows[name] for name in VARIANTS if name in rows}
        write_result(args.out, {"machine": machine, "rows": rows}, table(rows))


if __name__ == "__main__":
    main()
