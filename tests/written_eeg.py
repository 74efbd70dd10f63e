"""Writes recordings of every format that is read, of EEG that is known.

Each real recording has a stand-in of the same name, format, rate and length, with as many channels of the same names.

Writers that are not this project's write the files (edfio, pybv, eeglabio, SciPy, MNE), so that the arrays which went in are an
oracle for what comes out. There is no maintained writer of XDF: `xdf_writer` follows its specification.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import edfio
import eeglabio
import mne
import numpy as np
import pybv
import scipy.io
from eeg_files import mne_template
from xdf_writer import Stream, write_xdf

from sjepa_deploy.eeg.montage import read_montage
from sjepa_deploy.eeg.synthetic import eeg_windows

EEGLAB_32 = [
    "FPz", "EOG1", "F3", "Fz", "F4", "EOG2", "FC5", "FC1", "FC2", "FC6", "T7", "C3", "C4", "Cz", "T8", "CP5", "CP1",
    "CP2", "CP6", "P7", "P3", "Pz", "P4", "P8", "PO7", "PO3", "POz", "PO4", "PO8", "O1", "Oz", "O2",
]  # fmt: skip
TEN_TWENTY_16 = [
    "Fp1", "Fp2", "T3", "T4", "T5", "T6", "F7", "F8", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2",
]  # fmt: skip
BRAINVISION_29 = [
    "Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "F7", "F8", "T7", "T8", "P7", "P8", "Fz", "Cz", "Pz",
    "FC1", "FC2", "CP1", "CP2", "FC5", "FC6", "CP5", "CP6", "TP9", "TP10",
]  # fmt: skip
MUSE_4 = ("TP9", "AF7", "AF8", "TP10")


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """What went into a file.

    Attributes
    ----------
    path : Path
        The file.
    volts : array, shape (n_chans, n_samples)
        Its EEG in volts, float64.
    ch_names : tuple of str
        Its EEG channels as a reader shall name them.
    sfreq : float
        Rate in Hz.
    resolution : float
        Largest error in volts that the numbers of the format allow.
    events : tuple of (float, str)
        Onset in seconds, on a sample, and description.
    """

    path: Path
    volts: np.ndarray
    ch_names: tuple[str, ...]
    sfreq: float
    resolution: float
    events: tuple[tuple[float, str], ...] = ()


def make_eeg(n_chans: int, n_samples: int, sfreq: float, seed: int, offset: float = 0.0) -> np.ndarray:
    """Return 1/f noise with an alpha rhythm and electrode offsets of up to `offset`, in volts."""
    rng = np.random.default_rng(seed)
    microvolts = eeg_windows(1, n_chans, n_samples, sfreq, rng)[0].astype(np.float64)
    return microvolts * 1e-6 + rng.uniform(-offset, offset, (n_chans, 1))


def write(name: str, folder: Path) -> Written:
    """Write the recording `name` into `folder`: one of `WRITERS`, or a run of p300/."""
    return (write_oddball if name.startswith("p300/") else WRITERS[name])(folder / name)


def write_eeglab(path: Path, ch_names: list[str], ch_locs: np.ndarray, volts: np.ndarray, sfreq: float, events=()) -> Written:
    """Write an EEGLAB pair: a .set whose samples are in a .fdt, as EEGLAB itself saves it. The .set is eeglabio's."""
    annotations = None
    if events:
        onsets, texts = zip(*events, strict=True)
        annotations = [list(texts), np.array(onsets), np.zeros(len(events))]
    eeglabio.raw.export_set(path, volts, sfreq, ch_names, ch_locs, annotations)
    content = {name: value for name, value in scipy.io.loadmat(path).items() if not name.startswith("__")}
    path.with_suffix(".fdt").write_bytes(content["data"].astype("<f4").tobytes("F"))
    scipy.io.savemat(path, content | {"data": path.with_suffix(".fdt").name})
    resolution = float(np.abs(volts).max()) * 2.0**-23
    return Written(path=path, volts=volts, ch_names=tuple(ch_names), sfreq=sfreq, resolution=resolution, events=tuple(events))


def on_a_sphere(places: np.ndarray) -> np.ndarray:
    """Return `places` moved to a sphere of 85 mm about 0, as EEGLAB has its channels."""
    centre = np.linalg.lstsq(np.column_stack([2 * places, np.ones(len(places))]), (places**2).sum(axis=1), rcond=None)[0][:3]
    return 0.085 * (places - centre) / np.linalg.norm(places - centre, axis=1, keepdims=True)


def write_reaction_times(path: Path) -> Written:
    """80 stimuli, most of them with a key press between 0.25 and 1 s later."""
    places = mne_template("colin27_1005").get_positions()["ch_pos"]
    places |= {"FPz": places["Fpz"], "EOG1": places["AF9"], "EOG2": places["AF10"]}
    ch_locs = on_a_sphere(np.array([places[name] for name in EEGLAB_32]))
    rng, events = np.random.default_rng(80), []
    for sample in np.arange(80) * 370 + 500 + rng.integers(0, 60, 80):
        events.append((float(sample) / 128, "square"))
        if rng.random() < 0.93:
            events.append((float(sample + rng.integers(32, 128)) / 128, "rt"))
    volts = make_eeg(32, 30504, 128.0, 1)
    return write_eeglab(path, EEGLAB_32, ch_locs, volts, 128.0, events)


def write_hydrocel(path: Path) -> Written:
    """One second of a HydroCel net of 129 channels, with the offsets of an amplifier that is coupled to DC."""
    names = [f"E{i}" for i in range(1, 130)]
    places = np.array(read_montage("GSN-HydroCel-129").positions)
    return write_eeglab(path, names, places, make_eeg(129, 501, 500.0, 2, offset=0.02), 500.0)


def write_edf(path: Path) -> Written:
    """EDF with the standard's labels, "EEG Fp1", in microvolts of 16 bits."""
    volts = make_eeg(16, 15360, 256.0, 3)
    signals = [
        edfio.EdfSignal(row * 1e6, 256.0, label=f"EEG {name}", physical_dimension="uV", physical_range=(-300.0, 300.0))
        for name, row in zip(TEN_TWENTY_16, volts, strict=True)
    ]
    edfio.Edf(signals).write(path)
    return Written(path=path, volts=volts, ch_names=tuple(TEN_TWENTY_16), sfreq=256.0, resolution=300e-6 / 65535)


def write_bdf(path: Path) -> Written:
    """BDF of 24 bits with offsets, as BioSemi records, and a status channel, which is no EEG."""
    volts = make_eeg(16, 15360, 256.0, 4, offset=0.02)
    names = tuple(f"A{i}" for i in range(1, 17))
    signals = [
        edfio.BdfSignal(row * 1e6, 256.0, label=name, physical_dimension="uV", physical_range=(-262144.0, 262143.0))
        for name, row in zip(names, volts, strict=True)
    ]
    status = np.zeros(15360)
    whole = (-8388608, 8388607)
    signals.append(edfio.BdfSignal(status, 256.0, label="Status", physical_range=whole, digital_range=whole))
    edfio.Bdf(signals).write(path)
    return Written(path=path, volts=volts, ch_names=names, sfreq=256.0, resolution=0.52 / 2**24)


def write_brainvision(path: Path) -> Written:
    """BrainVision of float32 with 15 markers, and three channels of the eyes, which are no EEG."""
    volts = make_eeg(29, 2112, 200.0, 5)
    samples = np.arange(15) * 130 + 107
    eog = make_eeg(3, 2112, 200.0, 55)
    numbers = np.tile([4, 1, 2], 5)
    pybv.write_brainvision(
        data=np.vstack([volts, eog]),
        sfreq=200.0,
        ch_names=[*BRAINVISION_29, "HEOGL", "HEOGR", "VEOGb"],
        fmt="binary_float32",
        fname_base=path.stem,
        folder_out=path.parent,
        events=np.column_stack([samples, numbers]),
    )
    header = path.read_text(encoding="utf-8").replace("NumberOfChannels=32", "NumberOfChannels=32\nDataPoints=2112")
    path.write_text(header, encoding="utf-8")  # as the maker's own software does, and pybv does not
    events = tuple((float(s) / 200, f"Stimulus/S  {n}") for s, n in zip(samples, numbers, strict=True))
    resolution = float(np.abs(volts).max()) * 2.0**-23
    return Written(path=path, volts=volts, ch_names=tuple(BRAINVISION_29), sfreq=200.0, resolution=resolution, events=events)


def write_lsl(path: Path) -> Written:
    """A recording of LSL without labels and units: 8 channels of microvolts at 1000 Hz, and a stream of markers."""
    volts = make_eeg(8, 9520, 1000.0, 6)
    stamps = 7.0 + np.arange(9520) / 1000.0
    amplifier = Stream(name="amp", kind="EEG", samples=(volts.T * 1e6).astype("<f4"), stamps=stamps, rate=1000.0)
    keys = Stream(name="keys", kind="Markers", samples=["left", "right"], stamps=stamps[[1000, 5000]])
    write_xdf(path, keys, amplifier)
    names = tuple(f"X{i}" for i in range(8))
    resolution = float(np.abs(volts).max()) * 2.0**-23
    events = ((1.0, "left"), (5.0, "right"))
    return Written(path=path, volts=volts, ch_names=names, sfreq=1000.0, resolution=resolution, events=events)


def write_oddball(path: Path) -> Written:
    """Two minutes of an oddball with 4 electrodes: after a "target" there is a positive half wave of 0.3 to 0.5 s."""
    rng = np.random.default_rng(list(path.name.encode()))
    volts = make_eeg(4, 30720, 256.0, int(rng.integers(2**31)))
    starts = np.cumsum(rng.integers(128, 192, 180))
    texts = np.where(rng.random(len(starts)) < 0.16, "target", "nontarget")
    bump = 20e-6 * np.sin(np.pi * np.arange(51) / 51)
    for start in starts[texts == "target"]:
        volts[:, start + 77 : start + 128] += bump[: max(0, 30720 - start - 77)]
    events = tuple((float(start) / 256, str(text)) for start, text in zip(starts, texts, strict=True))
    signals = [
        edfio.EdfSignal(row * 1e6, 256.0, label=name, physical_dimension="uV", physical_range=(-300.0, 300.0))
        for name, row in zip(MUSE_4, volts, strict=True)
    ]
    annotations = [edfio.EdfAnnotation(onset, None, text) for onset, text in events]
    path.parent.mkdir(exist_ok=True)
    edfio.Edf(signals, annotations=annotations).write(path)
    return Written(path=path, volts=volts, ch_names=MUSE_4, sfreq=256.0, resolution=300e-6 / 65535, events=events)


def write_fif(path: Path) -> Written:
    """FIF of float32, as MNE saves it, with two events."""
    volts, names = make_eeg(8, 3000, 100.0, 7), tuple(read_montage("sjepa-62").ch_names[:8])
    events = ((3.5, "left"), (17.25, "right"))
    raw = mne.io.RawArray(volts, mne.create_info(list(names), 100.0, "eeg"), verbose="error")
    raw.set_annotations(mne.Annotations([onset for onset, _ in events], 0.0, [text for _, text in events]))
    raw.save(path, verbose="error")
    resolution = float(np.abs(volts).max()) * 2.0**-23
    return Written(path=path, volts=volts, ch_names=names, sfreq=100.0, resolution=resolution, events=events)


def write_npy(path: Path) -> Written:
    """A bare array in microvolts."""
    volts = make_eeg(8, 3000, 100.0, 8)
    np.save(path, volts * 1e6)
    names = tuple(read_montage("sjepa-62").ch_names[:8])
    return Written(path=path, volts=volts, ch_names=names, sfreq=100.0, resolution=1e-18)


WRITERS: dict[str, Callable[[Path], Written]] = {
    "eeglab_data.set": write_reaction_times,
    "test_raw_chanloc_fids.set": write_hydrocel,
    "biosig16.edf": write_edf,
    "biosemi17.bdf": write_bdf,
    "testbva.vhdr": write_brainvision,
    "openbci8.xdf": write_lsl,
    "eeg_raw.fif": write_fif,
    "eeg.npy": write_npy,
}
