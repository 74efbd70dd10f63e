"""Runs trainings that are killed (SIGKILL) in the middle of an epoch: ``killed_runs.py JSON`` with a list of jobs.

A job is {kind, config, out, epoch, resume}. Each is run in a process forked from this one, which imports once and computes
nothing itself.
"""

import json
import os
import signal
import sys

from sjepa_deploy.learning.finetune import FinetuneConfig, finetune
from sjepa_deploy.learning.loop import SeedEpochs
from sjepa_deploy.learning.pretrain import PretrainConfig, pretrain
from sjepa_deploy.serialize import decode

KINDS = {"pretrain": (PretrainConfig, pretrain), "finetune": (FinetuneConfig, finetune)}


def main() -> None:
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


if __name__ == "__main__":
    main()
