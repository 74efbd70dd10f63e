"""``sjepa-pretrain`` learns a base model from unlabelled EEG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.cli.training import require_training, shape_of, telling, training_options
from sjepa_deploy.serialize import overridden


def _learning(mask: str | None, radius: float | None, clip: float | None, **values: Any) -> dict[str, Any]:
    return {"masking.mode": mask, "masking.radius": radius, "engine.gradient_clip": clip, **values}


@options.recipe_command
@training_options
@options.fills(
    "learning",
    _learning,
    click.option(
        "--mask",
        type=click.Choice(["block", "fixed"]),
        help="How channels are hidden: blocks by radius, or the author's fixed sizes.",
    ),
    click.option("--radius", type=float, help="Radius of a block in head radii: 0.4, 0.6 and 0.8 in the paper."),
    options.rare(click.option("--target-layers", type=int, help="Number of the teacher's last layers whose mean is the target.")),
    options.rare(click.option("--warmup-steps", type=int, help="Steps over which the learning rate rises from 0.")),
    options.rare(click.option("--clip", type=float, help="Largest norm of the gradient.")),
    options.rare(click.option("--ema-start", type=float, help="Momentum of the teacher at the start.")),
    options.rare(click.option("--ema-end", type=float, help="Momentum of the teacher at the end.")),
    options.rare(click.option("--ema-steps", type=int, help="Steps over which the momentum rises.")),
    title="Learning",
)
def pretrain(
    config_file: Path | None,
    *,
    out: Path,
    force: bool,
    resume: bool,
    changes: dict[str, Any],
    learning: dict[str, Any],
    json_output: bool,
) -> None:
    """Pretrain a base model, by default on synthetic EEG, and write its checkpoint into --out."""
    require_training()
    from sjepa_deploy.learning.loop import is_first_process, read_config
    from sjepa_deploy.learning.pretrain import PretrainConfig
    from sjepa_deploy.learning.pretrain import pretrain as run

    config = overridden(read_config(PretrainConfig, config_file), changes | learning)
    screen = console(json_output)
    result = run(config, out, resume=resume, replace=force, **telling(screen))
    if not is_first_process():
        return
    fitted = result.fitted
    screen.print(
        f"{result.n_train} windows learned from, {result.n_val} of other {result.split}s validated on: L1 "
        f"[bold]{result.val_l1:.4f}[/] at epoch {fitted.best_epoch + 1} of {fitted.epochs}, "
        f"{result.val_l1_mean:.4f} for the mean embedding; spread {result.spread:.3f}"
    )
    screen.print(f"base model, {shape_of(result.spec)}, in [bold]{escape(str(out))}[/]")
    if json_output:
        print_json({"out": str(out), "result": result})


main = entry("pretrain")
