"""Puts another bundle in the place of the one that decides, between two windows and without losing one."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sjepa_deploy.bundle import Bundle
from sjepa_deploy.errors import CommandError, ParityError, SjepaError, listed
from sjepa_deploy.parity import check_parity
from sjepa_deploy.runtime.backend import DEFAULT_BACKEND, BackendOptions
from sjepa_deploy.runtime.decisions.layer import DecisionLayer
from sjepa_deploy.runtime.decisions.stored import layers_of
from sjepa_deploy.runtime.live.calls import paced, warm_up
from sjepa_deploy.runtime.live.commands import Later, Load, Reply
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.exchange import check_exchange
from sjepa_deploy.runtime.predictor import Predictor, load
from sjepa_deploy.spec import RunPrecision

PAUSES = 3.0
"""Pause after a call of a model that is verified while another one decides, in times of the call."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Holds a model that may take the place of the one that decides: loaded, compared, verified and warmed up.

    Attributes
    ----------
    predict : Predictor
        The model.
    layer : DecisionLayer or None
        Its decision layer, where the one that decides has one.
    """

    predict: Predictor
    layer: DecisionLayer | None


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Says how bundles are opened.

    Attributes
    ----------
    backend, precision, options
        See `sjepa_deploy.load`.
    """

    backend: str = DEFAULT_BACKEND
    precision: RunPrecision | None = None
    options: BackendOptions = field(default_factory=BackendOptions)


def open_candidate(decoder: Decoder, path: Path, opening: Opening) -> Candidate:
    """Open a bundle that shall decide in place of that of `decoder`. May be called in another thread.

    Raises
    ------
    BundleError, BackendError, DecisionError
        If the bundle or its decision layer cannot be opened, or the backend cannot run it.
    StreamError
        If its contract is another one.
    ParityError
        If it does not give its reference outputs here.
    """
    bundle = Bundle.open(path)
    layer = _layer_like(bundle, decoder.layer)
    check_exchange(decoder.spec, bundle.spec, decoder.layer, layer)
    predict = load(
        bundle, backend=opening.backend, precision=opening.precision, options=opening.options, check_unit=False, non_finite="pass"
    )
    try:
        reference = bundle.reference()
        graph = bundle.graph(predict.backend.precision)
        result = check_parity(
            paced(predict.backend.run, PAUSES),
            reference,
            backend=predict.backend.name,
            precision=predict.backend.precision,
            sizes=(graph.static_batch or 1,),
        )
        if not result.passed:
            raise ParityError(f"{path} does not give its reference outputs with {predict.backend.name}.", "Export it again.")
        warm_up(predict, decoder.config, reference.inputs[:1], at_events=decoder.events is not None, pauses=PAUSES)
    except BaseException:
        predict.close()
        raise
    return Candidate(predict=predict, layer=layer)


def take_loads(decoder: Decoder, bundles: Mapping[str, Path], opening: Opening | None = None) -> None:
    """Let `decoder` obey `Load` for these bundles.

    A bundle is opened, verified and warmed up in a thread of its own, while windows are decided. Then it takes its place after a
    chunk of samples. A bundle that cannot take the place changes nothing, and the reply says why.

    Parameters
    ----------
    decoder : Decoder
        The decoder. It closes the bundles that it decided with.
    bundles : mapping of str to Path
        Bundles by the names that commands use. Their contract is compared when they are loaded.
    opening : Opening or None
        How they are opened.
    """
    decoder.commands.handle(Load, _Loader(decoder, dict(bundles), opening or Opening()).load)


class _Loader:
    def __init__(self, decoder: Decoder, bundles: dict[str, Path], opening: Opening) -> None:
        self._decoder, self._bundles, self._opening = decoder, bundles, opening
        self._busy = False

    def load(self, command: Load, asked: float) -> Later:
        """Open a bundle in a thread, and return what asks whether it is there."""
        path = self._bundles.get(command.bundle)
        if path is None:
            raise CommandError(
                f"No bundle was named {command.bundle[:100]!r} at the start.",
                f"There are: {listed(sorted(self._bundles)) or 'none'}.",
            )
        if self._busy:
            raise CommandError("Another bundle is being opened.", "Ask again when it decides.")
        self._busy = True
        found: list[Candidate | Exception] = []

        def work() -> None:
            try:
                found.append(open_candidate(self._decoder, path, self._opening))
            except SjepaError as e:
                found.append(e)
            except Exception as e:  # noqa: BLE001 a fault of the new bundle must not end the run of the old one
                found.append(CommandError(f"{path} cannot be opened ({type(e).__name__}: {e}).", "Look at the bundle."))

        thread = threading.Thread(target=work, name="load", daemon=True)
        thread.start()

        def finish() -> Reply | None:
            if thread.is_alive():
                return None
            self._busy = False
            (result,) = found
            if isinstance(result, Exception):
                raise result
            return self._swap(command.bundle, result)

        return finish

    def _swap(self, name: str, candidate: Candidate) -> Reply:
        decoder = self._decoder
        try:
            decoder.swap(candidate.predict, candidate.layer)
        except BaseException:
            candidate.predict.close()
            raise
        bundle = candidate.predict.bundle
        digest = bundle.manifest.digest
        return Reply(
            accepted=True,
            text=f"{name} ({digest[:12]}) decides from window {decoder.counters.windows} on.",
            data={
                "window": decoder.counters.windows,
                "bundle": str(bundle.path),
                "digest": digest,
                "backend": candidate.predict.backend.name,
                "precision": candidate.predict.backend.precision,
                "decisions": None if candidate.layer is None else candidate.layer.description.name,
            },
        )


def _layer_like(bundle: Bundle, layer: DecisionLayer | None) -> DecisionLayer | None:
    """Return the decision layer of a bundle that has the name of `layer`, or the only one; None if there is no `layer`."""
    if layer is None:
        return None
    name = layer.description.name
    return DecisionLayer.load(bundle, name if name in layers_of(bundle) else None)
