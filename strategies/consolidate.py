"""From a sharded checkpoint to one plain file."""

from pathlib import Path

import torch

from lightning_muon.strategies.checkpoint_folder import is_checkpoint_folder, read_checkpoint_folder
from lightning_muon.strategies.optimizer_state import numbered


def consolidate_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Turn a sharded checkpoint into one file, as one device writes it; in one process, without a GPU.

    The file holds the same weights, optimizer states and progress. It loads on one device, under DDP and under fsdp2.

    Args:
        folder: The sharded checkpoint.
        file: Where to write; it must not exist.

    Raises:
        FileNotFoundError: If the folder is no sharded checkpoint.
        FileExistsError: If there is something at ``file``.
    """
    folder, file = Path(folder), Path(file)
    if not is_checkpoint_folder(folder):
        raise FileNotFoundError(f"'{folder}' is no sharded checkpoint: it has no meta.pt or no .metadata")
    if file.exists():
        raise FileExistsError(f"'{file}' exists already: give another name")
    checkpoint = read_checkpoint_folder(folder)
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [numbered(state) for state in checkpoint["optimizer_states"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, file)
