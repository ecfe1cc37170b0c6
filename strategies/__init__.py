"""Where the weights live: sharded over devices, and checkpoints that move between them.

Importing it makes ``Trainer(strategy="fsdp2")`` and ``--trainer.strategy fsdp2`` known.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_muon.strategies.blocks import BlockPolicy, find_blocks
from lightning_muon.strategies.checkpoint_folder import is_checkpoint_folder
from lightning_muon.strategies.consolidate import consolidate_checkpoint
from lightning_muon.strategies.fsdp1 import BlockWrapPolicy, check_resumable, clip_by_norm
from lightning_muon.strategies.fsdp2 import FSDP2Strategy

__all__ = [
    "BlockPolicy",
    "BlockWrapPolicy",
    "FSDP2Strategy",
    "check_resumable",
    "clip_by_norm",
    "consolidate_checkpoint",
    "find_blocks",
    "is_checkpoint_folder",
]

StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallelism on DTensors, of any module", override=True
)
