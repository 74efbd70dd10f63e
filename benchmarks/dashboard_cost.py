"""Does a dashboard delay the decoder that it shows, whoever watches?

A loop of 129 channels wakes 100 times a second, holds the interpreter for 0.2 ms as a decoder does, and feeds a monitor. How late
it wakes is measured alone, and with a dashboard that nobody, 4 readers, 8 clients that never read, or a client that asks for
/metrics without a pause looks at; and beside the server as a thread of the loop's own process, which is how it is not built.

    python benchmarks/dashboard_cost.py --out benchmarks/results/dashboard_cost_MACHINE_DATE
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from machine import describe_machine, write_result

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.runtime.live.counters import Counters
from sjepa_deploy.runtime.live.decision import Decision
from sjepa_deploy.runtime.watch.dashboard import Dashboard
from sjepa_deploy.runtime.watch.described import describe, describe_state
from sjepa_deploy.runtime.watch.monitor import Monitor, resident_memory
from sjepa_deploy.runtime.watch.snapshot import StreamFacts

HOP = 0.01
CLIENT = """
import socket, sys, time
port, kind, n = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
def connect(path):
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.1\\r\\nHost: localhost\\r\\nConnection: close\\r\\n\\r\\n".encode())
    return client
if kind == "metrics":
    while True:
        with connect("/metrics") as client:
            while client.recv(2**16): pass
clients = [connect("/events") for _ in range(n)]
while True:
    if kind == "read":
        for client in clients: client.recv(2**20)
    else:
        time.sleep(1)
"""
CASES = {
    "no dashboard": (None, "", 0),
    "dashboard, nobody looks": ("process", "", 0),
    "4 readers": ("process", "read", 4),
    "8 clients that never read": ("process", "sleep", 8),
    "/metrics without a pause": ("process", "metrics", 1),
    "in a thread: 4 readers": ("thread", "read", 4),
    "in a thread: /metrics without a pause": ("thread", "metrics", 1),
}


def make_monitor() -> Monitor:
    montage = read_montage("GSN-HydroCel-129")
    facts = StreamFacts(
        bundle="bundle", bundle_hash="0" * 64, backend="none", source="none", ch_names=montage.ch_names,
        positions=montage.positions, sfreq=100.0, unit="uV", hop=HOP, deadline=HOP, overdue=9.0, output_names=("prediction",),
    )  # fmt: skip
    return Monitor(facts, Counters())


def run_loop(monitor: Monitor, seconds: float) -> np.ndarray:
    """Return how late each turn of the loop began, in seconds."""
    state, rms, value = np.zeros(129, np.uint8), np.ones(129), np.zeros(1, np.float32)
    start = time.monotonic()
    late = []
    for index in range(int(seconds / HOP)):
        due = start + index * HOP
        time.sleep(max(0.0, due - time.monotonic()))
        woken = time.monotonic()
        late.append(woken - due)
        while time.monotonic() < woken + 0.0002:
            pass
        monitor.received(due)
        monitor.set_quality(state, rms)
        monitor.decided(Decision(index, value, due, due + HOP, due, time.monotonic(), 0.0, False, False, ()))
    return np.array(late)


@contextlib.contextmanager
def serve_in_a_thread(monitor: Monitor) -> Iterator[int]:
    import uvicorn

    from sjepa_deploy.runtime.watch.dashboard_server import Feed, make_app

    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    servers = []

    async def serve() -> None:
        feed, pipe = Feed(describe(monitor.facts)), asyncio.StreamReader(limit=2**24)
        app = make_app(feed, token=None, port=port)
        server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_level="critical"))
        servers.append(server)

        async def feed_it() -> None:
            after = -1
            while True:
                snapshot = monitor.snapshot()
                pipe.feed_data(json.dumps(describe_state(snapshot, after)).encode() + b"\n")
                after = snapshot.n_noted
                await asyncio.sleep(0.25)

        tasks = [asyncio.create_task(feed_it()), asyncio.create_task(feed.read(pipe))]
        await server.serve(sockets=[listener])
        for task in tasks:
            task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    yield port
    servers[0].should_exit = True
    thread.join()


def measure(case: str, seconds: float) -> dict[str, object]:
    where, kind, n = CASES[case]
    monitor = make_monitor()
    with contextlib.ExitStack() as closing:
        port, server = 0, None
        if where == "process":
            dashboard = closing.enter_context(Dashboard(monitor, port=0))
            port, server = dashboard.port, dashboard
        elif where == "thread":
            port = closing.enter_context(serve_in_a_thread(monitor))
        run_loop(monitor, 2)
        if kind:
            command = [sys.executable, "-c", CLIENT, str(port), kind, str(n)]
            client = subprocess.Popen(["nice", "-n", "10", *command])
            closing.callback(client.wait)
            closing.callback(client.kill)
        run_loop(monitor, 1)
        memory, cpu = resident_memory(), time.process_time()
        late = run_loop(monitor, seconds) * 1e3
        grown, cpu = resident_memory() - memory, time.process_time() - cpu
        rss = 0
        if server is not None:
            statm = Path(f"/proc/{server.server_pid}/statm").read_text().split()
            rss = int(statm[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "case": case,
        "n": len(late),
        **{f"p{q}_ms": float(np.percentile(late, q)) for q in (50, 99)},
        "max_ms": float(late.max()),
        "loop_cpu_percent": 100 * cpu / seconds,
        "loop_memory_grown_MiB": grown / 2**20,
        "server_memory_MiB": rss / 2**20,
        "late_ms": [round(float(value), 4) for value in late],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="path without suffix; .json and .md are written")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each case")
    args = parser.parse_args()
    machine = describe_machine()
    sys.setswitchinterval(2e-4)  # as sjepa-stream does
    rows = [measure(case, args.seconds) for case in CASES]
    lines = [
        "How late a loop of 100 Hz wakes, in ms; CPU of its process in per cent of a core; memory in MiB.",
        "",
        "| watched by | turns | p50 | p99 | max | loop's CPU | loop's memory grew by | server's memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {r['case']} | {r['n']} | {r['p50_ms']:.2f} | {r['p99_ms']:.2f} | {r['max_ms']:.2f} "
            f"| {r['loop_cpu_percent']:.1f} | {r['loop_memory_grown_MiB']:.1f} | {r['server_memory_MiB']:.0f} |"
            for r in rows
        ),
    ]
    write_result(args.out, {"machine": machine, "rows": rows}, "\n".join(lines))


if __name__ == "__main__":
    main()
