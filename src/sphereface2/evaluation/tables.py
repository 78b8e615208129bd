"""Results as tables and lines for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.table import Table

from sphereface2.console import cell, percent, table
from sphereface2.errors import counted
from sphereface2.evaluation.all_pairs import AllPairsResult
from sphereface2.evaluation.bootstrap import LEVEL, Interval
from sphereface2.evaluation.distractors import DistractorResult
from sphereface2.evaluation.one_threshold import AtThreshold, OneThresholdResult
from sphereface2.evaluation.pairs import PairsResult
from sphereface2.evaluation.results import PairsVerified, Result, far_key
from sphereface2.evaluation.templates import TemplatesResult

PERCENT = f"{100 * LEVEL:g} %"
"""The level of intervals, in headers."""


def render(result: Result) -> Iterator[Table | str]:
    """What to print of a result: tables and lines."""
    if isinstance(result, TemplatesResult):
        yield from _templates(result)
    elif isinstance(result, DistractorResult):
        yield from _distractors(result)
    elif isinstance(result, OneThresholdResult):
        yield from _one_threshold(result)
    elif isinstance(result, PairsVerified):
        yield _pairs(result)
        yield _counts(result)
    yield from result.notes
    if isinstance(result, AllPairsResult) and result.unreadable:
        first = result.unreadable_names[0]
        yield f"{counted(result.unreadable, 'unreadable image')} left out, the first is {first}"
    if result.plots:
        yield "plots: " + ", ".join(result.plots)


def interval(ci: Interval | None, spell: Callable[[float], str] = percent) -> str:
    """An interval in a cell; nothing where there is none.

    Examples:
        >>> interval((0.1, 0.25)), interval(None)
        ('10.00 % – 25.00 %', '')
    """
    return "" if ci is None else f"{spell(ci[0])} – {spell(ci[1])}"


def _counts(result: PairsVerified) -> str:
    return f"{result.genuine:,} genuine and {result.impostor:,} impostor pairs"


def _pairs(result: PairsVerified) -> Table:
    title = result.name
    if isinstance(result, PairsResult | AllPairsResult):
        title = f"{title}: {counted(result.images, 'image')}"
    over = result.intervals
    header = f"{PERCENT} interval over {over.over}" if over else ""
    place = table(title, ["", "value", header], dim=[2])
    if isinstance(result, PairsResult):
        accuracy = f"{100 * result.accuracy:.2f} ± {100 * result.accuracy_std:.2f} %"
        place.add_row(f"{result.folds}-fold accuracy", f"[bold]{accuracy}[/bold]")
        place.add_row("EER", percent(result.eer.value), interval(result.eer.ci))
        place.add_row("AUC", f"{result.auc.value:.4f}", interval(result.auc.ci, "{:.4f}".format))
        place.add_section()
    for point in result.tar:
        place.add_row(f"TAR at FAR {far_key(point.at)}", percent(point.value), interval(point.ci))
    if isinstance(result, AllPairsResult):
        place.add_section()
        place.add_row("rank-1 identification", percent(result.rank1))
    if isinstance(result, PairsResult) and (quality := result.calibration) is not None:
        place.add_section()
        place.add_row("Cllr", f"{quality.cllr:.4f}")
        place.add_row("min-Cllr", f"{quality.min_cllr:.4f}")
        place.add_row("ECE", percent(quality.ece))
        for far, found in quality.far.items():
            place.add_row(f"FAR at the threshold for {far_key(far)}", f"{100 * found:.3g} %")
            place.add_row("  and its TAR", percent(quality.tar[far]))
    return place


def _templates(result: TemplatesResult) -> Iterator[Table | str]:
    weighted = ", weighted by the detector's scores" if result.detector_weights else ""
    counts = f"{counted(result.templates, 'template')} of {counted(result.images, 'image')}"
    yield f"{result.name}: {counts}{weighted}"
    if (pairs := result.verification) is not None:
        yield from render(pairs)
    if result.galleries:
        place = table("1:N identification", ["", "mean", *(one.name for one in result.galleries)])
        for figure, title in (("rank", "rank-{}"), ("tpir", "TPIR at FPIR {}")):
            place.add_section()
            for row, (at, mean) in enumerate(result.means(figure).items()):
                each = [getattr(one, figure)[row].value for one in result.galleries]
                place.add_row(title.format(far_key(at)), *map(percent, [mean, *each]))
        yield place
        for one in result.galleries:
            yield (
                f"{one.name}: {counted(one.people, 'person')}, {counted(one.probes, 'probe')}, "
                f"{one.enrolled:,} of them of people in it"
            )
            yield from one.notes


def _distractors(result: DistractorResult) -> Iterator[Table | str]:
    header = f"{PERCENT} interval over people" if result.intervals else ""
    title = f"{result.name}: rank-1 by number of distractors"
    place = table(title, ["distractors", "rank-1", header], dim=[2])
    for rate in result.rank1:
        place.add_row(f"{rate.at:,}", percent(rate.value), interval(rate.ci))
    yield place
    yield (
        f"{result.searches:,} searches of {result.images:,} probes of {result.people:,} people; "
        "the other image must score above every distractor"
    )
    if result.unreadable:
        yield f"{counted(result.unreadable, 'unreadable image')} left out"


def at_thresholds(title: str, groups: Mapping[str, Sequence[AtThreshold]]) -> Table:
    """What fixed thresholds do on a set or groups of it; log10 of the FAR over that asked for."""
    header = f"{PERCENT} interval"
    columns = ["threshold", "FAR", header, "TAR", "log10"]
    grouped = len(groups) > 1
    place = table(title, ["group", *columns] if grouped else [*columns, header], dim=[2 + grouped])
    for name, found in groups.items():
        place.add_section()
        for one in found:
            asked = "" if one.asked is None else f" for {far_key(one.asked)}"
            log10 = decades = ""
            if (transfer := one.transfer) is not None:
                log10 = f"{transfer.value:+z.2f}"
                decades = interval(transfer.ci, "{:+z.2f}".format)
            rates = [_short(one.far.value), interval(one.far.ci, _short), percent(one.tar.value)]
            cells = [f"{one.threshold:.3f}{asked}", *rates, log10]
            place.add_row(*([cell(name), *cells] if grouped else [*cells, decades]))
    return place


def _one_threshold(result: OneThresholdResult) -> Iterator[Table | str]:
    title = f"{result.name}: one threshold for {result.people:,} people"
    place = at_thresholds(title, {"all": result.thresholds, **result.groups})
    if result.thresholds:
        yield place
        yield "log10 is that of the FAR reached over the FAR asked for; 0 carries over"
    share = result.uniform.share
    ci = f" ({interval(share.ci)})" if share.ci else ""
    yield (
        f"uniform accuracy {percent(share.value)}{ci}: the share of {result.uniform.images:,} "
        f"images that one threshold, {result.uniform.threshold:.3f}, serves"
    )


def _short(share: float) -> str:
    """Two digits of a small share.

    Examples:
        >>> _short(0.0283), _short(0.0)
        ('2.8e-2', '0')
    """
    return far_key(float(f"{share:.1e}")) if share else "0"
