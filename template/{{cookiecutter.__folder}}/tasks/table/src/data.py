"""The table: by default one that scikit-learn makes or has in its package, so that nothing needs to be downloaded."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_muon.data import TableDataModule


class TableData(TableDataModule):
    """The rows: from ``files``, or from a data set of scikit-learn.

    Args:
        dataset: ``friedman``: 4000 rows of Friedman's function of five numbers, with five more that say nothing, and
            noise of deviation 1, so that no prediction can have a smaller error. Small real ones: ``breast_cancer``,
            569 rows, 30 numbers, two classes; ``wine``, 178 rows, 13 numbers, three classes; ``diabetes``, 442 rows, 10
            numbers, and a number to predict.
        table: ``files``, ``target`` and the other options of ``TableDataModule``.
    """

    def __init__(
        self, dataset: Literal["friedman", "breast_cancer", "wine", "diabetes"] = "friedman", **table: Any
    ) -> None:
        super().__init__(**table)
        self.dataset = dataset

    def default_table(self) -> tuple[Mapping[str, Sequence[Any]], str, str]:
        """Return the columns of the data set, its name, and its target."""
        from sklearn import datasets  # noqa: PLC0415 - it takes a second

        if self.dataset == "friedman":
            numbers, target = datasets.make_friedman1(4000, noise=1.0, random_state=0)
            return {**{f"x{i + 1}": x for i, x in enumerate(numbers.T)}, "y": target}, self.dataset, "y"
        loaded = getattr(datasets, f"load_{self.dataset}")()
        columns = dict(zip(loaded.feature_names, loaded.data.T, strict=True))
        names = getattr(loaded, "target_names", None)
        target = loaded.target if names is None else names[loaded.target]
        return {**columns, "target": target}, self.dataset, "target"
