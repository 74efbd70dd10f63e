"""Finds, starts and stops a `tritonserver` on this machine, and lets the server load models."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sjepa_deploy.errors import MissingDependencyError, ServingError

INSTALL = "pip install --no-deps nvidia-pytriton==0.7.0"
"""Command that installs Triton: --no-deps, since only the server is used, and its Python half asks for NumPy 1."""

START_TIMEOUT = 120.0

# Runs the program in its arguments such that it ends (SIGTERM) when the process that started it does, however that ends.
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM);"
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True, kw_only=True)
class Installation:
    """An Installation says where a `tritonserver` and its parts are.

    Attributes
    ----------
    program : Path
        The binary.
    backends : Path or None
        Folder of its backends; None for where it looks itself.
    stub : Path or None
        What runs Python models, where it is not beside the Python backend.
    """

    program: Path
    backends: Path | None = None
    stub: Path | None = None


def find_server(program: Path | None = None) -> Installation:
    """Find `tritonserver`: the one that is named, on the path, in NVIDIA's containers, or in nvidia-pytriton.

    Raises
    ------
    ServingError
        If there is none, or nvidia-pytriton has none for this Python.
    """
    found = program or shutil.which("tritonserver") or Path("/opt/tritonserver/bin/tritonserver")
    if Path(found).is_file():
        return Installation(program=Path(found))
    package = importlib.util.find_spec("pytriton")
    if program is not None or package is None or package.origin is None:
        raise ServingError(
            f"There is no tritonserver {'at ' + str(program) if program else 'here'}.",
            f"Run this in NVIDIA's container, or install a server for CPUs with: {INSTALL}",
        )
    root = Path(package.origin).parent / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServingError(f"nvidia-pytriton runs no models in Python {version}.", "Use Python 3.10 to 3.13.")
    return Installation(program=root / "bin" / "tritonserver", backends=root / "backends", stub=stub)


class Server:
    """Runs a Triton server on this machine for one model repository, as a context manager.

    The server listens on `host` alone and ends with the process that started it. Models are loaded as they are at the start;
    `load` takes a new version over without losing a request.

    Parameters
    ----------
    repository : Path
        The model repository.
    host : str
        Address to listen on.
    grpc_port, http_port, metrics_port : int or None
        Ports; None for free ones, which stay the same when the server is started again.
    program : Path or None
        The `tritonserver` to run; None for the one that `find_server` finds.
    log : Path or None
        File for what it says; None for a temporary one.

    Raises
    ------
    ServingError
        If there is no `tritonserver`, or a port that is named is taken.
    MissingDependencyError
        If tritonclient is not installed.
    """

    def __init__(
        self,
        repository: Path,
        *,
        host: str = "127.0.0.1",
        grpc_port: int | None = None,
        http_port: int | None = None,
        metrics_port: int | None = None,
        program: Path | None = None,
        log: Path | None = None,
    ) -> None:
        if importlib.util.find_spec("tritonclient") is None:
            raise MissingDependencyError("tritonclient", "serve")
        self.repository, self.host = repository, host
        self._found = find_server(program)
        _check_ports(host, {"gRPC": grpc_port, "HTTP": http_port, "metrics": metrics_port})
        self._folder = Path(tempfile.mkdtemp(prefix="sjepa-serve-"))
        self.log = log or self._folder / "log.txt"
        self._ports = (grpc_port, http_port, metrics_port)
        self._choose_ports()
        self._prefix = f"sjepa-{os.getpid()}-{secrets.token_hex(4)}-"
        self.process: subprocess.Popen[bytes] | None = None

    def _choose_ports(self) -> None:
        free = iter(_free_ports(self.host, 3))
        self.grpc_port, self.http_port, self.metrics_port = (next(free) if port is None else port for port in self._ports)

    @property
    def endpoints(self) -> dict[str, str]:
        """Return the addresses on which the server listens."""
        return {
            "grpc": f"{self.host}:{self.grpc_port}",
            "http": f"http://{self.host}:{self.http_port}",
            "metrics": f"http://{self.host}:{self.metrics_port}/metrics",
        }

    def start(self, timeout: float = START_TIMEOUT) -> Server:
        """Start the server and wait until every model is ready.

        Raises
        ------
        ServingError
            If it ends, or is not ready in time. The message has its first error.
        """
        assert self.process is None, "the server runs already"
        ends = time.monotonic() + timeout
        while True:
            try:
                return self._start(ends)
            except _PortTakenError:  # between our look for a free one and the server's start
                self._choose_ports()

    def _start(self, ends: float) -> Server:
        said_before = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            # A session of its own: an interrupt in the terminal is for us, and we stop it. The kernel ties a child to the
            # thread that started it, so this must be one that lives as long as the server is to.
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
        while True:
            ready, ended = self.ready(), self.process.poll() is not None
            if ready and not ended:  # another server that has the port may answer for one that ended
                return self
            if ended or time.monotonic() > ends:
                said = self.log.read_bytes()[said_before:].decode(errors="replace")
                self.kill()
                if ended and "already in use" in said and None in self._ports and not said_before:
                    raise _PortTakenError
                why = "ended at once" if ended else "was not ready in time"
                raise ServingError(f"tritonserver {why}: {_first_error(said)}.", f"See its log in {self.log}.")
            time.sleep(0.05)

    def ready(self) -> bool:
        """Return whether the server runs and every model is ready."""
        with self._client() as (client, error):
            try:
                return bool(client.is_server_ready(client_timeout=1.0))
            except error:
                return False

    def load(self, name: str) -> None:
        """Load the newest version of the model `name`: the version takes over when it is ready, and the old one ends its work.

        Raises
        ------
        ServingError
            If it does not load. The version that was loaded before stays.
        """
        self._control(name, "load")

    def unload(self, name: str) -> None:
        """Unload the model `name` when its requests are done.

        Raises
        ------
        ServingError
            If the server refuses.
        """
        self._control(name, "unload")

    def stop(self, timeout: float = 30.0) -> None:
        """End the server gracefully: it takes no more requests and answers those that it has."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout)
        self.kill()

    def kill(self) -> None:
        """End the server at once, and everything that the server started."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        for left in Path("/dev/shm").glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop the server, and delete its temporary files."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Server:
        return self if self.process is not None else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _command(self) -> list[str]:
        settings = {
            "model-repository": self.repository,
            "model-control-mode": "explicit",
            "load-model": "*",
            "exit-timeout-secs": 20,
            "grpc-address": self.host,
            "grpc-port": self.grpc_port,
            "http-address": self.host,
            "http-port": self.http_port,
            "metrics-address": self.host,
            "metrics-port": self.metrics_port,
            "metrics-config": "summary_latencies=true",
            "backend-config": f"python,shm-region-prefix-name={self._prefix}",
        }
        if self._found.backends is not None:
            settings["backend-directory"] = self._backend_folder()
        options = (f"--{name}={value}" for name, value in settings.items())
        return [str(self._found.program), "--disable-auto-complete-config", *options]

    def _backend_folder(self) -> Path:
        """Make a folder of backends in which the Python backend has the stub of this Python beside it."""
        assert self._found.backends is not None
        assert self._found.stub is not None
        folder = self._folder / "backends" / "python"
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*(self._found.backends / "python").iterdir(), self._found.stub):
            link = folder / file.name
            if not link.exists():
                link.symlink_to(file)
        return folder.parent

    def _environment(self) -> dict[str, str]:
        """Return the environment in which Python models find this Python and its packages."""
        environment = dict(os.environ)
        if self._found.stub is not None:
            library = Path(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
            search = [str(library.parent)] if library.suffix != ".a" and library.is_file() else []
            search += filter(None, [environment.get("LD_LIBRARY_PATH")])
            environment["LD_LIBRARY_PATH"] = ":".join(search)
            environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
        return environment

    @contextlib.contextmanager
    def _client(self) -> Iterator[tuple[Any, Any]]:
        """Give a client of the server, and the kind of error that it raises."""
        grpc = importlib.import_module("tritonclient.grpc")
        client = grpc.InferenceServerClient(self.endpoints["grpc"])
        try:
            yield client, grpc.InferenceServerException
        finally:
            client.close()

    def _control(self, name: str, action: str) -> None:
        with self._client() as (client, error):
            try:
                getattr(client, f"{action}_model")(name, client_timeout=START_TIMEOUT)
            except error as e:
                why = _first_line(e.message())
                raise ServingError(f"The server does not {action} {name}: {why}.", f"See its log in {self.log}.") from e


def _check_ports(host: str, ports: dict[str, int | None]) -> None:
    """Refuse ports that are taken, before a server is started: tritonserver finds that out after it has loaded every model."""
    named = {what: port for what, port in ports.items() if port is not None}
    for what, port in named.items():
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            with socket.socket(family, kind, proto) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
                probe.bind(address)
        except (OSError, OverflowError) as e:
            why = os.strerror(e.errno or 0) if isinstance(e, OSError) and e.errno and e.errno > 0 else e
            raise ServingError(
                f"The server cannot listen on {host} port {port} for {what} ({why}).",
                "Name another port, or leave it out: a free one is taken.",
            ) from e
    for what, port in named.items():
        if others := [other for other in named if other != what and named[other] == port]:
            raise ServingError(f"Port {port} is named for {what} and for {others[0]}.", "Name a port for each of them.")


class _PortTakenError(Exception):
    """Says that a port that was free is taken now."""


def _first_error(said: str) -> str:
    """Return the first error in the log of a start."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith(("error", "E")) and "CudaDriverHelper" not in line]
    return _first_line((errors or lines or ["it said nothing"])[0])


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "no reason given"


def _free_ports(host: str, n: int) -> list[int]:
    """Return ports that nothing listens on now, outside of the range that the kernel gives to outgoing connections.

    A client that tries to reach a server that is being started again would otherwise take its port, by connecting to itself.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    for port in random.sample(range(10_000, low if low > 12_000 else 60_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            found.append(port)
        if len(found) == n:
            return found
    raise ServingError(f"There are no free ports on {host}.", "Check the address, or name the ports.")
