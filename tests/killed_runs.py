"""Runs trainings that are killed (SIGKILL).

``killed_runs.py JSON`` kills in chosen epochs: a job of the list is {kind, config, out, epoch, resume}.
``killed_runs.py --random N FOLDER`` kills fine-tuning N times at random moments, and resumes each run until it ends. Every end
must have the weights of a run that was not killed, and no kill may leave a model that loads with others. FOLDER gets the runs.

Each run is a process forked from this one, which imports once and computes nothing itself.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from small import FINETUNE

from sjepa_deploy.errors import SjepaError
from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loop import SeedEpochs
from sjepa_deploy.learning.pretrain import PretrainConfig, pretrain
from sjepa_deploy.serialize import decode

KINDS = {"pretrain": (PretrainConfig, pretrain), "finetune": (FinetuneConfig, finetune)}


def main() -> None:
    if sys.argv[1] == "--random":
        kill_at_random(int(sys.argv[2]), Path(sys.argv[3]))
        return
    for job in json.loads(sys.argv[1]):
        child = os.fork()
        if not child:

            def kill(self, trainer, module, *args, at=job["epoch"]):
                if trainer.current_epoch == at:
                    os.kill(os.getpid(), signal.SIGKILL)

            SeedEpochs.on_train_batch_end = kill  # after the first step of that epoch
            config_class, run = KINDS[job["kind"]]
            run(decode(config_class, job["config"]), job["out"], resume=job["resume"])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{job['kind']} was not killed: status {status}"


def start(out: Path, resume: bool) -> int:
    """Start a run as a user does who looks whether there is one to go on with, and return its process."""
    child = os.fork()
    if not child:
        try:
            finetune(FINETUNE, out, resume=resume)
        except SjepaError as e:
            sys.stderr.write(f"refused: {e}\n")
            os._exit(2)
        os._exit(0)
    return child


def weights_of(out: Path) -> bytes | None:
    """Return the weights of the model in `out`, or None where no whole model is."""
    files = out / "model.safetensors", out / "config.json"
    return files[0].read_bytes() if all(file.exists() for file in files) else None


def kill_at_random(n_kills: int, folder: Path) -> None:
    began = time.monotonic()
    _, status = os.waitpid(start(folder / "whole", resume=False), 0)
    assert status == 0
    lasts, expected = time.monotonic() - began, weights_of(folder / "whole")
    draw = random.Random(0)
    killed = runs = 0
    while killed < n_kills:
        out, ended, of_this_run = folder / f"run{runs}", False, 0
        runs += 1
        while not ended:
            child = start(out, resume=(out / "training/run.json").exists())
            if killed < n_kills and of_this_run < 4:
                time.sleep(draw.uniform(0, lasts))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += os.WIFSIGNALED(status)
            of_this_run += os.WIFSIGNALED(status)
            ended = not os.WIFSIGNALED(status)
            assert weights_of(out) in (None, expected), f"{out} holds other weights"
        assert status == 0, f"the run in {out} ended with status {os.waitstatus_to_exitcode(status)}"
        assert weights_of(out) == expected
        assert not list(out.rglob(".partial-*")), "a killed process left a file behind"
    sys.stdout.write(f"{killed} kills of {runs} runs: each ended with the weights of a run that was not killed\n")


if __name__ == "__main__":
    main()
