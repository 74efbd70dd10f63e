"""Reads the hardware, software and present load of the machine: versions, processor, GPU, clocks, temperatures, load."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sjepa_deploy.errors import BackendError, MissingDependencyError
from sjepa_deploy.runtime.gpu.cuda import Device, driver_version

PACKAGES = (
    *("sjepa-deploy", "numpy", "onnxruntime", "onnxruntime-gpu", "torch", "onnx", "onnxscript", "safetensors", "mne", "pyxdf"),
    *("lightning", "tensorrt", "tensorrt-lean", "tensorrt-rtx", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "pylsl"),
    *("scipy", "starlette", "uvicorn", "prometheus-client", "tritonclient", "nvidia-pytriton", "braindecode"),
)

STAT = Path("/proc/stat")


@dataclass(frozen=True, kw_only=True)
class MachineState:
    """Holds clocks, temperatures and load of the machine before or after a cell; None where the system does not tell.

    Attributes
    ----------
    cpu_mhz : float or None
        Mean over the cores.
    load : float or None
        Load average of a minute.
    gpu_mhz, gpu_memory_mhz, gpu_celsius, gpu_watts : float or None
        What NVML says.
    """

    cpu_mhz: float | None = None
    load: float | None = None
    gpu_mhz: float | None = None
    gpu_memory_mhz: float | None = None
    gpu_celsius: float | None = None
    gpu_watts: float | None = None


NOT_READ = MachineState()
"""State of a machine that was not looked at."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Describes hardware and software.

    Attributes
    ----------
    processor, system : str
        As the system names them.
    python : tuple of str
        Its version; of merged runs those of all Pythons.
    cores : int
        That this process may use.
    versions : dict of str to tuple of str
        Of the packages that matter and are installed, likewise.
    commit : str or None
        Of the source tree that ran, where it is one.
    gpu, gpu_driver : str or None
        Name, compute capability and memory; version.
    governor : str or None
        CPU frequency governor.
    clock : str
        What timed, and its resolution.
    """

    processor: str
    cores: int
    system: str
    python: tuple[str, ...]
    versions: dict[str, tuple[str, ...]]
    commit: str | None = None
    gpu: str | None = None
    gpu_driver: str | None = None
    governor: str | None = None
    clock: str = ""


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Return the version of each package, or None where it is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # TensorRT and ONNX Runtime come under other names as well: what was imported tells.
        version: str | None = getattr(sys.modules.get(package.replace("-", "_")), "__version__", None)
        return version


def processor() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def n_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu(ordinal: int = 0) -> dict[str, str]:
    """Return the description of a GPU, or the reason why it cannot be used."""
    try:
        device = Device(ordinal)
        found = device.gpu
        device.close()
    except (BackendError, MissingDependencyError) as e:
        return {"GPU": f"none to use: {e.problem}", "driver": driver_version() or "none"}
    return {
        "GPU": f"{found.name}, compute capability {found.compute_capability}, {found.memory / 2**30:.0f} GiB",
        "driver": found.driver,
        "CUDA": found.cuda,
    }


def commit(folder: Path) -> str | None:
    """Return the commit of the checkout at `folder`, " with changes" where there are some; None where it is no checkout."""
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return found + (" with changes" if changed else "")


def environment(device: int = 0) -> Environment:
    """Return hardware and software of this process, and the GPU `device`."""
    graphics = gpu(device)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    resolution = time.get_clock_info("perf_counter")
    return Environment(
        processor=processor(),
        cores=n_cores(),
        system=platform.platform(),
        python=(platform.python_version(),),
        versions={name: (version,) for name, version in versions().items() if version is not None},
        commit=commit(Path(__file__).resolve().parents[1]),
        gpu=graphics["GPU"] if "CUDA" in graphics else None,
        gpu_driver=graphics["driver"] if "CUDA" in graphics else None,
        governor=governor.read_text().strip() if governor.is_file() else None,
        clock=f"perf_counter, {resolution.implementation}, resolution {resolution.resolution:g} s",
    )


class Nvml:
    """Asks NVML about one GPU. Every figure is None where NVML tells nothing (Jetson has none).

    Five functions are called through ctypes. Their interface has not changed since NVML 5, and the library comes with the driver.
    In their place `cuda.bindings.nvml` (13.5) reads temperatures by the newer ``nvmlDeviceGetTemperatureV``, and raises where
    this class returns None.

    Parameters
    ----------
    bus_id : str
        PCI bus of the GPU: NVML counts GPUs in another order than CUDA.
    """

    def __init__(self, bus_id: str) -> None:
        self._device = ctypes.c_void_p()
        try:
            self._library: ctypes.CDLL | None = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            self._library = None
        else:
            find = self._library.nvmlDeviceGetHandleByPciBusId_v2
            if self._library.nvmlInit_v2() or find(bus_id.encode(), ctypes.byref(self._device)):
                self._library = None

    def _ask(self, function: str, *arguments: int) -> int | None:
        if self._library is None:
            return None
        value = ctypes.c_ulonglong(0)  # wide enough for all, and little-endian for the narrow ones
        status = getattr(self._library, function)(self._device, *arguments, ctypes.byref(value))
        return None if status else value.value

    def joules(self) -> float | None:
        """Return the energy that the GPU took since its driver was loaded."""
        value = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if value is None else value / 1000

    def state(self) -> MachineState:
        """Return clocks, temperature and power."""
        watts = self._ask("nvmlDeviceGetPowerUsage")
        return MachineState(
            gpu_mhz=_float(self._ask("nvmlDeviceGetClockInfo", 1)),  # NVML_CLOCK_SM
            gpu_memory_mhz=_float(self._ask("nvmlDeviceGetClockInfo", 2)),
            gpu_celsius=_float(self._ask("nvmlDeviceGetTemperature", 0)),
            gpu_watts=None if watts is None else watts / 1000,
        )


def _float(value: int | None) -> float | None:
    return None if value is None else float(value)


def machine_state(nvml: Nvml | None) -> MachineState:
    """Return clocks, temperatures and load of the machine now."""
    found = nvml.state() if nvml is not None else MachineState()
    return MachineState(
        cpu_mhz=_cpu_mhz(),
        load=os.getloadavg()[0],
        gpu_mhz=found.gpu_mhz,
        gpu_memory_mhz=found.gpu_memory_mhz,
        gpu_celsius=found.gpu_celsius,
        gpu_watts=found.gpu_watts,
    )


def _cpu_mhz() -> float | None:
    files = list(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    known = [float(file.read_text()) / 1000 for file in files]
    cpuinfo = Path("/proc/cpuinfo")
    if not known and cpuinfo.is_file():
        known = [float(line.partition(":")[2]) for line in cpuinfo.read_text().splitlines() if line.startswith("cpu MHz")]
    return sum(known) / len(known) if known else None


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """Holds processor seconds since some start, over all cores.

    Attributes
    ----------
    at : float
        When, in seconds.
    own : float
        Of this process and its children that have ended.
    busy, stolen : float or None
        Of everything, and what the hypervisor gave to others. None where the system does not tell.
    """

    at: float
    own: float
    busy: float | None
    stolen: float | None

    @classmethod
    def now(cls) -> CpuTimes:
        """Return the processor seconds of now."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        if not STAT.is_file():
            return cls(at=time.perf_counter(), own=own, busy=None, stolen=None)
        user, nice, system, _idle, _wait, irq, softirq, stolen = map(float, STAT.read_text().splitlines()[0].split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        return cls(at=time.perf_counter(), own=own, busy=(user + nice + system + irq + softirq) / tick, stolen=stolen / tick)

    def others_since(self, before: CpuTimes) -> float | None:
        """Return how many cores other processes kept busy, on average."""
        if self.busy is None or before.busy is None:
            return None
        return max(0.0, (self.busy - before.busy) - (self.own - before.own)) / (self.at - before.at)

    def stolen_since(self, before: CpuTimes) -> float | None:
        """Return how many cores the hypervisor took, on average."""
        stolen = self.stolen_during(before)
        return None if stolen is None else stolen[0] / stolen[1]

    def stolen_during(self, before: CpuTimes) -> tuple[float, float] | None:
        """Return how many processor seconds the hypervisor took, and the seconds in which it did."""
        if self.stolen is None or before.stolen is None:
            return None
        return max(0.0, self.stolen - before.stolen), self.at - before.at
