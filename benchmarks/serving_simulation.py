"""How many servers do 10,000 subjects at 10 windows a second need?

A simulation of queues with the times that were measured: each server has one queue, several models at work, batches, and the
limits that `plan_batching` gives it. Subjects choose a server at random and stay; their windows come with random phases and a
network of 1 ms and an exponential 1 ms each way. The number of servers is the smallest with which, in three draws, p99 over all
windows is below 50 ms and none is refused; first with all servers, then with one lost.

On a CPU a window takes what its cores had for each at the largest load that serving.py measured, so that Triton's share, and
what the host took away, are in it. With the generator's share it must give the load that was measured; without it, it is a
server that has its cores for itself. On a GPU the time is the host's of a call in gpu_engines.py; Triton's share is not known
there.

    python benchmarks/serving_simulation.py --measured benchmarks/results/serving_MACHINE_DATE
        --gpu benchmarks/results/gpu_engines_GPU_DATE --out benchmarks/results/serving_simulation_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.serving.batching import Batching, plan_batching

RATE = 10.0
DEADLINE = 0.05
SUBJECTS = 10_000
NETWORK = 0.001


@dataclass(frozen=True)
class Kind:
    """A kind of server."""

    name: str
    compute: Callable[[int], float]
    instances: int
    batching: Batching


def simulate(arrivals: np.ndarray, kind: Kind) -> np.ndarray:
    """Return when each arrival is answered; NaN where it is refused."""
    plan, done = kind.batching, np.full(len(arrivals), np.nan)
    seconds = [0.0] + [kind.compute(batch) for batch in range(1, plan.max_batch + 1)]
    free = [0.0] * kind.instances
    queue: deque[int] = deque()
    times, i, n = arrivals.tolist(), 0, len(arrivals)

    def take(until: float, most: float) -> None:
        nonlocal i
        while i < n and times[i] <= until and len(queue) < most:
            if len(queue) < plan.max_queue_size:
                queue.append(i)
            i += 1

    while queue or i < n:
        start = heapq.heappop(free)
        if not queue:
            start = max(start, times[i])
        take(start, float("inf"))
        while queue and start - times[queue[0]] > plan.queue_timeout:
            queue.popleft()
        if queue and len(queue) < plan.max_batch and plan.queue_delay:
            until = max(start, times[queue[0]] + plan.queue_delay)
            take(until, plan.max_batch)
            start = max(start, times[queue[-1]]) if len(queue) >= plan.max_batch else until
        batch = [queue.popleft() for _ in range(min(len(queue), plan.max_batch))]
        end = start + seconds[len(batch)]
        done[batch] = end
        heapq.heappush(free, end)
    return done


def serve(n_subjects: int, kind: Kind, rng: np.random.Generator, *, seconds: float = 4.0, in_step: bool = False) -> np.ndarray:
    """Return the latency of every window of `n_subjects` on one server, from due to answered; NaN where it is refused."""
    phases = np.zeros(n_subjects) if in_step else rng.uniform(0, 1 / RATE, n_subjects)
    due = (phases[:, None] + np.arange(round(seconds * RATE)) / RATE).ravel()
    arrivals = due + NETWORK + rng.exponential(NETWORK, len(due))
    order = np.argsort(arrivals)
    done = np.empty(len(due))
    done[order] = simulate(arrivals[order], kind)
    return done + NETWORK + rng.exponential(NETWORK, len(due)) - due


def kept(latencies: np.ndarray) -> bool:
    return not np.isnan(latencies).any() and float(np.percentile(latencies, 99)) < DEADLINE


def fleet(n_servers: int, kind: Kind, rng: np.random.Generator, **how: Any) -> Iterator[np.ndarray]:
    """Yield the latencies of each server's subjects, who chose among `n_servers` at random."""
    counts = rng.multinomial(SUBJECTS, np.full(n_servers, 1 / n_servers))
    return (serve(int(count), kind, rng, **how) for count in counts if count)


def draw(n_servers: int, kind: Kind, rng: np.random.Generator) -> np.ndarray | None:
    """Return the latencies of all subjects, None if `n_servers` do not suffice."""
    all_servers = []
    for latencies in fleet(n_servers, kind, rng):
        if np.isnan(latencies).any():
            return None
        all_servers.append(latencies)
    together = np.concatenate(all_servers)
    return together if kept(together) else None


def needed(low: int, kind: Kind, rng: np.random.Generator, *, lost: int) -> tuple[int, np.ndarray]:
    """Return the number of servers, at least `low` and to 2 %, that suffices in three draws with `lost` of them gone.

    The latencies of these draws come with it.
    """

    def latencies(n: int) -> np.ndarray | None:
        draws: list[np.ndarray] = []
        while n > lost and len(draws) < 3:
            if (drawn := draw(n - lost, kind, rng)) is None:
                return None
            draws.append(drawn)
        return np.concatenate(draws) if draws else None

    high = low = low - 1
    found = None
    while found is None:
        low, high = high, high + max(1, high // 4)
        found = latencies(high)
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        if (ran := latencies(middle)) is None:
            low = middle
        else:
            high, found = middle, ran
    return high, found


def rule(one_server: int) -> int:
    """Return the servers of the sizing rule in docs/operations.md: room for the luck of the draw, and one more."""
    return int(np.ceil(SUBJECTS / (one_server - 3 * np.sqrt(one_server)))) + 1 if one_server > 9 else SUBJECTS


def largest(test: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number in [low, high) that passes, by halving; low if none does."""
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if test(middle) else (low, middle)
    return low


def one_server(kind: Kind, rng: np.random.Generator) -> int:
    """Return how many subjects one server decodes, in three draws."""
    return largest(lambda n: all(kept(serve(n, kind, rng)) for _ in range(3)), 1, int(capacity(kind)) + 2)


def capacity(kind: Kind) -> float:
    """Return the subjects whose windows keep a server at work without a pause."""
    return kind.instances * kind.batching.max_batch / kind.compute(kind.batching.max_batch) / RATE


def size(kind: Kind, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    alone = one_server(kind, rng)
    n, all_up = needed(-(-SUBJECTS // alone), kind, rng, lost=0)
    spare, lost = needed(n, kind, rng, lost=1)
    in_step = np.concatenate(list(fleet(spare, kind, rng, seconds=3.0, in_step=True)))
    return {
        "kind": kind.name,
        "instances": kind.instances,
        "batching": asdict(kind.batching),
        "compute_ms": {str(b): kind.compute(b) * 1e3 for b in (1, kind.batching.max_batch)},
        "capacity": capacity(kind),
        "one_server": alone,
        "load": alone / capacity(kind),
        "servers": n,
        "p99_ms": float(np.percentile(all_up, 99)) * 1e3,
        "servers_with_one_spare": spare,
        "p99_ms_with_one_lost": float(np.percentile(lost, 99)) * 1e3,
        "servers_by_rule": rule(alone),
        "in_step_refused": float(np.isnan(in_step).mean()),
        "windows": len(all_up),
    }


def cpu_kinds(measured: dict[str, Any], *, with_generator: bool) -> list[Kind]:
    kinds = []
    for variant, rows in measured["rows"].items():
        row = rows["alone"]
        if not row["largest"]:
            continue
        best = row["at_largest"]
        share = 1.0 if with_generator else best["server_cpu_ms"] / (best["server_cpu_ms"] + best["generator_cpu_ms"])
        compute = share * row["instances"] / (RATE * row["largest"])
        plan = plan_batching(lambda _, c=compute: c, 1, deadline=DEADLINE, instances=row["instances"])
        kinds.append(Kind(f"{variant}, two cores", lambda _, c=compute: c, row["instances"], plan))
    return kinds


def check(measured: dict[str, Any], seed: int = 0) -> list[dict[str, Any]]:
    """Simulate what was measured: one server and the generator on the same cores."""
    rng = np.random.default_rng(seed)
    there = [rows["alone"]["largest"] for rows in measured["rows"].values() if rows["alone"]["largest"]]
    return [
        {"kind": kind.name, "measured": n, "simulated": one_server(kind, rng)}
        for n, kind in zip(there, cpu_kinds(measured, with_generator=True), strict=True)
    ]


def gpu_kinds(measured: dict[str, Any]) -> list[Kind]:
    """One GPU with a plan engine: the host times of a call in the engine benchmark; Triton's own cost is not in them."""
    kinds = []
    gpu = measured["tensorrt"]["results"]["machine"]["gpu"]["name"]
    for variant in ("prelocal", "postlocal", "contextual"):
        us = batch_us(measured["tensorrt"]["results"], f"latency {variant} tf32 [")

        def compute(batch: int, us: dict[int, float] = us) -> float:
            return float(np.interp(batch, list(us), list(us.values()))) / 1e6

        plan = plan_batching(compute, max(us), deadline=DEADLINE, instances=1)
        kinds.append(Kind(f"{variant}, {gpu} (tf32 engine)", compute, 1, plan))
    return kinds


def batch_us(results: dict[str, Any], start: str) -> dict[int, float]:
    """Return the median us of a call at each batch size, from the one way to call that gpu_engines.py measured batches with."""
    (row,) = (row for name, row in results.items() if name.startswith(start) and "batch_3" in row)
    larger = {int(name.removeprefix("batch_")): times["median"] for name, times in row.items() if name.startswith("batch_")}
    return {1: row["with_copy_to_pinned"]["median"]} | dict(sorted(larger.items()))


def table(rows: list[dict[str, Any]], checked: list[dict[str, Any]]) -> str:
    head = (
        *("server", "a run takes ms (batch)", "subjects on one server", "of its capacity", "servers", "p99 ms"),
        *("servers, one may fail", "by the rule", "p99 ms with one lost", "refused where all subjects are in step"),
    )
    lines = [
        f"{SUBJECTS} subjects at {RATE:g} windows a second; p99 below {DEADLINE * 1e3:g} ms from due to answered, none refused.",
        "",
        "| " + " | ".join(head) + " |",
        "| " + " | ".join(["---"] * len(head)) + " |",
    ]
    for r in rows:
        runs = ", ".join(f"{ms:.2f} ({batch})" for batch, ms in r["compute_ms"].items())
        cells = [r["kind"], runs, f"{r['one_server']}", f"{r['load']:.0%}", f"{r['servers']}", f"{r['p99_ms']:.0f}"]
        spare = [f"{r['servers_with_one_spare']}", f"{r['servers_by_rule']}", f"{r['p99_ms_with_one_lost']:.0f}"]
        lines.append("| " + " | ".join([*cells, *spare, f"{r['in_step_refused']:.0%}"]) + " |")
    said = (f"{each['kind']}: {each['simulated']} simulated, {each['measured']} measured" for each in checked)
    lines += ["", "Subjects on one server that shares its cores with the generator: " + "; ".join(said) + "."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measured", type=Path, required=True, help="result of serving.py, without suffix")
    parser.add_argument("--gpu", type=Path, required=True, help="result of gpu_engines.py, without suffix")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    args = parser.parse_args()
    read = [json.loads(path.with_name(path.name + ".json").read_text()) for path in (args.measured, args.gpu)]
    rows = [size(kind) for kind in (*cpu_kinds(read[0], with_generator=False), *gpu_kinds(read[1]))]
    checked = check(read[0])
    write_result(args.out, {"machine": describe_machine(), "rows": rows, "checked": checked}, table(rows, checked))


if __name__ == "__main__":
    main()
