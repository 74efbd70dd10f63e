"""``sjepa-verify`` judges a bundle again on this machine, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.cli import console, entry, options, parity_table, print_json, spec_lines
from sjepa_deploy.cli.doctor import engine_line
from sjepa_deploy.cli.help_page import is_verbose
from sjepa_deploy.cli.progress import Steps, progress
from sjepa_deploy.errors import BackendError, ParityError
from sjepa_deploy.parity import ParityResult, batch_sizes, check_parity
from sjepa_deploy.runtime.backend import BACKENDS, is_server, open_backend, why_not
from sjepa_deploy.runtime.backends.proofs import engine_states
from sjepa_deploy.spec import RUN_PRECISIONS, RunPrecision


@dataclass(frozen=True, kw_only=True)
class NotJudged:
    """Says which precision a backend cannot run on this machine, and why."""

    precision: RunPrecision
    backend: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Holds what a verification found.

    Attributes
    ----------
    bundle : str
        Folder of the bundle.
    passed : bool
        Whether every result is within its tolerance.
    results : tuple of ParityResult
        One for each backend and precision that was judged.
    not_judged : tuple of NotJudged
        What could not be judged.
    unproven : tuple of str
        Keys of the engines that were built for other machines and that nothing has judged yet.
    """

    bundle: str
    passed: bool
    results: tuple[ParityResult, ...]
    not_judged: tuple[NotJudged, ...]
    unproven: tuple[str, ...]


@options.command
@options.bundle
@options.section(options.BACKEND, options.backends, options.precisions)
@options.json_output
def verify(bundle: Path, backends: tuple[str, ...], precisions: tuple[RunPrecision, ...], json_output: bool) -> None:
    """Compare what BUNDLE gives on this machine with the float64 outputs that the export stored in it.

    The hashes of all files are checked first. The exit status is 1 if a backend differs by more than the tolerance.
    """
    screen = console(json_output)
    opened = Bundle.open(bundle)
    with progress("opening backends") as steps:
        found = _judge(opened, backends, precisions, steps)
    for line in spec_lines(opened.spec):
        screen.print(escape(line), soft_wrap=True)
    screen.print(parity_table(found.results, f"{escape(found.bundle)}: parity on this machine"))
    for line in _not_judged(found):
        screen.print(escape(line), soft_wrap=True)
    for state in engine_states(opened):
        if state.unproven:
            screen.print(escape(engine_line(state)), soft_wrap=True)
    if json_output:
        print_json(found)
    if not found.passed:
        raise ParityError(f"{bundle} does not give the reference outputs on this machine.", "Do not decode with what failed.")
    judged = [result.backend for result in found.results]
    screen.print(f"[bold green]verified:[/] {escape(', '.join(map(_right, *_counted(judged))))}", soft_wrap=True)


def _counted(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the different names, and how often each comes."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return tuple(counts), tuple(counts.values())


def _right(backend: str, n: int) -> str:
    return f"{n} graph{'s' * (n > 1)} right on {backend}"


def _not_judged(found: Verification) -> list[str]:
    """Return what was not judged in one line; with ``--verbose`` a line for each reason."""
    if not found.not_judged:
        return []
    if is_verbose():
        told = []
        for reason in dict.fromkeys(each.reason for each in found.not_judged):
            what = ", ".join(f"{each.precision} on {each.backend}" for each in found.not_judged if each.reason == reason)
            told.append(f"not judged: {what}. {reason}")
        return told
    judged = {result.backend for result in found.results}
    parts = [f"{each.precision} on {each.backend}" for each in found.not_judged if each.backend in judged]
    if others := dict.fromkeys(each.backend for each in found.not_judged if each.backend not in judged):
        parts.append(f"anything on {', '.join(others)}")
    return [f"not judged: {', '.join(parts)} (--verbose and --json tell why)"]


def _judge(bundle: Bundle, backends: tuple[str, ...], precisions: tuple[RunPrecision, ...], steps: Steps) -> Verification:
    """Judge the named backends and precisions; without names, all that run on this machine."""
    reference = bundle.reference()
    results: list[ParityResult] = []
    left_out: list[NotJudged] = []
    for precision in sorted(set(precisions or bundle.precisions), key=RUN_PRECISIONS.index):
        graph = bundle.graph(precision)
        for name in backends or BACKENDS:
            known = name in BACKENDS or is_server(name)
            asked = not known or (backends and precisions)  # then it loads or this fails
            reason = None if asked else why_not(bundle, name, precision)
            if reason is not None:
                left_out.append(NotJudged(precision=precision, backend=name, reason=reason))
                continue
            sizes = batch_sizes(graph.max_batch, graph.static_batch)
            steps.at(f"judging {precision} on {name}")
            backend = open_backend(bundle, name, precision)
            results.append(check_parity(backend.run, reference, backend=name, precision=precision, sizes=sizes))
            backend.close()
    if not results:
        reasons = "; ".join(f"{each.precision} on {each.backend}: {each.reason}" for each in left_out)
        have = reasons or f"it has {', '.join(bundle.precisions)}."
        raise BackendError(f"Nothing in {bundle.path} could be judged: {have}", "Name another --backend or --precision.")
    passed = all(result.passed for result in results)
    unproven = tuple(state.record.identity.key for state in engine_states(bundle) if state.unproven)
    return Verification(
        bundle=str(bundle.path), passed=passed, results=tuple(results), not_judged=tuple(left_out), unproven=unproven
    )


main = entry("verify")
