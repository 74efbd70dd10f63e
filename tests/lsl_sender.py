"""An amplifier in a process of its own: ``python lsl_sender.py NAME SOURCE_ID SFREQ UNIT LABEL,LABEL,... SEED CONFIG [FORMAT]``.

Pushes EEG until it is killed. An empty unit, or no labels, are not stated.
"""

import sys
import time

import numpy as np
import pylsl


def main(name, source_id, sfreq, unit, labels, seed, config, kind="float32"):
    pylsl.set_config_content(config)
    labels = labels.split(",")
    info = pylsl.StreamInfo(name, "EEG", len(labels), float(sfreq), kind, source_id)
    channels = info.desc().append_child("channels")
    for label in labels:
        channel = channels.append_child("channel").append_child_value("label", label)
        if unit:
            channel.append_child_value("unit", unit)
    outlet = pylsl.StreamOutlet(info)
    rng = np.random.default_rng(int(seed))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    started, i = time.monotonic(), 0
    while True:
        wait = started + i / float(sfreq) - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        outlet.push_sample(rng.normal(0, 20, len(labels)).astype(kind).tolist(), pylsl.local_clock())
        i += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
