"""The table of quantities: what the callbacks log, what it means, where it is shown, what is healthy, what to do.

TensorBoard's page, the report, its curves, the advice in the warnings of the monitors and the tables in the docs are
made from it. A new quantity is one entry here, and the code that measures it. The entries of updates and of attention
stand in files of their own.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

from lightning_muon.report.attention_quantities import OF_ATTENTION
from lightning_muon.report.quantity import (
    Chart,
    Line,
    Panel,
    Quantity,
    Range,
    final,
    growth,
    late_growth,
    late_peak,
    lowest,
    peak,
)
from lightning_muon.report.tags import GLANCE, LIMITS, VERDICT, WATCH
from lightning_muon.report.update_quantities import OF_OPERATORS, OF_UPDATES

SUMMARY = "(max|mean|min)"
MORE_DECAY = "raise weight_decay or add AutoWeightDecay"
LOST = "bfloat16 weights lose updates"
LOSE_LESS = (
    "keep the weights in float32 (precision bf16-mixed), raise the learning rate, or make the weights smaller by weight"
    " decay (AutoWeightDecay)"
)
SINGULAR_VALUES = Chart(
    "Health", 7, "Singular values of the update: healthy up to 1.3", f"singular_value_(min|max)/{SUMMARY}"
)
CONDITION = Chart(
    "Health",
    11,
    "Condition of gradient and momentum, log10: 7 is lost rank",
    f"(gradient|momentum)_condition_log10/{SUMMARY}",
)
CONDITION_PANEL = Panel(
    9,
    "log10 of the condition number: gradient solid, momentum dashed",
    ("gradient_condition_log10/mean", "momentum_condition_log10/mean"),
)
STABLE_RANK = Chart("Health", 12, "Stable rank of gradient and momentum", f"(gradient|momentum)_stable_rank/{SUMMARY}")


def _two_curves(place: int, what: str, name: str, solid: str, dashed: str, shows_bound: bool = True) -> Panel:
    """Return the panel for two of the summaries of a quantity, such as ``max`` and ``mean``."""
    words = {"max": "largest", "mean": "mean", "min": "smallest"}
    title = f"{what}: {words[solid]} solid, {words[dashed]} dashed"
    return Panel(place, title, (f"{name}/{solid}", f"{name}/{dashed}"), shows_bound=shows_bound)


def _levelling_off(label: str, tag: str, problem: str) -> Line:
    """Return the line of a size that should not grow any more at the end of a run."""
    healthy, advice = Range("under 10 %", 0.1, bad=1.0), f"{problem} {MORE_DECAY}"
    label = f"{label}, growth in the last quarter"
    return Line(label, tag, late_growth, "{:+.1%}", healthy, advice, at_the_end=True)


# In the order of the docs and of the report.
QUANTITIES = (
    Quantity(
        tag="weight_rms/…",
        monitor="WeightRMSMonitor",
        meaning="root mean square of a matrix's entries, √mean(W′²)",
        unit="that of the weights",
        usual="grows, then levels off",
        healthy=Range("under 1", 1.0, bad=4.0),
        problem="the weights are large",
        advice=MORE_DECAY,
        chart=Chart("Health", 1, "Weight RMS: healthy under 1", f"weight_rms/{SUMMARY}"),
        panel=_two_curves(2, "weight RMS", "weight_rms", "max", "mean"),
        report=(
            Line("weight RMS, largest in the last quarter", "weight_rms/max", late_peak),
            Line("weight RMS, peak of the largest", "weight_rms/max", peak),
            Line("weight RMS, growth since the start", "weight_rms/max", growth, "×{:.3g}"),
            _levelling_off(
                "weight RMS", "weight_rms/max", "the weights still grow: harmless in a short run; in a long one"
            ),
        ),
    ),
    Quantity(
        tag="weight_absmax/…",
        monitor="WeightRMSMonitor",
        meaning="largest entry of a matrix in magnitude, max abs(W′)",
        unit="that of the weights",
        usual="a small multiple of the RMS",
        advice="find the layer by per_parameter, and clip gradients",
        chart=Chart("Health", 5, "Largest weight, a small multiple of the RMS", f"weight_absmax/{SUMMARY}"),
        report=(Line("largest weight", "weight_absmax/max", final),),
    ),
    Quantity(
        tag="doublings_to_overflow/…",
        monitor="WeightRMSMonitor",
        meaning="how often the largest entry can double before bfloat16 overflows, log₂(3.39·10³⁸ / max abs(W′))",
        unit="doublings",
        usual="about 126",
        healthy=Range("above 16", 16, bad=4),
        problem="the largest weight nears the end of bfloat16's range",
        advice=f"the run diverges; go back to a checkpoint, lower the learning rate, and {MORE_DECAY}",
        limit=16.0,
        chart=Chart(
            "bfloat16", 3, "Doublings to the overflow of bf16: healthy above 16", f"doublings_to_overflow/{SUMMARY}"
        ),
        report=(Line("doublings until bf16 overflows, fewest", "doublings_to_overflow/min", lowest, "{:.1f}"),),
    ),
    Quantity(
        tag="bf16_headroom/…",
        monitor="WeightRMSMonitor",
        meaning="size of the typical update beside the spacing of bfloat16 numbers, rms(W′ − W) / ulp(rms(W))",
        unit="bfloat16 spacings",
        usual="at the end of a schedule it goes to 0 with the learning rate",
        healthy=Range("above 1", 1.0, bad=0.5),  # under half a spacing the typical update is rounded away
        problem=LOST,
        advice=LOSE_LESS,
        chart=Chart("bfloat16", 1, "bf16 headroom: healthy above 1", f"bf16_headroom/{SUMMARY}"),
        panel=_two_curves(3, "bf16 headroom", "bf16_headroom", "min", "mean"),
        report=(Line("bf16 headroom, median of the smallest", "bf16_headroom/min", only_half_precision=True),),
    ),
    Quantity(
        tag="lost_updates/…",
        monitor="WeightRMSMonitor",
        meaning="fraction of entries that bfloat16 would leave unchanged, bf16(bf16(W) + (W′ − W)) = bf16(W)",
        unit="0 … 1",
        usual="near 0 where weights are bfloat16",
        problem=LOST,
        advice=LOSE_LESS,
        limit=0.5,
        chart=Chart("bfloat16", 2, "Fraction of updates that bfloat16 weights would lose", f"lost_updates/{SUMMARY}"),
        panel=_two_curves(5, "updates that bf16 would lose", "lost_updates", "mean", "max"),
        report=(Line("updates that bf16 would lose", "lost_updates/mean", write="{:.1%}"),),
    ),
    Quantity(
        tag="weight_bits",
        monitor="WeightRMSMonitor",
        meaning="bits in which the weights are kept, the fewest",
        unit="bits",
        usual="32 (`32-true`, `bf16-mixed`)",
        problem="at 16 bits updates are lost",
        advice="watch bf16_headroom and lost_updates",
    ),
    Quantity(
        tag="output_rms/…",
        monitor="WeightRMSMonitor",
        meaning="root mean square of a module's output y over all ranks, √mean(y²)",
        unit="that of the output",
        usual="levels off",
        # float16 ends at 65504; bfloat16 adds nothing under 256 to what is larger than that.
        healthy=Range("under 1000", 1e3, bad=65504.0),
        problem="the outputs are large, and what later layers add is rounded away",
        advice="normalize what goes in, lower the learning rate, or let the weights decay (AutoWeightDecay)",
        chart=Chart("Health", 2, "Layer output RMS: healthy under 1000", f"output_rms/{SUMMARY}"),
        panel=_two_curves(6, "layer output RMS", "output_rms", "max", "mean", shows_bound=False),
        report=(
            Line("layer output RMS, largest in the last quarter", "output_rms/max", late_peak),
            Line("layer output RMS, peak of the largest", "output_rms/max", peak),
            _levelling_off("layer output RMS", "output_rms/max", "the outputs still grow, and the weights with them:"),
        ),
    ),
    Quantity(
        tag="orthogonality_error/…",
        monitor="OrthogonalityMonitor",
        meaning="RMS deviation of σ² from one, over the singular values σ of the polar factor, ‖OᵀO − I‖_F / √r",
        unit="none; 0 is orthogonal",
        usual="about 0.4 in the mean",
        healthy=Range("up to 0.7", 0.7, bad=0.9),
        problem="near 1 the momentum has lost rank",
        advice="look at the gradients of the worst layer (per_parameter), or take an orthogonalizer that lifts small"
        " singular values",
        chart=Chart("Health", 3, "Orthogonality error: healthy up to 0.7", f"orthogonality_error/{SUMMARY}"),
        panel=_two_curves(4, "orthogonality error", "orthogonality_error", "mean", "max"),
        report=(
            Line("orthogonality error, median of the mean", "orthogonality_error/mean"),
            Line("orthogonality error, largest", "orthogonality_error/max", peak),
        ),
    ),
    Quantity(
        tag="singular_value_min/…",
        monitor="OrthogonalityMonitor",
        meaning="smallest singular value of O",
        unit="none; 1 is orthogonal",
        usual="about 0.7 where gradients have full rank; towards 0 where they do not",
        advice="as for orthogonality_error",
        chart=SINGULAR_VALUES,
        report=(Line("singular value of the update, smallest", "singular_value_min/min"),),
    ),
    Quantity(
        tag="singular_value_max/…",
        monitor="OrthogonalityMonitor",
        meaning="largest singular value of O",
        unit="none; 1 is orthogonal",
        usual="about 1.2",
        # Five steps of Newton-Schulz with Jordan's coefficients end at 1.2024 at most; the rest is room for rounding,
        # and for optimizers whose scale is not known.
        healthy=Range("up to 1.3", 1.3, bad=2.0, origin=1.0),
        problem="the iteration for the polar factor diverges",
        advice="take its default options, or another orthogonalizer",
        chart=SINGULAR_VALUES,
        report=(Line("singular value of the update, largest", "singular_value_max/max"),),
    ),
    *OF_OPERATORS,
    *OF_UPDATES,
    Quantity(
        tag="weight_decay/<group>",
        monitor="AutoWeightDecay",
        meaning="decay that each step takes, λ; with `per: matrix` the mean over the group's matrices",
        unit="1 / learning rate",
        usual="constant, or on its way to a level",
        problem="at its upper bound while the RMS is over the target",
        advice="lower the learning rate, or raise bounds",
        chart=Chart("Health", 4, "Weight decay", r"weight_decay/.+"),
        panel=Panel(7, "weight decay", ("weight_decay/.+",)),
        report=(
            Line("weight decay, largest", "weight_decay/.+", peak),
            Line("weight decay, final", "weight_decay/.+", final),
        ),
    ),
    *OF_ATTENTION,
    *(
        Quantity(
            tag=f"{source}_condition_log10/…",
            monitor="GradientMonitor",
            meaning=f"condition number of the {source}, log₁₀ κ with κ = σ_max / σ_min, from 0 to 7",
            unit="powers of ten",
            usual="no fixed range: it is what the polar factor removes",
            problem="rank is lost if it stays at 7, where it ends",
            advice="look for dead units, or for a batch that is smaller than the matrix",
            chart=CONDITION,
            panel=CONDITION_PANEL,
            report=(Line(f"condition number of the {source}, log10, median", f"{source}_condition_log10/mean"),),
        )
        for source in ("gradient", "momentum")
    ),
    *(
        Quantity(
            tag=f"{source}_stable_rank/…",
            monitor="GradientMonitor",
            meaning=f"number of directions that carry the {source} G, ‖G‖_F² / σ_max², from 1 to r",
            unit="directions",
            usual=usual,
            problem=f"near 1 a single direction carries the {source}",
            advice="look at what goes into that layer",
            chart=STABLE_RANK,
            report=(Line(f"stable rank of the {source}, median", f"{source}_stable_rank/mean"),),
        )
        for source, usual in (("gradient", "above 1"), ("momentum", "well above 1"))
    ),
    Quantity(
        tag="expert_balance/…",
        monitor="GradientMonitor",
        meaning="how alike a layer's experts are trained: RMS of the gradient of the least over the mean RMS of all",
        unit="0 … 1; 1 is alike, 0 an expert without a token",
        problem="at 0 an expert of the layer gets no tokens",
        advice="raise the weight of the balance loss, or the batch; per_parameter logs each layer",
        chart=Chart(
            "Updates", 15, "Experts: gradient of the least over the mean, 0 gets no token", rf"expert_balance/{SUMMARY}"
        ),
        report=(Line("experts, gradient of the least over the mean, median of the worst layer", "expert_balance/min"),),
    ),
    Quantity(
        tag="optimizer_share",
        monitor="OptimizerTimeMonitor",
        meaning="time from the last gradient to the updated weights, clipping included, over the time of the step",
        unit="0 … 1",
        # A matter of width and batch, not of health: Newton-Schulz costs at most T m / B of the model's own FLOPs, with
        # T its steps, m the width and B the tokens or pixels of a batch (https://kellerjordan.github.io/posts/muon/).
        # That is under 1 % of a large model, and 10 % and more of a small one that trains in seconds.
        healthy=Range("under 20 %", 0.2, beyond="costly"),
        problem="the optimizer takes much of the step",
        advice="take larger batches, the preset optimizer/fast, or more devices",
        chart=Chart("Cost", 1, "Optimizer's share of the step", r"optimizer_share(/.+)?"),
        panel=Panel(10, "optimizer's share of the step", ("optimizer_share",)),
        report=(Line("optimizer's share of the step", "optimizer_share", write="{:.1%}"),),
    ),
    Quantity(
        tag="optimizer_state/bytes",
        monitor="OptimizerTimeMonitor",
        meaning="memory of the optimizer's state on rank 0, once a run",
        unit="bytes",
        usual="4 a parameter with Muon's momentum in float32, 8 with AdamW's moments",
        advice="take the preset optimizer/int8, or shard the state: shard_state, strategy/fsdp2",
        report=(Line("optimizer's state, bytes", "optimizer_state/bytes", final, "{:,.0f}"),),
    ),
    Quantity(
        tag="throughput/samples_per_second",
        monitor="SpeedMonitor",
        meaning="samples of all ranks a second, without validation",
        unit="samples per second",
        advice="find what takes the time by the presets of configs/profiler",
        report=(Line("samples per second", "throughput/samples_per_second"),),
    ),
    Quantity(
        tag="throughput/tokens_per_second",
        monitor="SpeedMonitor",
        meaning="samples per second times the tokens of a sample",
        unit="tokens per second",
        advice="find what takes the time by the presets of configs/profiler",
        chart=Chart("Cost", 3, "Tokens per second", r"throughput/tokens_per_second"),
        report=(Line("tokens per second", "throughput/tokens_per_second", write="{:,.0f}"),),
    ),
    Quantity(
        tag="throughput/tflops",
        monitor="SpeedMonitor",
        meaning="floating-point operations of the model on one device a second",
        unit="10¹² per second",
        advice="find what takes the time by the presets of configs/profiler",
    ),
    Quantity(
        tag="throughput/mfu",
        monitor="SpeedMonitor",
        meaning="those operations over the device's peak (model FLOPs utilization)",
        unit="0 … 1",
        usual="0.3 to 0.5 for a large model in bfloat16",
        advice="take larger batches, precision bf16-mixed, or --model.compile true",
        chart=Chart("Cost", 4, "Model FLOPs utilization", r"throughput/mfu"),
        report=(Line("model FLOPs utilization", "throughput/mfu", write="{:.1%}"),),
    ),
    Quantity(
        tag="hyperparameter/<name>/<group>",
        monitor="HyperparameterSchedule",
        meaning="value for the step of a scheduled hyperparameter, such as `momentum` or `weight_decay`",
        unit="that of the hyperparameter",
        usual="a curve through the `points` of the schedule",
        advice="read the text of the same name: it has the points as steps of the run",
        chart=Chart("Training", 4, "Scheduled hyperparameters", r"hyperparameter/.+"),
        report=(Line("scheduled {group}, final", r"hyperparameter/.+", final),),
    ),
    Quantity(
        tag="went_bad",
        monitor="RunGuard",
        meaning="step from which on the run was not finite, which ended it",
        unit="steps",
        healthy=Range("never", -1, bad=-1),
        problem="a gradient or a weight was not finite",
        advice="go on from the checkpoint that the warning names, with a lower learning rate or RunGuard(mode='skip')",
        report=(Line("not finite from step", "went_bad", final, "{:.0f}", of_any_length=True),),
    ),
    Quantity(
        tag="skipped_steps",
        monitor="RunGuard",
        meaning="steps that were skipped because their gradient was not finite",
        unit="steps",
        healthy=Range("0", 0, bad=9),
        problem="some gradients were not finite",
        advice="look at the batches of the steps that the warnings name, and lower the learning rate",
        report=(Line("skipped steps", "skipped_steps", final, "{:.0f}", of_any_length=True),),
    ),
    Quantity(
        tag="gradient_spikes",
        monitor="RunGuard",
        meaning="steps of the last 1000 in which the norm of the whole gradient was in a spike",
        unit="steps",
        # Spikes come in most runs (SPAM, arXiv 2501.06842), and clipping limits each. With momentum
        # 0.95 one acts on about 1 / (1 - 0.95) = 20 steps: five spoil a tenth of 1000.
        healthy=Range("up to 5", 5),
        problem="the gradient often is far larger than usual",
        advice="look at the batches of the steps that RunGuard names, lower the learning rate, or clip",
        report=(Line("gradient spikes within 1000 steps, most", "gradient_spikes", peak, "{:.0f}"),),
    ),
)


# Quantities with several tags, in an alternation. It is part of the pattern of the chart of losses; TensorBoard merges
# the charts of several runs only if their patterns are the same, so an entry should not change its place in the table.
NAMES = "|".join(quantity.name for quantity in QUANTITIES if "/" in quantity.tag)

# A loss is any tag with the word in it, such as `train/loss`, `val_loss`, `Loss/train`, `training_loss`, except in the
# name of a matrix or a group. The `^` keeps the search from starting behind what looks like a prefix, as in
# `lr-loss_head`.
LOSS = rf"^(?!(.+-)?(lr-|({NAMES}|{GLANCE}|{WATCH}|{VERDICT}|{LIMITS})/)).*[Ll]oss.*"
_VALIDATION = r"(.*[/_.-])?(val|valid|validation|eval)([/_.-]|$)"
# The template also logs the loss of a model that only knows frequencies, for comparison.
OWN_LOSS = rf"(?!.*unigram){LOSS}"
VALIDATION_LOSS = rf"(?={_VALIDATION}){OWN_LOSS}"
OTHER_LOSS = rf"(?!{_VALIDATION}){OWN_LOSS}"

LEARNING_RATE = r"lr-.+(?<!-momentum)(?<!-weight_decay)"


def quantity(name: str) -> Quantity:
    """Return the entry of a quantity, by the part of its tag before the slash."""
    return next(entry for entry in QUANTITIES if entry.name == name)


def matching(tags: Iterable[str], pattern: str) -> list[str]:
    """Return the tags that a pattern matches as a whole, each once, in their order."""
    return [*_matching(tuple(tags), pattern)]


@lru_cache(maxsize=512)  # a run is judged at each log by the same tags
def _matching(tags: tuple[str, ...], pattern: str) -> tuple[str, ...]:
    whole = re.compile(pattern)
    return tuple(tag for tag in dict.fromkeys(tags) if whole.fullmatch(tag))
