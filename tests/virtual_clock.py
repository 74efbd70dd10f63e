"""A clock that moves only when it is told to, for policies of time."""

from sjepa_deploy.runtime.keep_warm import Clock


class VirtualClock(Clock):
    """Time stands still but for `advance` and for waiting."""

    def __init__(self, now=0.0):
        super().__init__(spin=0.0)
        self._now = now

    def now(self):
        return self._now

    def advance(self, seconds):
        self._now += seconds

    def wait_until(self, due):
        self._now = max(self._now, due)
        return self._now
