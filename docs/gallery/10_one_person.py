"""
Fit a model to one person
=========================

The electrodes of another person sit elsewhere, and the response comes later. Some labelled trials
of the person bring the score back.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tutorial_bundle import tutorial_folder

import sjepa_deploy
from sjepa_deploy.cli import group, run_command
from sjepa_deploy.eeg import prepare
from sjepa_deploy.eeg.planted import planted_recording

folder = Path(tempfile.mkdtemp())
bundle = tutorial_folder() / "bundle"


def person(seed):
    """Return a recording of a person whose channels are mixed, and whose response is weaker."""
    raw = planted_recording(seed=seed)
    mixing = np.eye(8)[[1, 0, 3, 2, 4, 5, 6, 7]]  # the sources on the front have the other orientation
    return raw.apply_function(lambda data: mixing @ data, channel_wise=False, verbose="error")


person(11).save(folder / "session_raw.fif", verbose="error")

# %%
# The last layer is fitted in closed form to the trials. The command prints the learning curve, and
# writes nothing if the bundle gets no better.
command = (
    f"calibrate {bundle} --data {folder}/session_raw.fif --classes left=left,right=right --out {folder}/mine --allow-worse -q"
)
run_command(group, "sjepa", command.split())


# %%
# Judge both bundles on another recording of the person.
def score(path):
    """Return the share of right decisions."""
    with sjepa_deploy.load(path) as predict:
        prepared = prepare(person(12), predict.spec.signal)
        outputs = np.concatenate([predict(part) for part in np.array_split(prepared.eeg, 4)])
        names = [predict.spec.class_names[number] for number in outputs.argmax(axis=1)]
    return np.mean([name == truth for name, truth in zip(names, prepared.events.description, strict=True)])


scores = {"of others": score(bundle), "of this person": score(folder / "mine")}
print(scores)
figure, axis = plt.subplots(figsize=(4, 3.2), layout="constrained")
axis.bar(list(scores), list(scores.values()), width=0.5)
axis.axhline(0.5, color="gray", linewidth=0.8)
axis.set(ylabel="share of right decisions", ylim=(0, 1))
plt.show()
