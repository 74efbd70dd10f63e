"""Records runs that are killed (SIGKILL) at random moments, and replays what is left.

``killed_recordings.py N BUNDLE FOLDER`` prints one line of JSON: how many of N records are read, how many decisions they hold,
and how many of these differ when they are decoded again. Every record that holds a sample must be read. In every second run the
recorder writes all the time instead of once a second, so that the kill falls into a write.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import sjepa_deploy
from sjepa_deploy.errors import RecordingError
from sjepa_deploy.runtime.live import recorder as recorder_module
from sjepa_deploy.runtime.live.config import StreamConfig
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorder import record
from sjepa_deploy.runtime.live.records import read_record
from sjepa_deploy.runtime.live.replay import replay


def decode_until_killed(bundle: Path, path: Path, started: Path, *, restless: bool) -> None:
    """Decode and record a synthetic stream, three times as fast as the clock, at every sample."""
    if restless:
        recorder_module.FLUSH_S = 0.001
    config = StreamConfig(hop=0, late="queue")
    with Decoder.open(bundle, "synthetic", config, speed=3.0) as decoder:
        recorder = record(decoder, path)
        decoder.on_decision(lambda _: started.touch() if not started.exists() else None)
        decoder.run()
        recorder.close()


def main() -> None:
    """Kill N runs, and then replay them: a process that has a session is not to be forked."""
    n, bundle, folder = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    rng = random.Random(0)
    for i in range(n):
        path, started = folder / f"{i}.xdf", folder / f"{i}.started"
        child = os.fork()
        if not child:
            decode_until_killed(bundle, path, started, restless=i % 2 == 1)
            os._exit(0)
        while not started.exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended by itself"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 2.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = {"kills": n, "read": 0, "without_a_sample": 0, "decisions": 0, "differ": 0, "missing": 0, "cut_off": 0}
    with sjepa_deploy.load(bundle, check_unit=False) as predict:
        for i in range(n):
            try:
                recorded = read_record(folder / f"{i}.xdf")
            except RecordingError:
                assert (folder / f"{i}.xdf").stat().st_size < 500, f"run {i} holds samples and is not read"
                said["without_a_sample"] += 1
                continue
            result = replay(predict, recorded)
            said["read"] += 1
            said["decisions"] += result.n_decisions
            said["differ"] += len(result.differ)
            said["missing"] += len(result.missing)
            said["cut_off"] += result.n_cut_off
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
