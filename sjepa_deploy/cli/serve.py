"""``sjepa-serve`` serves bundles with Triton Inference Server."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from sjepa_deploy.bundle import MANIFEST_FILE, Bundle
from sjepa_deploy.cli import completion, console, entry, options, print_json
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.errors import ServingError, SjepaError, listed
from sjepa_deploy.export.to_triton import DEFAULT_DEADLINE, PLATFORMS, ServedModel, to_triton
from sjepa_deploy.serving.server import Server
from sjepa_deploy.spec import PRECISIONS, UNITS_IN_VOLTS

POLL = 0.5
"""Seconds between looks at the bundles and at the server."""


def _model(no_batching: bool, **values: Any) -> dict[str, Any]:
    return {"batched": not no_batching, **values}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Says how the server is started, see `sjepa_deploy.serving.server.Server`."""

    host: str
    grpc_port: int | None
    http_port: int | None
    metrics_port: int | None
    program: Path | None


@options.command
@click.argument("bundles", type=options.path, nargs=-1, required=True, shell_complete=completion.bundles)
@options.fills(
    "model",
    _model,
    click.option("--name", help="Name of the model, for a single bundle.  [default: sjepa-VARIANT]"),
    click.option("--platform", type=click.Choice(PLATFORMS), default="python", help="Runtime of the graph inside the server."),
    options.section(options.BACKEND, options.backend, options.precision),
    click.option("--deadline", type=float, default=DEFAULT_DEADLINE, help="Seconds to an answer; batches and queues follow."),
    click.option("--no-batching", is_flag=True, help="Run every request alone."),
    click.option("--instances", type=click.IntRange(min=1), help="Copies of the model at work.  [default: one on each core]"),
    click.option("--gpu", is_flag=True, help="Put the copies on the GPUs."),
    click.option(
        "--from-unit", type=click.Choice(list(UNITS_IN_VOLTS)), help="Take windows in this unit and any reference (an ensemble)."
    ),
    title="Model",
)
@options.section(
    "Server",
    click.option("--repository", type=options.path, help="Model repository to add to.  [default: a temporary one]"),
    click.option("--no-start", is_flag=True, help="Write the repository, and start no server."),
)
@options.fills(
    "server",
    ServerOptions,
    click.option("--host", default="127.0.0.1", help="Address to listen on."),
    click.option("--port", "grpc_port", type=int, help="Port for gRPC.  [default: a free one]"),
    click.option("--http-port", type=int, help="Port for HTTP.  [default: a free one]"),
    click.option("--metrics-port", type=int, help="Port for Prometheus.  [default: a free one]"),
    click.option("--tritonserver", "program", type=options.path, help="Server to run.  [default: the one that is installed]"),
    title="Server",
)
@options.json_output
def serve(
    bundles: tuple[Path, ...],
    *,
    model: dict[str, Any],
    repository: Path | None,
    no_start: bool,
    server: ServerOptions,
    json_output: bool,
) -> None:
    """Serve BUNDLES with Triton Inference Server until interrupted.

    A bundle that is exported again to the same place is loaded as the next version, without losing a request.
    """
    if model["name"] is not None and len(bundles) > 1:
        raise click.UsageError("--name names one model, and there are several bundles.")
    if model["precision"] not in (None, *PRECISIONS):
        raise click.UsageError(f"A server runs a graph as it is: use --precision {listed(PRECISIONS)}.")
    if no_start and repository is None:
        raise click.UsageError("--no-start needs --repository.")
    screen = console(json_output)
    with _folder(repository) as folder, contextlib.ExitStack() as closing:
        running = None
        if not no_start:  # a port that is taken is found before a model is added to the repository
            running = Server(folder, **dataclasses.asdict(server))
            closing.callback(running.close)
        watched = [_Watched(path, folder, model) for path in bundles]
        models = [each.add() for each in watched]
        for served in models:
            _report(screen, served)
        if running is None:
            if json_output:
                print_json({"repository": str(folder), "models": [_summary(served) for served in models]})
            return
        with _interrupts() as interrupted, contextlib.ExitStack() as started:
            with progress("starting tritonserver"):
                started.enter_context(running)
            for what, where in running.endpoints.items():
                screen.print(f"{what}: [bold]{escape(where)}[/]")
            for served in models:
                screen.print(f"Use it with: --backend triton:{escape(running.endpoints['grpc'])}/{served.name}")
            if json_output:
                print_json({"endpoints": running.endpoints, "models": [_summary(served) for served in models]})
            while not interrupted.wait(POLL):
                if running.process is None or running.process.poll() is not None:
                    raise ServingError("tritonserver ended.", "Start it again, and look for the reason with --tritonserver.")
                for each in watched:
                    _reload(screen, running, each)
            screen.print("stopping: the server answers the requests in work")


class _Watched:
    """Watches a bundle's folder, and tells whether the bundle was replaced since it was added to the repository."""

    def __init__(self, path: Path, repository: Path, options: dict[str, Any]) -> None:
        self._path, self._repository, self._options = path, repository, options
        self._seen: tuple[int, int] | None = None

    def changed(self) -> bool:
        """Return whether the manifest is another one than last time. A bundle is moved to its place as a whole."""
        return self._state() not in (None, self._seen)

    def add(self) -> ServedModel:
        """Add the bundle to the repository."""
        self._seen = self._state()
        return to_triton(Bundle.open(self._path), self._repository, **self._options)

    def _state(self) -> tuple[int, int] | None:
        try:
            stat = (self._path / MANIFEST_FILE).stat()
        except FileNotFoundError:  # between the two moves of a replacement
            return None
        return stat.st_ino, stat.st_mtime_ns


def _reload(screen: Console, server: Server, watched: _Watched) -> None:
    """Load a bundle that was replaced. An error is printed, and the version before goes on."""
    if not watched.changed():
        return
    try:
        model = watched.add()
        server.load(model.name)
    except SjepaError as e:
        screen.print(f"[bold yellow]not loaded:[/] {escape(str(e))}", soft_wrap=True)
    else:
        screen.print(f"{model.name}: version {model.version} is loaded")


@contextlib.contextmanager
def _folder(repository: Path | None) -> Iterator[Path]:
    if repository is not None:
        yield repository
        return
    with tempfile.TemporaryDirectory(prefix="sjepa-repository-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set."""
    event = threading.Event()
    before = {each: signal.signal(each, lambda *_: event.set()) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _report(screen: Console, model: ServedModel) -> None:
    plan = model.batching
    queue = f"{plan.max_queue_size} requests in the queue for up to {plan.queue_timeout * 1e3:.0f} ms"
    batches = f"batches of up to {plan.max_batch}, {plan.queue_delay * 1e3:.1f} ms of waiting for others"
    what = f"[bold]{model.name}[/] version {model.version} in {escape(str(model.repository))}"
    screen.print(f"{what}: {model.instances} at work, {batches}, {queue}", soft_wrap=True)


def _summary(model: ServedModel) -> dict[str, Any]:
    return dataclasses.asdict(model) | {"repository": str(model.repository)}


main = entry("serve")
