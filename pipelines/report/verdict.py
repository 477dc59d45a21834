"""The verdict: what the numbers say in words, with the level that each is judged by.

Sources of the levels: docs/report.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from braggflux.merge.output.statistics import Row
from braggflux.pipelines.report.figures.images import flagged, image_statistics
from braggflux.pipelines.report.figures.intensities import (
    directional_signal,
    own_l_test,
    patterson_peak,
)
from braggflux.pipelines.report.figures.maps import strongest_sites
from braggflux.pipelines.report.sources import OURS, DataSource, NoDataError
from braggflux.pipelines.report.table_one import score
from braggflux.pipelines.workspace.rundir import REFERENCE

GOOD, FAIR, BAD, UNKNOWN = "good", "fair", "bad", "unknown"


class Finding(NamedTuple):
    """One light of the verdict.

    Parameters
    ----------
    state : str
        :data:`GOOD`, :data:`FAIR`, :data:`BAD` or :data:`UNKNOWN`.
    subject, words, levels, advice : str
        What was judged; what was found; the levels; what to do, empty where nothing is.
    """

    state: str
    subject: str
    words: str
    levels: str
    advice: str


class Level(NamedTuple):
    """How one statistic of the table is judged.

    ``good`` and ``fair`` are its bounds: at least (or at most, where ``good < fair``).
    """

    subject: str
    row: int
    key: str
    words: str
    good: float
    fair: float
    advice: str


LEVELS = (
    Level(
        *("Outer shell", -2, "cc_half", "CC1/2 {:.2f}", 0.5, 0.3),
        "cut the resolution where CC1/2 falls below 0.3 (extraction.d_min, --d-min)",
    ),
    Level(
        *("Inner shell", 0, "r_merge", "R_merge {:.3f}", 0.05, 0.10),
        "look for overloads, ice, a second crystal, or a wrong symmetry",
    ),
    Level(
        *("Completeness", -1, "completeness", "{:.1%}", 0.95, 0.85),
        "collect more rotation, or another orientation",
    ),
    Level(
        *("Anomalous signal", 0, "cc_anom", "CCanom {:.2f} in the lowest shell", 0.3, 0.1),
        "below 0.1 there is nothing to phase with: more redundancy, or another wavelength",
    ),
    Level(
        *("Sigmas", -1, "z_spread", "half sets differ by {:.2f} of their sigmas", 0.1, 0.25),
        "weights and maps that use SIGF suffer: look at the calibration below",
    ),
)
#: In place of those of rotation data, by their key.
OF_STILLS = {
    "r_merge": Level(
        *("Inner shell", 0, "r_split", "R_split {:.3f}", 0.10, 0.20),
        "more images, a better detector geometry, or another indexing",
    )
}


def verdict(source: DataSource) -> list[Finding]:
    """Judge a data set."""
    findings = [*_of_levels(source)]
    judges: tuple[Callable[[DataSource], Finding | None], ...] = (
        *(_beside_dials, _peaks, _images, _twinning, _pseudo_translation, _anisotropy),
    )
    for judge in judges:
        try:
            finding = judge(source)
        except (NoDataError, ValueError, ArithmeticError, LookupError) as reason:
            finding = Finding(UNKNOWN, (judge.__doc__ or "").rstrip("."), str(reason), "", "")
        if finding is not None:
            findings.append(finding)
    return findings


def summary(findings: list[Finding]) -> str:
    """Say the verdict in a sentence."""
    bad = [f.subject.lower() for f in findings if f.state == BAD]
    fair = [f.subject.lower() for f in findings if f.state == FAIR]
    if not any(f.state != UNKNOWN for f in findings):
        return "Nothing to judge yet."
    if bad:
        return f"Look before you use these data: {', '.join(bad)}."
    if fair:
        return f"Usable; weaker than one would wish: {', '.join(fair)}."
    return "Good data: nothing stands out."


def _of_levels(source: DataSource) -> list[Finding]:
    try:
        rows = source.once(score).rows[OURS]
    except NoDataError as reason:
        return [Finding(UNKNOWN, "Statistics", str(reason), "", "")]
    levels = [OF_STILLS.get(level.key, level) if source.is_still else level for level in LEVELS]
    return [_judged(level, rows[level.row]) for level in levels]


def _judged(level: Level, row: Row) -> Finding:
    value = row.get(level.key)
    at_least = level.good > level.fair
    levels = f"{'≥' if at_least else '≤'} {level.good:g} good, {level.fair:g} fair"
    if level.key == "z_spread":
        levels = f"1 ± {level.good:g} good, ± {level.fair:g} fair"
    if not isinstance(value, int | float):
        return Finding(UNKNOWN, level.subject, f"no {level.key}", levels, "")
    x = abs(value - 1) if level.key == "z_spread" else value
    state = state_of(x, level.good, level.fair)
    advice = "" if state == GOOD else level.advice
    return Finding(state, level.subject, level.words.format(value), levels, advice)


def state_of(value: float, good: float, fair: float) -> str:
    """Judge a value by its bounds: at least, or at most where ``good < fair``."""
    sign = 1 if good > fair else -1
    if sign * value >= sign * good:
        return GOOD
    return FAIR if sign * value >= sign * fair else BAD


def _beside_dials(source: DataSource) -> Finding | None:
    """Beside DIALS."""
    scores = source.once(score)
    if REFERENCE not in scores.rows:
        raise NoDataError(scores.reason)
    ours, theirs = (scores.rows[name][-1].get("r_pim") for name in (OURS, REFERENCE))
    if ours is None or theirs is None:
        return None
    ratio = ours / theirs
    words = f"R_pim {ours:.4f}, DIALS {theirs:.4f}"
    advice = "" if ratio <= 1.05 else "compare scale against image and profiles with DIALS'"
    return Finding(
        state_of(ratio, 1.05, 1.3), "Beside DIALS", words, "≤ 1.05 × DIALS good, 1.3 fair", advice
    )


def _peaks(source: DataSource) -> Finding | None:
    """Anomalous peaks."""
    sites = source.once(strongest_sites)[:3]
    ours = sum(heights[OURS] for _, heights in sites)
    words = ", ".join(f"{s.residue} {s.seqid} {h[OURS]:.1f} σ" for s, h in sites)
    if all(REFERENCE in heights for _, heights in sites):
        theirs = sum(heights[REFERENCE] for _, heights in sites)
        words += f"; sum {ours:.1f}, DIALS {theirs:.1f} ({100 * (ours / theirs - 1):+.0f} %)"
        state = state_of(ours / theirs, 0.97, 0.9)
        levels = "sum ≥ 0.97 × DIALS good, 0.9 fair"
    else:
        state = state_of(sites[0][1][OURS], 6.0, 4.5)
        levels = "highest site ≥ 6 σ good, 4.5 fair"
    advice = "" if state == GOOD else "check the model's sites, the wavelength and the resolution"
    return Finding(state, "Anomalous peaks", words, levels, advice)


def _images(source: DataSource) -> Finding | None:
    """Images."""
    own = source.once(image_statistics)[OURS]
    odd = flagged(own)
    share = len(odd) / max(len(own.image), 1)
    words = f"{len(odd)} of {len(own.image)} stand out in scale or R"
    if len(odd):
        named = ", ".join(str(own.image[k]) for k in odd[:8])
        words += f": {named}{' ...' if len(odd) > 8 else ''}"
    state = state_of(share, 0.01, 0.05)
    advice = "" if state == GOOD else "look at these frames; leave them out if they are bad"
    return Finding(state, "Images", words, "≤ 1 % good, 5 % fair", advice)


def _twinning(source: DataSource) -> Finding | None:
    """Twinning."""
    mean = source.once(own_l_test).mean
    state = state_of(mean, 0.47, 0.44)
    advice = "" if state == GOOD else "twinned? refine with the twin law, or check the symmetry"
    return Finding(state, "Twinning", f"⟨|L|⟩ {mean:.3f}", "≥ 0.47 good, 0.44 fair", advice)


def _pseudo_translation(source: DataSource) -> Finding | None:
    """Pseudo-translation."""
    height = source.once(patterson_peak).height
    state = state_of(height, 0.15, 0.20)
    advice = "" if state == GOOD else "tell the phasing program of the translation"
    words = f"highest Patterson peak {100 * height:.0f} % of the origin"
    return Finding(state, "Pseudo-translation", words, "≤ 15 % good, 20 % fair", advice)


def _anisotropy(source: DataSource) -> Finding | None:
    """Anisotropy."""
    limits = {axis: limit for axis, (_, _, limit) in source.once(directional_signal).items()}
    span = max(d for d, _ in limits.values()) - min(d for d, _ in limits.values())
    words = ", ".join(f"{axis} {d:.2f}{'' if past else '+'}" for axis, (d, past) in limits.items())
    state = state_of(span, 0.3, 0.6)
    advice = "" if state == GOOD else "consider an anisotropic cut-off"
    levels = "limits within 0.3 Å good, 0.6 fair; +: beyond the data"
    return Finding(state, "Anisotropy", f"I/σ = 2 at {words} Å", levels, advice)
