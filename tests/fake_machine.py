"""A machine with a fake GPU and a fake TensorRT, and what its engines should give."""

from __future__ import annotations

import dataclasses

from fake_gpu import FakeDriver, Faults, fake_tensorrt

import sjepa_deploy
from sjepa_deploy.errors import MissingDependencyError
from sjepa_deploy.runtime.backend import BACKENDS
from sjepa_deploy.runtime.backends import tensorrt_api
from sjepa_deploy.runtime.gpu import cuda


class Rig:
    """A fake machine, with TensorRT and, on request, TensorRT-RTX, or with the lean runtime of TensorRT alone."""

    def __init__(self, monkeypatch, version="11.4.0", **gpu):
        self.monkeypatch = monkeypatch
        self.faults = Faults()
        self.set(version, **gpu)

    def set(self, version="11.4.0", driver_version="580.1", rtx=False, lean=False, **gpu):
        self.driver = FakeDriver(**gpu)
        module = fake_tensorrt(version, self.driver, self.faults, rtx=rtx, lean=lean)

        def load(flavour, runs_only):
            if lean and not runs_only:
                raise MissingDependencyError("tensorrt", "gpu")
            return module

        self.monkeypatch.setattr(cuda, "driver", lambda: self.driver)
        self.monkeypatch.setattr(cuda, "driver_version", lambda: driver_version)
        self.monkeypatch.setattr(tensorrt_api, "_load", load)
        self.monkeypatch.setattr(tensorrt_api, "_LOGS", {})
        for name in ("tensorrt", "tensorrt-rtx"):
            self.monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], package="numpy"))


def eeg(bundle, n):
    return bundle.reference().inputs[:n].copy()


def outputs(bundle, precision, windows):
    with sjepa_deploy.load(bundle, precision=precision, backend="ort-cpu", check_unit=False) as predict:
        return predict(windows).copy()
