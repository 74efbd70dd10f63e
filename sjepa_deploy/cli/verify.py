"""``sjepa-verify``: judge a bundle again on this machine, without PyTorch."""

from __future__ import annotations

from pathlib import Path

import click
from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, parity_table, print_json
from sjepa_deploy.errors import BackendError, ParityError
from sjepa_deploy.parity import ParityResult, batch_sizes, check_parity
from sjepa_deploy.runtime.backend import BACKENDS, is_server, open_backend, why_not
from sjepa_deploy.spec import RUN_PRECISIONS, RunPrecision


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", "backends", multiple=True, help="Backend to judge; may be repeated.  [default: all that load here]")
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(RUN_PRECISIONS),
    multiple=True,
    help="Precision to judge (tf32 too); may be repeated.  [default: all graphs]",
)
@click.option("--json", "json_output", is_flag=True, help="Print the result as JSON.")
def verify(bundle: Path, backends: tuple[str, ...], precisions: tuple[RunPrecision, ...], json_output: bool) -> None:
    """Compare what BUNDLE gives on this machine with the float64 outputs that the export stored in it.

    The hashes of all files are checked first. The exit status is 1 if a backend differs by more than the tolerance.
    """
    screen = console(json_output)
    opened = Bundle.open(bundle)
    reference = opened.reference()
    results: list[ParityResult] = []
    left_out: dict[str, str] = {}
    for precision in sorted(set(precisions or opened.precisions), key=RUN_PRECISIONS.index):
        graph = opened.graph(precision)
        for name in backends or BACKENDS:
            known = name in BACKENDS or is_server(name)
            asked = not known or (backends and precisions)  # then it loads or this fails
            reason = None if asked else why_not(opened, name, precision)
            if reason is not None:
                left_out[f"{precision} on {name}"] = reason
                continue
            sizes = batch_sizes(graph.max_batch, graph.static_batch)
            with screen.status(f"{precision} on {name}"):
                backend = open_backend(opened, name, precision)
                result = check_parity(backend.run, reference, backend=name, precision=precision, sizes=sizes)
                backend.close()
            results.append(result)
    if not results:
        have = "; ".join(f"{what}: {reason}" for what, reason in left_out.items()) or f"it has {', '.join(opened.precisions)}."
        raise BackendError(f"Nothing in {bundle} could be judged: {have}", "Name another --backend or --precision.")
    passed = all(result.passed for result in results)
    screen.print(parity_table(tuple(results), f"{escape(str(bundle))}: parity on this machine"))
    for reason in dict.fromkeys(left_out.values()):
        what = ", ".join(name for name, its_reason in left_out.items() if its_reason == reason)
        screen.print(f"not judged: {what}. {escape(reason)}", soft_wrap=True)
    if json_output:
        print_json({"bundle": str(bundle), "passed": passed, "results": results, "not_judged": left_out})
    if not passed:
        raise ParityError(f"{bundle} does not give the reference outputs on this machine.", "Do not decode with what failed.")


main = entry("verify")
