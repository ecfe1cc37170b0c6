"""Entries of the table of quantities: logits of attention."""

from lightning_muon.report.quantity import Chart, Line, Panel, Quantity, Range, final, peak

OF_ATTENTION = (
    Quantity(
        tag="attention_logit/…",
        monitor="AttentionLogitMonitor",
        meaning="largest logit of a head, as it goes into the softmax: q·k times the scale, usually 1/√d, masked",
        unit="none",
        usual="levels off; with QK-norm by rms_norm at most √d",
        # Kimi K2 was trained with at most 100, arXiv:2507.20534, section 2.1; without, Muon's went past 1000 there.
        healthy=Range("under 100", 100.0, bad=1000.0),
        problem="the softmax of a head takes one key alone, and the run may diverge",
        advice="normalize queries and keys (QK-norm), lower the learning rate, or add QKClip",
        limit=100.0,
        chart=Chart("Attention", 1, "Largest attention logit: under 100", r"attention_logit/(max|mean|min)"),
        panel=Panel(11, "attention logit: largest solid, mean dashed", ("attention_logit/max", "attention_logit/mean")),
        report=(
            Line("attention logit, peak of the largest", "attention_logit/max", peak),
            Line("attention logit, final of the largest", "attention_logit/max", final),
        ),
    ),
    Quantity(
        tag="attention_limit_step",
        monitor="AttentionLogitMonitor",
        meaning="step at which the first head reaches the limit, by a straight line through its last values; only while"
        " one grows",
        unit="steps",
        usual="far behind the end of the run, and moving away",
        advice="as for attention_logit, before the step comes",
    ),
    Quantity(
        tag="clipped_heads",
        monitor="QKClip",
        meaning="heads whose queries and keys were rescaled since the last log, because a logit was over the limit τ",
        unit="heads",
        usual="0; some at a high learning rate, fewer later",
        advice="lower the learning rate where most heads are clipped all the time",
        chart=Chart("Attention", 2, "Heads clipped by QKClip: fewer with time", r"clipped_heads"),
        report=(Line("heads clipped at once, most", "clipped_heads", peak, "{:.0f}"),),
    ),
)
