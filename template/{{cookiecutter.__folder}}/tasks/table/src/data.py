"""The table: by default one that scikit-learn has in its package, so that nothing needs to be downloaded."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning_muon.data import TableDataModule


class TableData(TableDataModule):
    """The rows: from ``files``, or from a data set of scikit-learn.

    Args:
        dataset: ``breast_cancer``: 569 rows, 30 numbers, two classes. ``wine``: 178 rows, 13 numbers, three classes.
            ``diabetes``: 442 rows, 10 numbers, and a number to predict.
        table: ``files``, ``target`` and the other options of ``TableDataModule``.
    """

    def __init__(self, dataset: Literal["breast_cancer", "wine", "diabetes"] = "breast_cancer", **table: Any) -> None:
        super().__init__(**table)
        self.dataset = dataset

    def default_table(self) -> tuple[Mapping[str, Sequence[Any]], str, str]:
        """Return the columns of the data set, its name, and its target."""
        from sklearn import datasets  # noqa: PLC0415 - it takes a second

        loaded = getattr(datasets, f"load_{self.dataset}")()
        columns = dict(zip(loaded.feature_names, loaded.data.T, strict=True))
        names = getattr(loaded, "target_names", None)
        target = loaded.target if names is None else names[loaded.target]
        return {**columns, "target": target}, self.dataset, "target"
