"""Shows cues, and after each cue what the decoder made of it: PsychoPy beside a live decoder.

Start the decoder first. Cues are the events; its decisions come over the feedback socket:

    sjepa-stream my-bundle --source lsl:BioSemi --events left,right --markers lsl:Cues --feedback 127.0.0.1:8770
    python psychopy_trials.py --port 8770 left right

`Cues`, `DecoderClient` and `run_trial` need pylsl and the standard library alone, and no sjepa-deploy: take them into your own
program. `main` needs PsychoPy.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

SAME_EVENT_S = 0.005
"""Seconds by which the onset in a message may differ from the time of the marker: LSL corrects clocks by less."""


class DecoderClient:
    """Hears what a decoder decides, and asks the decoder for something.

    Parameters
    ----------
    port : int
        Port of JSON lines of ``--feedback``.
    host : str
        Address of the machine that decodes.
    token : str or None
        Its token, where it has one (``--token-file``).
    """

    def __init__(self, port: int = 8770, host: str = "127.0.0.1", token: str | None = None) -> None:
        self._socket = socket.create_connection((host, port), timeout=10)
        self._socket.settimeout(None)
        self._replies: queue.Queue[dict[str, Any]] = queue.Queue()
        self._answers: dict[str, list[dict[str, Any]]] = {}
        self._there = threading.Condition()
        self.ended = False
        self.run: dict[str, Any] = {}
        if token is not None:
            self._send({"token": token})
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        with self._there:
            if not self._there.wait_for(lambda: self.run or self.ended, 10) or self.ended:
                raise ConnectionError("The decoder does not answer: is the token right?")

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Ask the decoder for something, as ``ask("mark", text="block 2")``, and return its reply."""
        self._send({"command": command, **arguments})
        return self._replies.get(timeout=10)

    def answer(self, event: str, onset: float, timeout: float) -> dict[str, Any] | None:
        """Return the decision on an event, or why it has none ("undecided"); None if neither comes in time."""

        def found() -> dict[str, Any] | None:
            for message in self._answers.get(event, ()):
                if message["onset"] is not None and abs(message["onset"] - onset) < SAME_EVENT_S:
                    return message
            return None

        with self._there:
            self._there.wait_for(lambda: found() is not None or self.ended, timeout)
            return found()

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._socket.close()

    def _send(self, message: dict[str, Any]) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        with self._socket.makefile("rb") as lines, contextlib.suppress(OSError):
            for line in lines:
                message = json.loads(line)
                if message["type"] in ("reply", "error"):
                    self._replies.put(message)
                    continue
                with self._there:
                    if message["type"] == "run":
                        self.run = message
                    elif "event" in message:
                        self._answers.setdefault(message["event"], []).append(message)
                    self._there.notify_all()
        with self._there:
            self.ended = True
            self._there.notify_all()


class Cues:
    """Tells the decoder of cues: an LSL stream of markers.

    Parameters
    ----------
    name : str
        Name of the stream, which ``--markers lsl:NAME`` names too.
    """

    def __init__(self, name: str = "Cues") -> None:
        import pylsl

        self._clock = pylsl.local_clock
        self._outlet = pylsl.StreamOutlet(pylsl.StreamInfo(name, "Markers", 1, pylsl.IRREGULAR_RATE, "string", name))

    def wait_for_decoder(self, timeout: float) -> bool:
        """Wait until the decoder listens to the cues."""
        return bool(self._outlet.wait_for_consumers(timeout))

    def tell(self, cue: str) -> float:
        """Tell of a cue that is shown now, and return when that was, in seconds of LSL's clock."""
        onset = float(self._clock())
        self._outlet.push_sample([cue], onset)
        return onset


def run_trial(
    decoder: DecoderClient, cues: Cues, cue: str, show: Callable[[str], object], timeout: float
) -> dict[str, Any] | None:
    """Show a cue, tell the decoder of it, wait for the decision, and show the decision.

    Parameters
    ----------
    decoder : DecoderClient
        The decoder.
    cues : Cues
        The stream of cues.
    cue : str
        Name of the cue: an event of the decoder.
    show : callable
        Shows a text, and returns when it is on the screen.
    timeout : float
        Seconds to wait: the window after the cue, and some time for the decoder.

    Returns
    -------
    dict or None
        The message of the decoder; None if none came.
    """
    show(cue)
    message = decoder.answer(cue, cues.tell(cue), timeout)
    show(said(message))
    return message


def said(message: dict[str, Any] | None) -> str:
    """Return an answer in words: the class and its probability, or why there is none."""
    if message is None:
        return "no answer"
    if message["type"] == "undecided" or message.get("state", "decided") != "decided":
        return f"not yet ({message['reason']})"
    if "class" in message:
        return f"{message['class']} {message['probability']:.0%}"
    return ", ".join(f"{value:.3g}" for value in message["prediction"])  # a bundle without a decision layer


def main() -> None:
    """Run trials in a window of PsychoPy."""
    from psychopy import core, event, visual

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("cues", nargs="+")
    parser.add_argument("--port", type=int, default=8770)
    parser.add_argument("--trials", type=int, default=10)
    chosen = parser.parse_args()
    window = visual.Window(fullscr=False, color="black", units="height")
    text = visual.TextStim(window, height=0.1)

    def show(what: str) -> None:
        text.text = what
        text.draw()
        window.flip()  # returns when the text is on the screen

    cues, decoder = Cues(), DecoderClient(chosen.port)
    show("waiting for the decoder")
    cues.wait_for_decoder(30)
    decoder.ask("mark", text="trials begin")
    for _ in range(chosen.trials):
        show("+")
        core.wait(1.0 + random.random())
        run_trial(decoder, cues, random.choice(chosen.cues), show, timeout=5.0)
        core.wait(1.0)
        if event.getKeys(["escape"]):
            break
    decoder.ask("mark", text="trials end")
    time.sleep(0.5)
    decoder.close()
    window.close()


if __name__ == "__main__":
    main()
