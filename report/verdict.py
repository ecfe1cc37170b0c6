"""The verdict on one run: how bad each quantity is, since which step, and what to do."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_muon.report.health import WORST_FIRST, is_monitored, judge, measure, named_lines, too_short
from lightning_muon.report.quantities import matching
from lightning_muon.report.quantity import WORST, Line, Verdict, best, late_growth, risen
from lightning_muon.report.run_log import RunLog

RunVerdict = Literal["ok", "watch", "bad", "not measured", "too short to judge"]
NOT_MEASURED = (
    "not measured: no monitor has logged this run's health; add WeightRMSMonitor, OrthogonalityMonitor and the like to"
    " its callbacks"
)


@dataclass(frozen=True)
class Finding:
    """What one line of the report says of a run.

    Attributes:
        name: Of its quantity.
        line: With the healthy range and the advice.
        value: Of the run.
        verdict: On the value.
        severity: The value on the scale of :meth:`Range.severity`.
        since: The step from which on it was not healthy; ``None`` if it is, or that is not known.
    """

    name: str
    line: Line
    value: float
    verdict: Verdict
    severity: float
    since: int | None = None

    def __str__(self) -> str:
        healthy = f" (healthy: {self.line.healthy.words})" if self.line.healthy.words else ""
        return f"{self.line.label}: {self.line.write.format(self.value)}{healthy}"


@dataclass(frozen=True)
class RunHealth:
    """The verdict on a run.

    Attributes:
        verdict: The worst of its findings.
        findings: The worst first; of the same verdict, warnings last: the others say what is wrong.
        reason: Why it cannot be judged; empty if it can.
    """

    verdict: RunVerdict
    findings: list[Finding]
    reason: str = ""

    @property
    def severity(self) -> float | None:
        """The largest of the findings; ``None`` if the run cannot be judged."""
        if self.verdict in {"not measured", "too short to judge"} or not self.findings:
            return None
        return max(one.severity for one in self.findings)

    @property
    def unhealthy(self) -> list[Finding]:
        """The findings that are not ``ok``, if the run can be judged."""
        return [] if self.severity is None else [one for one in self.findings if one.verdict in {"watch", "bad"}]

    @property
    def since(self) -> int | None:
        """The step since which the verdict holds, as far as it is known."""
        steps = [one.since for one in self.unhealthy if one.verdict == self.verdict and one.since is not None]
        return min(steps, default=None)

    @property
    def headline(self) -> str:
        """The verdict in a line."""
        if self.reason:
            return f"{self.verdict}: {self.reason}"
        if not self.unhealthy:
            return "ok: every quantity is in its healthy range"
        since = "" if self.since is None else f" since step {self.since}"
        return f"{self.verdict}{since}: {self.unhealthy[0]}"

    def severities(self) -> dict[str, float]:
        """Return the largest severity of each quantity."""
        found: dict[str, float] = {}
        for one in self.findings:
            found[one.name] = max(one.severity, found.get(one.name, 0.0))
        return found


def health_of(run: RunLog, *, is_over: bool = True, lines: Iterable[tuple[str, Line]] | None = None) -> RunHealth:
    """Judge a run as the report does.

    Args:
        run: What it has logged so far.
        is_over: Whether it has ended; until then sizes may grow.
        lines: With the names of their quantities, if they are known.
    """
    reason = too_short(run)
    findings = []
    for name, line in named_lines([run]) if lines is None else lines:
        if line.at_the_end and not is_over:
            continue
        value = measure(line, run)
        verdict = None if value is None else judge(line, value, run)
        if value is None or verdict is None or line.healthy.beyond == "costly":
            continue
        if reason and math.isfinite(value) and not line.of_any_length:
            severity = line.healthy.severity(value)
            verdict = "ok"  # so far
        else:
            severity = line.healthy.severity(value) if math.isfinite(value) else WORST
        since = None if verdict == "ok" else _since(name, line, run, verdict)
        findings.append(Finding(name, line, value, verdict, severity or 0.0, since))
    findings.sort(key=lambda one: (WORST_FIRST.index(one.verdict), one.name == "warnings", -one.severity))
    worst = findings[0].verdict if findings else "ok"
    if worst == "bad":
        return RunHealth("bad", findings)
    if reason:
        return RunHealth("too short to judge", findings, reason)
    if worst == "watch":
        return RunHealth("watch", findings)
    if not is_monitored(run):
        return RunHealth("not measured", findings, NOT_MEASURED.partition(": ")[2])
    return RunHealth("ok", findings)


def course(run: RunLog, at: Sequence[int]) -> dict[str, list[tuple[int, float]]]:
    """Return the severities of a run's quantities as they were at some steps, by the names of the quantities."""
    lines = named_lines([run])
    found: dict[str, list[tuple[int, float]]] = {}
    for step in at:
        for name, severity in health_of(until(run, step), is_over=False, lines=lines).severities().items():
            found.setdefault(name, []).append((step, severity))
    return found


def until(run: RunLog, step: int) -> RunLog:
    """Return what a run had logged up to a step."""
    scalars = {tag: logged[: bisect_right(logged, (step, math.inf))] for tag, logged in run.scalars.items()}
    texts = run.texts and {tag: [(at, text) for at, text in given if at <= step] for tag, given in run.texts.items()}
    return replace(run, scalars={tag: logged for tag, logged in scalars.items() if logged}, texts=texts)


def _since(name: str, line: Line, run: RunLog, verdict: Verdict) -> int | None:
    """Return the step from which on the verdict on a line was as bad as it is."""
    if name == "warnings":
        return min((step for step, _ in (run.texts or {}).get("warnings", [])), default=None)
    if name == "not_finite":
        first = [step for logged in run.scalars.values() for step, value in logged if not math.isfinite(value)]
        return min(first, default=None)
    tags = matching(run.scalars, line.tags)
    logged = run.scalars[max(tags, key=lambda tag: line.reduce(run.values(tag)))]
    values = [value for _, value in logged]
    if line.reduce is risen and best(values) in values:
        return logged[values.index(best(values))][0]
    if line.reduce is late_growth:
        return logged[(len(logged) - 1) * 3 // 4][0]
    # The beginning of the last time that it was.
    since = None
    for step, value in reversed(logged):
        if line.healthy.judge(value) in {verdict, "bad"} or not math.isfinite(value):
            since = step
        elif since is not None:
            break
    return since
