"""Plots of the runs: loss, condition number and nuclear norm of the gradient."""

from pathlib import Path

from benchmarks.matrix_problems.training import Curve

PANELS = [
    ("loss", ""),
    ("condition", "condition number of the gradient"),
    ("nuclear_norm", "nuclear norm of the gradient"),
]
SUFFIX = ", lr decay"


def plot(title: str, loss_label: str, curves: dict[str, Curve], path: Path) -> str:
    """Draw three panels over the steps: one colour per method, dashed with learning rate decay.

    Args:
        title: Title of the figure.
        loss_label: Title of the first panel.
        curves: The curve of each method.
        path: File of the plot.

    Returns:
        A message with the path of the plot, or the reason why there is none.
    """
    try:
        import matplotlib  # noqa: PLC0415
    except ModuleNotFoundError:
        return "No plots without matplotlib: pip install 'lightning-muon[bench]'"
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    methods = list(dict.fromkeys(name.removesuffix(SUFFIX) for name in curves))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(15, 4.6), layout="constrained")
    for axis, (quantity, label) in zip(axes, PANELS, strict=True):
        for name, curve in curves.items():
            axis.semilogy(
                curve.step,
                getattr(curve, quantity),
                label=name,
                color=f"C{methods.index(name.removesuffix(SUFFIX))}",
                linestyle="--" if name.endswith(SUFFIX) else "-",
                linewidth=1.4,
            )
        axis.set_title(label or loss_label, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=12)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return f"{title}: {path}"
