"""Hands out an exported bundle: as a model card in a file, and as a repository of a model hub."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.card import LatencyFact, TaskFact, model_card, read_training
from sjepa_deploy.cli import options
from sjepa_deploy.cli.progress import progress
from sjepa_deploy.errors import MissingDependencyError
from sjepa_deploy.evaluation.task import read_tasks
from sjepa_deploy.runtime.machine import processor
from sjepa_deploy.runtime.predictor import load


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Says what of a bundle is handed out.

    Attributes
    ----------
    card : Path or None
        File of a model card.
    push : str or None
        Repository of a model hub, as in "org/name".
    private : bool
        Whether a repository that is made there is private.
    license_name : str or None
        License of the weights, for the card.
    """

    card: Path | None
    push: str | None
    private: bool
    license_name: str | None

    def check(self, *, force: bool, one_model: bool) -> None:
        """Check, before the export, that the bundle can be handed out."""
        if self.card is None and self.push is None:
            return
        if not one_model:
            raise click.UsageError("--card and --push are of one model: name its --variant.")
        options.check_file(self.card, "--card", force=force)
        if self.push is not None and importlib.util.find_spec("huggingface_hub") is None:
            raise MissingDependencyError("huggingface_hub", "hub")


publication = options.fills(
    "publication",
    Publication,
    click.option("--card", type=options.path, help="File of a model card to write, made from the manifest."),
    click.option("--push", metavar="ORG/NAME", help="Repository of Hugging Face to push the bundle and its card to."),
    options.rare(click.option("--private", is_flag=True, help="Make the repository of --push a private one.")),
    options.rare(click.option("--license", "license_name", help="License of the weights, for the card, as in bsd-3-clause.")),
    title=options.OUTPUT,
)
"""Hands a `Publication` to the command as ``publication``."""


def hand_out(screen: Console, bundle: Bundle, checkpoint: Path | None, publication: Publication) -> dict[str, Any]:
    """Write the card and push the bundle, where this is asked for, and return what ``--json`` prints of them."""
    if publication.card is None and publication.push is None:
        return {}
    from sjepa_deploy.models.hub import find_checkpoint  # needs PyTorch

    with progress("measuring a call"):
        latency = _measured(bundle)
    card = model_card(
        bundle,
        training=None if checkpoint is None else read_training(find_checkpoint(checkpoint).path),
        tasks=_scores(bundle),
        latency=[latency],
        license_name=publication.license_name,
    )
    told: dict[str, Any] = {}
    if publication.card is not None:
        publication.card.write_text(card, encoding="utf-8")
        told["card"] = str(publication.card)
    if publication.push is not None:
        from sjepa_deploy.export.to_hub import push

        with progress(f"pushing to {publication.push}"):
            told["pushed"] = push(bundle, publication.push, card, private=publication.private)
    for what, where in told.items():
        screen.print(f"[bold green]{what}:[/] {escape(where)}", soft_wrap=True)
    return told


def _scores(bundle: Bundle) -> list[TaskFact]:
    """Return the scores that were measured on recordings, in PyTorch and live."""
    return [
        TaskFact(
            metric=task.metric, n=task.n_events, where=way.name, value=way.score.value, low=way.score.low, high=way.score.high
        )
        for task in read_tasks(bundle)
        for way in task.ways
        if way.score is not None and way.name != "offline"
    ]


def _measured(bundle: Bundle, n_calls: int = 200) -> LatencyFact:
    """Return how long calls with one window take on this machine's CPU."""
    with load(bundle, check_unit=False) as predict:
        window = bundle.reference().inputs[:1]
        took = []
        for _ in range(n_calls):
            start = time.perf_counter()
            predict.predict(window)
            took.append((time.perf_counter() - start) * 1e6)
        p50, p99 = np.percentile(took[n_calls // 10 :], [50, 99])
        return LatencyFact(
            machine=processor(),
            backend=predict.backend.name,
            precision=predict.backend.precision,
            p50_us=float(p50),
            p99_us=float(p99),
        )
