"""The options of the feedback socket, which `sjepa-stream` takes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import options
from sjepa_deploy.runtime.feedback.feedback import FEEDBACK, Feedback, read_token
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.swap import Opening, take_loads


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedbackChoice:
    """Says where other programs hear decisions and command the decoder.

    Attributes
    ----------
    feedback : str or None
        HOST:PORT of the socket; None serves none.
    token_file : Path or None
        File with the token.
    feedback_origin : tuple of str
        Origins of web pages that may connect.
    dareplane : bool
        Whether Dareplane's primary commands are taken.
    allow_load : tuple of str
        "NAME=BUNDLE": bundles that the command `load` may name.
    """

    feedback: str | None
    token_file: Path | None
    feedback_origin: tuple[str, ...]
    dareplane: bool
    allow_load: tuple[str, ...]

    @property
    def bundles(self) -> dict[str, Path]:
        """Return the bundles that may be loaded, by their names."""
        pairs = [each.partition("=") for each in self.allow_load]
        if wrong := [name + equals + path for name, equals, path in pairs if not (name and path)]:
            raise click.UsageError(f"{wrong[0]!r} is no NAME=BUNDLE.")
        return {name: Path(path) for name, _, path in pairs}

    def check(self) -> None:
        """Refuse options of a socket that is not served, and bundles that are not there."""
        if self.feedback is None and (self.token_file is not None or self.feedback_origin or self.dareplane or self.allow_load):
            raise click.UsageError("--token-file, --feedback-origin, --dareplane and --allow-load need --feedback HOST:PORT.")
        for path in self.bundles.values():
            Bundle.open(path)

    @contextlib.contextmanager
    def served(self, decoder: Decoder, screen: Console, opening: Opening) -> Iterator[Feedback | None]:
        """Serve the socket while the context lasts, and tell its ports. Bundles that are loaded are opened as `opening` says."""
        if self.feedback is None:
            yield None
            return
        host, port = FEEDBACK.parse(self.feedback)
        token = None if self.token_file is None else read_token(self.token_file)
        if self.allow_load:
            take_loads(decoder, self.bundles, opening)
        with Feedback(
            decoder, host=host, port=port, token=token, origins=self.feedback_origin, dareplane=self.dareplane
        ) as feedback:
            ports = ", ".join(f"{kind} on port {number}" for kind, number in feedback.ports.items())
            screen.print(f"feedback socket on {host}: {ports}", soft_wrap=True, markup=False)
            yield feedback


choice = options.fills(
    "socket",
    FeedbackChoice,
    click.option(
        "--feedback",
        metavar="HOST:PORT",
        help="Serve decisions to other programs, and take their commands: JSON lines on this port, WebSocket on the next one.",
    ),
    options.rare(
        click.option(
            "--token-file", type=options.path, help="File with a token that clients must send; WebSocket always needs one."
        )
    ),
    options.rare(
        click.option(
            "--feedback-origin",
            type=options.Names(),
            default=(),
            metavar="URL,...",
            help="Origins of web pages that may connect, beside those of this machine.",
        )
    ),
    options.rare(
        click.option(
            "--dareplane", is_flag=True, help="Take Dareplane's primary commands too, on the port after that, from this machine."
        )
    ),
    options.rare(
        click.option(
            "--allow-load",
            type=options.Names(),
            default=(),
            metavar="NAME=BUNDLE,...",
            help="Bundles that clients may put in the place of BUNDLE while it decodes, by these names.",
        )
    ),
    title=options.OUTPUT,
)
