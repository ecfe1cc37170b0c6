"""What a comparison shows and leaves behind: tables for a terminal, JSON, Markdown and plots."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_muon.experiments.outcome import Outcome
from lightning_muon.experiments.plots import draw_horizons, draw_tuning
from lightning_muon.experiments.ratio import Interval
from lightning_muon.experiments.standings import NO_DIFFERENCE, Standing, ratio_text, sentence, standings
from lightning_muon.report.plain_text import markdown as as_markdown
from lightning_muon.report.plain_text import printable, table_row
from lightning_muon.report.render import COLOURS
from lightning_muon.report.replaced import replaced

VALUES, PAGE = "comparison.json", "comparison.md"
HORIZONS, TUNING = "loss_over_steps.png", "tuning.png"

RESULT, COST = "Result", "Settings and cost"
_STATE, _MEGABYTES = "state bytes per parameter", "MB of state"
_FIGURES = {"tuning runs", _STATE, _MEGABYTES, "optimizer's share"}  # columns that are aligned at the right

Cells = Callable[[Standing], Sequence[str]]


def print_outcome(outcome: Outcome) -> None:
    """Print the result, the settings and cost of each optimizer, and the sentence."""
    console = Console()
    lines = standings(outcome)
    for title, (header, cells) in _tables(outcome).items():
        legend = _legend(outcome, title)
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption=legend, caption_justify="left")
        table.title, table.title_justify = title, "left"
        for name in header:
            table.add_column(Text(printable(name)), justify="right" if name in _FIGURES else "left", overflow="fold")
        for line in lines:
            style = "bold" if line.name == outcome.baseline else ""
            table.add_row(*(_cell(cell) for cell in cells(line)), style=style)
        console.print(table)
    for name, note in _notes(lines):
        console.print(f"- {printable(name)}: {printable(note)}", markup=False, highlight=False)
    console.print(printable(sentence(outcome)), markup=False, highlight=False)


def write_outcome(outcome: Outcome, folder: Path) -> tuple[list[Path], str | None]:
    """Write ``comparison.json``, ``comparison.md`` and the plots; each file is replaced only when it is complete.

    Args:
        outcome: The comparison.
        folder: Where to write; it is made if it does not exist.

    Returns:
        What was written; and why there are no plots, if there are none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    no_plots, plots = None, {}
    for name, draw in ((HORIZONS, draw_horizons), (TUNING, draw_tuning)):
        try:
            with replaced(folder / name) as unfinished:
                if draw(outcome, unfinished):
                    plots[name] = folder / name
        except ModuleNotFoundError as error:
            no_plots = str(error)
    with replaced(folder / VALUES) as unfinished:
        unfinished.write_text(as_json(outcome) + "\n", encoding="utf-8")
    with replaced(folder / PAGE) as unfinished:
        unfinished.write_text(markdown(outcome, tuple(plots)), encoding="utf-8")
    return [folder / VALUES, folder / PAGE, *plots.values()], no_plots


def as_json(outcome: Outcome) -> str:
    """Return the outcome as :meth:`Outcome.from_json` reads it, with the figures of the tables as ``standings``."""
    found = {"sentence": sentence(outcome), "standings": [dataclasses.asdict(line) for line in standings(outcome)]}
    return json.dumps({**found, **json.loads(outcome.to_json())}, indent=1, ensure_ascii=False, allow_nan=False)


def markdown(outcome: Outcome, plots: Sequence[str] = ()) -> str:
    """Return the comparison as Markdown.

    Args:
        outcome: The comparison.
        plots: Files beside it, by their names above.
    """
    lines = standings(outcome)
    page = [f"# {as_markdown(outcome.baseline)} and {len(lines) - 1} others, each tuned alike", ""]
    page += [as_markdown(sentence(outcome))]
    for title, (header, cells) in _tables(outcome).items():
        aligned = ("---:" if name in _FIGURES else "---" for name in header)
        page += ["", f"## {title}", "", table_row(*map(as_markdown, header)), table_row(*aligned)]
        page += [table_row(as_markdown(line.name), *cells(line)[1:]) for line in lines]
        if legend := _legend(outcome, title):
            page += ["", as_markdown(legend)]
    if notes := list(_notes(lines)):
        page += ["", *(f"- {as_markdown(f'{name}: {note}')}" for name, note in notes)]
    captions = {HORIZONS: "Final loss over the steps of the schedule", TUNING: "Loss over the learning rate"}
    for name in plots:
        page += ["", f"![{captions[name]}]({name})"]
    return "\n".join(page) + "\n"


def rows(outcome: Outcome) -> list[dict[str, str]]:
    """Return both tables as one: for each optimizer its cells by the names of their columns."""
    tables = _tables(outcome).values()
    return [
        {name: cell for header, cells in tables for name, cell in zip(header, cells(line), strict=True)}
        for line in standings(outcome)
    ]


def _tables(outcome: Outcome) -> Mapping[str, tuple[list[str], Cells]]:
    """Return title, header and cells of each table."""
    parameters = outcome.setting.parameters

    def result(line: Standing) -> list[str]:
        steps, seconds = (ratio_text(ratio) for ratio in (line.steps, line.seconds))
        if line.name == outcome.baseline:
            steps = seconds = "1 (baseline)"
        diverged = f"{line.diverged} of {line.runs}" if line.diverged else "0"
        return [line.name, _symmetric(line.loss), steps, seconds, diverged]

    def cost(line: Standing) -> list[str]:
        share = "–" if line.optimizer_share is None else f"{line.optimizer_share:.1%}"
        state = "–"
        if line.state_bytes is not None:
            state = f"{line.state_bytes / parameters:.2f}" if parameters else f"{line.state_bytes / 1e6:.1f}"
        return [line.name, _settings(line.settings), str(line.tuning_runs), state, share, line.verdict]

    state = _STATE if parameters else _MEGABYTES
    return {
        RESULT: (["optimizer", outcome.setting.metric, "steps", "seconds", "diverged"], result),
        COST: (["optimizer", "settings", "tuning runs", state, "optimizer's share", "monitors"], cost),
    }


def _legend(outcome: Outcome, title: str) -> str:
    """Return what the columns of a table mean, where their names do not say it."""
    if title == COST:
        return "optimizer's share: of the time of a step"
    unit = outcome.setting.unit
    return (
        f"steps: those that the optimizer needs for the final loss of {outcome.baseline}, over those of"
        f" {outcome.baseline}; {unit} have the same ratio. In brackets and after ±: 95 % intervals."
    )


def _cell(text: str) -> Text:
    return Text(printable(text).replace(f": {NO_DIFFERENCE}", f"\n{NO_DIFFERENCE}"), COLOURS.get(text, ""))


def _symmetric(loss: Interval | None) -> str:
    if loss is None or loss.value is None:
        return "–"
    return f"{loss.value:.3f}" if loss.high is None else f"{loss.value:.3f} ± {loss.high - loss.value:.3f}"


def _settings(settings: Mapping[str, float]) -> str:
    words = {"weight_decay": "decay"}
    return ", ".join(f"{words.get(name, name)} {value:.3g}" for name, value in settings.items())


def _notes(lines: Sequence[Standing]) -> list[tuple[str, str]]:
    return [(line.name, note) for line in lines for note in line.notes]
