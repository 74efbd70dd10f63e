"""Makes the recordings and the bundle of the tutorial once, for the examples that need a bundle which decodes.

Save this file beside the example. The recordings and the bundle are then made in the folder `FOLDER`, in about a minute.
"""

import contextlib
import io
from pathlib import Path

from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg.planted import planted_recording

FOLDER = Path(__file__).parent / "tutorial"

STEPS = (
    "finetune --data {folder}/session1_raw.fif --variant postlocal --classes left,right --tmin 0 --tmax 1.52 --max-epochs 15 "
    "--out {folder}/model --quiet",
    "export --checkpoint {folder}/model --precision fp32 --out {folder}/bundle --quiet",
)


def tutorial_folder() -> Path:
    """Return the folder with ``session1_raw.fif``, ``session2_raw.fif``, ``model`` and ``bundle``."""
    if not (FOLDER / "bundle").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            planted_recording(seed=number).save(FOLDER / f"session{number}_raw.fif", overwrite=True, verbose="error")
        for step in STEPS:
            with contextlib.redirect_stdout(io.StringIO()):
                assert run_command(group, "sjepa", step.format(folder=FOLDER).split()) == 0
    return FOLDER
