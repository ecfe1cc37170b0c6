"""Less noise: what Lightning prints in every run, and no user of this program can act upon."""

import logging
import warnings


def hush_lightning(*, fitting: bool) -> None:
    """Leave out Lightning's advertisements, and warnings about what it does itself.

    Args:
        fitting: Whether checkpoints will be saved. If not, it does not matter that the folder for them is another one.
    """
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    if not fitting:
        warnings.filterwarnings("ignore", message="The dirpath has changed")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in str(record.msg)
