"""Decodes a record again and compares the decisions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from sjepa_deploy.errors import StreamError
from sjepa_deploy.runtime.live.decoder import Decoder
from sjepa_deploy.runtime.live.recorder import Record, RecordSource
from sjepa_deploy.runtime.predictor import Predictor


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Says how a record compares with its own samples decoded again.

    Attributes
    ----------
    record : str
        Path of the record.
    backend, precision : str
        What decoded it again.
    n_samples, n_decisions : int
        Samples and decisions in the record, without decisions that repeat another.
    differ : tuple of int
        Windows whose predictions are not the same bits.
    missing : tuple of int
        Windows that were decided in the record and not again.
    n_cut_off : int
        Decisions at the end of a record that was killed whose samples are not in it, so that they are not compared.
    """

    record: str
    backend: str
    precision: str
    n_samples: int
    n_decisions: int
    differ: tuple[int, ...]
    missing: tuple[int, ...]
    n_cut_off: int

    @property
    def passed(self) -> bool:
        """Return whether all decisions came again with the same bits."""
        return not (self.differ or self.missing)


def replay(predict: Predictor, record: Record) -> Replay:
    """Decode the samples of a record again, in the chunks in which they were received, and compare every decision to the bit.

    Parameters
    ----------
    predict : Predictor
        The bundle of the record, loaded with `check_unit=False` on the backend and in the precision of the record.
    record : Record
        See `read_record`.

    Raises
    ------
    StreamError
        If the record was made with another bundle.
    """
    run = record.run
    if run.bundle_digest != predict.bundle.manifest.digest:
        raise StreamError(f"{record.path} was decoded with another bundle ({run.bundle}).", "Name that bundle.")
    # What was late then is decoded now, and not compared; whole windows give the bits that new samples alone gave.
    config = dataclasses.replace(run.config, late="queue", roll=False)
    decoder = Decoder(predict, RecordSource(record), config)
    again = {decision.index: decision.prediction for decision in decoder}
    return Replay(
        record=str(record.path),
        backend=predict.backend.name,
        precision=predict.backend.precision,
        n_samples=decoder.counters.samples,
        n_decisions=len(record.decisions),
        differ=tuple(i for i, was in record.decisions.items() if i in again and again[i].tobytes() != was.tobytes()),
        missing=tuple(i for i in record.decisions if i not in again),
        n_cut_off=record.n_cut_off,
    )
