"""The health of a run in figures: what is measured, what is healthy, and what to do where it is not."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

from lightning_muon.cli.quantity import (
    Quantity,
    above,
    below,
    best,
    final,
    growth,
    late_growth,
    lowest,
    measured,
    median,
    peak,
    percent,
    risen,
    signed_percent,
    values,
)
from lightning_muon.cli.run_log import RunLog

_LOSS = re.compile(r"^(?!.*unigram).*loss")


def quantities(runs: Iterable[RunLog]) -> list[Quantity]:
    """Return the lines that have a value in at least one run."""
    runs = list(runs)
    losses = dict.fromkeys(tag for run in runs for tag in run.scalars if _LOSS.match(tag))
    groups = dict.fromkeys(tag for run in runs for tag in run.scalars if tag.startswith("update_rms/"))
    lines = [STEPS, *(line for tag in losses for line in _loss(tag)), *HEALTH, *map(_update_rms, groups), *COST]
    return [line for line in lines if any(line.measure(run) is not None for run in runs)]


def not_finite(run: RunLog) -> list[str]:
    """Return the tags under which a run logged NaN or infinity."""
    return [tag for tag, logged in run.scalars.items() if not all(math.isfinite(value) for _, value in logged)]


def _loss(tag: str) -> list[Quantity]:
    lines = [
        Quantity(f"{tag}, final", "", measured(tag, final)),
        Quantity(f"{tag}, best", "", measured(tag, best)),
    ]
    if tag.startswith("val"):
        advice = "the validation loss rose from its best: the model overfits, or diverges; take the best checkpoint"
        lines.append(
            Quantity(f"{tag}, above its best", "under 2 %", measured(tag, risen), above(0.02, 0.2), advice, percent)
        )
    return lines


def _update_rms(tag: str) -> Quantity:
    return Quantity(f"update RMS of {tag.partition('/')[2]}, median", "", measured(tag, median))


def _last_step(run: RunLog) -> float | None:
    return max((logged[-1][0] for logged in run.scalars.values() if logged), default=None)


def _largest_decay(reduce: Callable[[Sequence[float]], float]) -> Callable[[RunLog], float | None]:
    """Measure the weight decay by a reduction, of the group that has the largest."""

    def measure(run: RunLog) -> float | None:
        curves = [values(run, tag) for tag in run.scalars if tag.startswith("weight_decay/")]
        return max(map(reduce, curves), default=None)

    return measure


def _decisions(run: RunLog) -> float | None:
    return None if run.texts is None else len(run.texts.get("weight_decay/decisions", []))


def _warnings(run: RunLog) -> float | None:
    return None if run.texts is None else len(run.texts.get("warnings", []))


STEPS = Quantity("last step", "", _last_step, show="{:.0f}".format)

# The ranges are those of docs/reading-the-monitors.md.
HEALTH = (
    Quantity(
        "tags with NaN or infinity",
        "0",
        lambda run: len(not_finite(run)),
        above(0, 0),
        "a value is not finite from some step on: go back to a checkpoint before it, lower the learning rate or clip",
        "{:.0f}".format,
    ),
    Quantity(
        "weight RMS, peak of the largest",
        "under 1",
        measured("weight_rms/max", peak),
        above(1.0, 4.0),
        "the weights are large: raise weight_decay, or add AutoWeightDecay",
    ),
    Quantity("weight RMS, final of the largest", "", measured("weight_rms/max", final)),
    Quantity("weight RMS, growth since the start", "", measured("weight_rms/max", growth), show="×{:.3g}".format),
    Quantity(
        "weight RMS, growth in the last quarter",
        "under 10 %",
        measured("weight_rms/max", late_growth),
        above(0.1, 1.0),
        "the weights still grow: harmless in a short run; in a long one raise weight_decay, or add AutoWeightDecay",
        signed_percent,
    ),
    Quantity("largest weight", "", measured("weight_absmax/max", final)),
    Quantity(
        "bf16 headroom, median of the smallest",
        "above 1",
        measured("bf16_headroom/min", median),
        below(1.0, 0.5),
        "bfloat16 weights would lose updates: keep weights in float32 (bf16-mixed, not bf16-true), or decay more",
    ),
    Quantity("updates that bf16 would lose", "", measured("lost_updates/mean", median), show=percent),
    Quantity(
        "doublings until bf16 overflows, fewest",
        "above 16",
        measured("doublings_to_overflow/min", lowest),
        below(16, 4),
        "the largest weight nears the end of bfloat16's range: the run diverges; lower the learning rate",
        "{:.1f}".format,
    ),
    Quantity(
        "layer output RMS, peak of the largest",
        "under 1000",
        measured("output_rms/max", peak),
        # float16 ends at 65504; bfloat16 adds nothing under 256 to what is larger than that.
        above(1e3, 65504.0),
        "the outputs are large: what later layers add is rounded away; lower the learning rate, or decay more",
    ),
    Quantity(
        "layer output RMS, growth in the last quarter",
        "under 10 %",
        measured("output_rms/max", late_growth),
        above(0.1, 1.0),
        "the outputs still grow, as the weights do behind them: raise weight_decay, or add AutoWeightDecay",
        signed_percent,
    ),
    Quantity(
        "orthogonality error, median of the mean",
        "up to 0.7",
        measured("orthogonality_error/mean", median),
        above(0.7, 0.9),
        "updates have lost rank: look at the gradients of the worst layer, by per_parameter",
    ),
    Quantity("orthogonality error, largest", "", measured("orthogonality_error/max", peak)),
    Quantity("singular value of the update, smallest", "", measured("singular_value_min/min", median)),
    Quantity(
        "singular value of the update, largest",
        "up to 1.3",
        measured("singular_value_max/max", median),
        above(1.3, 2.0),
        "the iteration for the polar factor diverges: take another orthogonalizer, or its default options",
    ),
    Quantity("condition number of the gradient, median", "", measured("gradient_condition/mean", median)),
    Quantity("condition number of the momentum, median", "", measured("momentum_condition/mean", median)),
    Quantity("stable rank of the gradient, median", "", measured("gradient_stable_rank/mean", median)),
    Quantity("stable rank of the momentum, median", "", measured("momentum_stable_rank/mean", median)),
    Quantity("weight decay, largest", "", _largest_decay(peak)),
    Quantity("weight decay, final", "", _largest_decay(final)),
    Quantity("decisions about the weight decay", "", _decisions, show="{:.0f}".format),
    Quantity("warnings", "0", _warnings, above(0, math.inf), "the monitors warned: see the list", show="{:.0f}".format),
)

COST = (
    Quantity(
        "optimizer's share of the step",
        "under 20 %",
        measured("optimizer_share", median),
        above(0.2, 0.5),
        "the optimizer takes much of the step: larger batches, the preset optimizer/fast, or more devices",
        percent,
    ),
)
