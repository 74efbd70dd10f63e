"""Finds a model's channels among those of a recording or stream, whose names are often written in another way."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sjepa_deploy.errors import SjepaError

ALIASES = {"t3": "t7", "t4": "t8", "t5": "p7", "t6": "p8"}
"""Old names of the 10-20 system and those in their place (Klem et al. 1999, Electroencephalogr. Clin. Neurophysiol. S52, 3)."""

_PREFIX = re.compile(r"^(?:eeg|pol)[\s_-]+")
_SUFFIX = re.compile(r"(?:[\s_-]+(?:ref|le))?[\s.]*$")  # the common reference, linked ears, and PhysioNet's dots

_OTHER_KINDS = re.compile(
    r"(?:^|[^a-z])(?:[hv]?eog[lrab]?|e[ck]g|emg|acc[xyz]?|accel\w*|gyro?[xyz]?|sti|stim|trg|trig|trigger|status|resp|ppg|gsr|eda|spo2|battery|counter)"
    r"(?=$|[^a-z])"
)


def canonical(name: str) -> str:
    """Return the form in which names are compared: in lower case, without prefix or reference, old names as new ones.

    "EEG T3-REF", "POL T7", "T7-LE", "t7.." and "T3" all become "t7". A pair of electrodes, as "Fp1-F7", stays a pair.
    """
    text = _SUFFIX.sub("", _PREFIX.sub("", name.strip().casefold()))
    return ALIASES.get(text, text) or name.casefold()


def says_other_than_eeg(name: str) -> bool:
    """Return whether the name is that of an eye, heart, muscle, trigger, motion or like channel."""
    return _OTHER_KINDS.search(name.casefold()) is not None


@dataclass(frozen=True, kw_only=True)
class Found:
    """Holds the places of the channels that were looked for.

    Attributes
    ----------
    columns : tuple of int or None
        For each channel that was looked for, its place among those there are; None if it is not there.
    aliases : tuple of (str, str)
        Those that are written in another way: the name that was found, the name that was looked for.
    doubtful : tuple of (str, tuple of str)
        Those that several channels could be, and these. They count as not there.
    """

    columns: tuple[int | None, ...]
    aliases: tuple[tuple[str, str], ...]
    doubtful: tuple[tuple[str, tuple[str, ...]], ...]


def find_channels(wanted: Sequence[str], there: Sequence[str]) -> Found:
    """Look for channels by name: as it is written but for case, else by its `canonical` form."""
    exact: dict[str, list[int]] = {}
    for i, name in enumerate(there):
        exact.setdefault(name.casefold(), []).append(i)
    spelt = {i for name in wanted for i in exact.get(name.casefold(), ())}
    others: dict[str, list[int]] = {}
    for i, name in enumerate(there):
        if i not in spelt:
            others.setdefault(canonical(name), []).append(i)
    columns: list[int | None] = []
    aliases, doubtful, taken = [], [], set[int]()
    for name in wanted:
        like = exact.get(name.casefold()) or [i for i in others.get(canonical(name), ()) if i not in taken]
        columns.append(like[0] if len(like) == 1 else None)
        if len(like) > 1:
            doubtful.append((name, tuple(there[i] for i in like)))
        elif like and there[like[0]].casefold() != name.casefold():
            aliases.append((there[like[0]], name))
        taken.update(like)
    return Found(columns=tuple(columns), aliases=tuple(aliases), doubtful=tuple(doubtful))


def parse_rename(pairs: Iterable[str], error: type[SjepaError]) -> dict[str, str]:
    """Return the pairs "THEIRS=MINE" as new names by old ones.

    Raises
    ------
    SjepaError
        `error`, if one is no pair, or a name stands twice on one side.
    """
    new: dict[str, str] = {}
    for pair in pairs:
        old, equals, name = (part.strip() for part in pair.partition("="))
        if not (old and equals and name) or old in new or name in new.values():
            raise error(f"{pair!r} renames no channel.", "Write `--rename THEIRS=MINE,THEIRS=MINE`, each name once.")
        new[old] = name
    return new


def renamed(ch_names: Sequence[str], rename: Mapping[str, str], error: type[SjepaError]) -> tuple[str, ...]:
    """Return `ch_names` with the names of `rename` (case is ignored) in place of theirs.

    Raises
    ------
    SjepaError
        `error`, if there is no such channel; the message lists all that there are.
    """
    new = {old.casefold(): name for old, name in rename.items()}
    if unknown := [old for old in rename if old.casefold() not in {name.casefold() for name in ch_names}]:
        raise error(f"There are no channels {', '.join(unknown)} to rename; there are {', '.join(ch_names)}.", "Mend `--rename`.")
    names = tuple(new.get(name.casefold(), name) for name in ch_names)
    folded = [name.casefold() for name in names]
    if twice := sorted({name for name in names if folded.count(name.casefold()) > 1}):
        raise error(f"Two channels would be called {', '.join(twice)}.", "Mend `--rename`.")
    return names
