"""Markers from a process of their own: ``python lsl_marker_sender.py NAME KIND DELAY CONFIG``.

Pushes "go", or the number 7, every 0.4 s, stamped DELAY seconds before they are sent, until the process is killed.
"""

import sys
import time

import pylsl


def main(name, kind, delay, config):
    pylsl.set_config_content(config)
    outlet = pylsl.StreamOutlet(pylsl.StreamInfo(name, "Markers", 1, pylsl.IRREGULAR_RATE, kind, name))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        outlet.push_sample(["go" if kind == "string" else 7], pylsl.local_clock() - float(delay))
        time.sleep(0.4)


if __name__ == "__main__":
    main(*sys.argv[1:])
