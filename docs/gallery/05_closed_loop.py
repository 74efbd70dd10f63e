"""
A closed loop in Python
=======================

A program acts on each decision as soon as the decision is there. This example moves a cursor by the
decisions of a stream.

The module :download:`tutorial_bundle.py <tutorial_bundle.py>` makes the recordings and the bundle. Save the module
beside this example.
"""

import matplotlib.pyplot as plt
import numpy as np
from tutorial_bundle import tutorial_folder

import sjepa_deploy
from sjepa_deploy.runtime.live.schedule import Events

folder = tutorial_folder()

# %%
# A recording stands for the amplifier, as fast as possible. For an amplifier write ``"lsl:NAME"``
# and ``markers=["lsl:Stimuli"]``.
cursor, path, asked, ages = 0, [0], [], []
with sjepa_deploy.Decoder.open(
    folder / "bundle",
    f"file:{folder}/session2_raw.fif",
    schedule=Events(("left", "right")),
    markers=["annotations"],
    speed=float("inf"),
) as decoder:
    for decision in decoder:
        left, right = decision.prediction
        cursor += 1 if right > left else -1  # here your program acts
        path.append(cursor)
        asked.append(1 if decision.event.description == "right" else -1)
        ages.append(decision.age)
print(decoder.counters.decisions, "decisions of", decoder.counters.events, "events")

# %%
# The cursor follows what the events asked for.
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
axis.plot(np.concatenate([[0], np.cumsum(asked)]), label="what the events ask for", color="gray")
axis.plot(path, label="cursor")
axis.set(xlabel="event", ylabel="position")
axis.legend()
plt.show()
