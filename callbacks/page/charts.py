"""The charts of TensorBoard's Custom Scalars page: which there are, in what order, and the tags on each."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

SUMMARY = "(max|mean|min)"

# What the monitors log, under names of parameters and modules too, in which any word may stand.
QUANTITIES = (
    "weight_rms|weight_absmax|doublings_to_overflow|bf16_headroom|lost_updates|output_rms|orthogonality_error"
    "|singular_value_min|singular_value_max|update_rms|parameter_update_rms|weight_decay"
    "|gradient_condition|momentum_condition|gradient_stable_rank|momentum_stable_rank"
)
# A loss is what its owner calls one: `train/loss`, `val_loss`, `Loss/train`, `training_loss`.
# The first sign keeps what looks like a prefix, as the beginning of `lr-loss_head` does, from being passed over.
LOSS = rf"^(?!(.+-)?(lr-|({QUANTITIES})/)).*[Ll]oss.*"

# What `torch.utils.tensorboard.SummaryWriter.add_custom_scalars` takes: category → title → [kind, regexes].
Layout = dict[str, dict[str, list[str | list[str]]]]


@dataclass(frozen=True)
class Chart:
    """One chart.

    Args:
        category: The section of the page that it stands in.
        title: What stands above it: the quantity, and what to look for.
        tags: Regular expression for the whole of each tag that it draws.
    """

    category: str
    title: str
    tags: str

    @property
    def pattern(self) -> str:
        """The expression as TensorBoard takes it, which looks for a tag's beginning only; a logger may add a prefix."""
        return f"(.+-)?({self.tags})$"

    def draws(self, tags: Iterable[str]) -> bool:
        """Whether there is something to draw among tags."""
        return any(re.match(self.pattern, tag) for tag in tags)


# Health first, then training, then cost. An expression for a whole quantity would draw a line for every parameter.
CHARTS = (
    Chart("Health", "Weight RMS: grows, then levels off", f"weight_rms/{SUMMARY}"),
    Chart("Health", "bf16 headroom: above 1 where weights are bfloat16", f"bf16_headroom/{SUMMARY}"),
    Chart("Health", "Orthogonality error: about 0.4, near 1 rank is lost", f"orthogonality_error/{SUMMARY}"),
    Chart("Health", "Weight decay: a ramp is AutoWeightDecay at work", r"weight_decay/.+"),
    Chart("Health", "Largest weight: a small multiple of the RMS", f"weight_absmax/{SUMMARY}"),
    Chart("Health", "Layer output RMS: levels off", f"output_rms/{SUMMARY}"),
    Chart("Health", "Singular values of the update: largest up to 1.3", f"singular_value_(min|max)/{SUMMARY}"),
    Chart("Health", "Update RMS: Muon's as large as AdamW's", r"update_rms/.+"),
    Chart("Health", "Fraction of updates that bfloat16 weights would lose", f"lost_updates/{SUMMARY}"),
    Chart("Health", "Room to bf16's overflow, in doublings", f"doublings_to_overflow/{SUMMARY}"),
    Chart("Health", "Condition of gradient and momentum: use log scale", f"(gradient|momentum)_condition/{SUMMARY}"),
    Chart("Health", "Stable rank of gradient and momentum", f"(gradient|momentum)_stable_rank/{SUMMARY}"),
    Chart("Training", "Loss", LOSS),
    Chart("Training", "Other validation metrics", r"(val|valid|validation|eval)[/_](?!.*[Ll]oss).+"),
    Chart("Training", "Learning rate", r"lr-.+(?<!-momentum)(?<!-weight_decay)"),
    Chart("Cost", "Optimizer's share of the step", r"optimizer_share(/.+)?"),
    Chart("Cost", "Batches per second", r"(train|device)[|/]batches_per_sec(ond)?"),
    Chart("Cost", "Samples per second", r"(train|device)[|/]samples_per_sec(ond)?"),
)


def layout(tags: Iterable[str]) -> Layout:
    """Return the layout of the page for the tags that a run has logged; charts without tags are left out.

    A chart is the same whatever else is on the page, so that TensorBoard can merge the pages of several runs.
    """
    tags = list(tags)
    page: Layout = {}
    for chart in CHARTS:
        if chart.draws(tags):
            page.setdefault(chart.category, {})[chart.title] = ["Multiline", [chart.pattern]]
    return page
