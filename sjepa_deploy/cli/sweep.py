"""``sjepa-sweep`` runs a grid of pretrainings and fine-tunings, and prints one table."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from sjepa_deploy.cli import console, entry, options, print_json
from sjepa_deploy.cli.training import recipe_file, require_training


@options.recipe_command
@recipe_file
@options.out_folder(None)
@options.force
@options.json_output
def sweep(config_file: Path | None, *, out: Path, force: bool, json_output: bool) -> None:
    """Run a grid of base models, variants and ways of training, and print one table of their scores.

    The default is the grid of the paper on synthetic EEG: windows of 1, 4 and 16 s, masks of 40, 60 and 80 % of the head, three
    variants, frozen and full. Runs that are in --out are kept, unless --force: call the command again after a stop. sweep.tsv has
    a row for each fine-tuning.
    """
    require_training()
    from sjepa_deploy.learning.loop import read_config
    from sjepa_deploy.learning.sweep import SweepConfig, discard, summary
    from sjepa_deploy.learning.sweep import sweep as run

    screen = console(json_output)
    config = read_config(SweepConfig, config_file)
    if force:
        discard(out)
    rows = run(config, out, tell=lambda text: screen.print(escape(text), soft_wrap=True))
    found = summary(rows)
    table = Table(title=f"{found[0]['metric'].replace('_', ' ')} of test windows, over folds and seeds", title_justify="left")
    for heading in ("pipeline", "runs", "mean", "lowest", "highest"):
        table.add_column(heading, justify="left" if heading == "pipeline" else "right")
    for row in found:
        table.add_row(row["pipeline"], str(row["n"]), *(f"{row[name]:.3f}" for name in ("mean", "low", "high")))
    screen.print(table)
    if json_output:
        print_json({"rows": rows, "summary": found})


main = entry("sweep")
