"""Whether a learning rate that was found at one width is right at another, and whether AdamW's is right for Muon.

``python -m benchmarks.embedded_text.transfer`` trains three widths by several optimizers on one grid of learning rates,
by the command ``sweep``. ``moonlight`` has one rate for all parameters; ``adamw`` and ``mup`` keep the rates of
embedding, head and norms, and only that of the matrices moves.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.embedded_text.project import QUICK, parser_of, sweep, write_config, write_record
from benchmarks.record import print_table

OPTIMIZERS = ("adamw", "moonlight", "mup")
WIDTHS = (128, 256, 512)
RATES = tuple(0.001 * 2**power for power in range(8))
SEEDS = (42, 43)


def main(arguments: list[str] | None = None) -> None:
    """Run the sweep, or go on with it, and write record and plot."""
    options = parser_of(__doc__).parse_args(arguments)
    widths, rates, seeds = (WIDTHS[:2], RATES[3:5], SEEDS[:1]) if options.quick else (WIDTHS, RATES, SEEDS)
    folder = options.folder.absolute() / "transfer"
    # Heads have 32 dimensions at each width.
    nets = {width: f"model: {{net: {{init_args: {{dim: {width}, heads: {width // 32}}}}}}}" for width in widths}
    files = {width: write_config(folder, f"width_{width}", text) for width, text in nets.items()}
    configs = {(name, width): [f"optimizer/{name}", files[width]] for name in OPTIMIZERS for width in widths}
    # All runs of a seed come before those of the next.
    varied = {"seed_everything": seeds, "config": [*configs.values()], "model.optimizer.lr": rates}
    trials = sweep(folder, varied, [f"--jobs={options.jobs}", *(QUICK if options.quick else ())])
    losses = {key: {rate: _mean(trials, config, rate) for rate in rates} for key, config in configs.items()}
    rows = [_row(optimizer, width, losses) for optimizer, width in losses]
    title = f"Loss over the learning rate at widths {', '.join(map(str, widths))}; {len(seeds)} seeds"
    print_table(title, rows, [key for key in rows[0] if key != "losses"])
    record = write_record(options, "transfer", title, folder, {"seeds": seeds, "rows": rows})
    _draw(rows, options.images / f"{record.stem.replace('_', '-')}.png")


def _mean(trials: Sequence[dict[str, Any]], config: list[str], rate: float) -> float | None:
    """Return the mean loss over the seeds; ``None`` if a run has none."""
    found = [one for one in trials if one["options"]["config"] == config]
    values = [one["value"] for one in found if math.isclose(one["options"]["model.optimizer.lr"], rate)]
    return None if None in values or not all(map(math.isfinite, values)) else statistics.mean(values)


def _row(optimizer: str, width: int, losses: dict[tuple[str, int], dict[float, float | None]]) -> dict[str, Any]:
    def best(key: tuple[str, int]) -> float:
        return min(losses[key], key=lambda rate: (math.inf if losses[key][rate] is None else losses[key][rate], rate))

    own = losses[optimizer, width]
    lowest = own[best((optimizer, width))] or math.nan
    narrowest = min(of for name, of in losses if name == optimizer)
    reused = {"its rate at the smallest width": (optimizer, narrowest), "AdamW's rate at this width": ("adamw", width)}
    costs = {f"loss more by {name}": (own[best(key)] or math.inf) - lowest for name, key in reused.items()}
    return {
        "optimizer": optimizer,
        "width": width,
        "best rate": best((optimizer, width)),
        "at an end of the grid": "yes" if best((optimizer, width)) in (min(own), max(own)) else "",
        "loss": lowest,
        **costs,
        "losses": {f"{rate:g}": loss for rate, loss in own.items()},
    }


def _draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    lowest = min(row["loss"] for row in rows)
    figure, axes = pyplot.subplots(1, len(names), sharey=True, figsize=(3.4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["optimizer"] == name]
        for shade, row in zip((0.7, 0.4, 0.0), own, strict=False):
            points = [(float(rate), loss) for rate, loss in row["losses"].items() if loss is not None]
            axis.plot(
                *zip(*points, strict=True), marker="o", markersize=3, color=str(shade), label=f"width {row['width']}"
            )
            axis.plot(row["best rate"], row["loss"], marker="o", markersize=9, fillstyle="none", color=str(shade))
        axis.set(title=name, xscale="log", xlabel="learning rate", ylim=(lowest - 0.05, lowest + 0.9))
    axes[0].set_ylabel("val/loss")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
