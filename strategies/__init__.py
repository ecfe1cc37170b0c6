"""Where the weights live: sharding a model over devices, and checkpoints that load under any of these layouts.

- ``fsdp2``: ``FSDP2Strategy``, which shards any module with torch's ``fully_shard``.
- ``fsdp1``: additions to Lightning's ``FSDPStrategy``: ``BlockWrapPolicy``, ``clip_by_norm``, ``check_resumable``,
  ``protect_checkpoints``.
- ``blocks``: ``find_blocks``, the modules that both of them shard one by one.
- ``checkpoint_io``: ``AtomicCheckpointIO``, checkpoints of one file; ``AsyncAtomicCheckpointIO``, in the background.
- ``checkpoint_folder``: sharded checkpoints: splitting, reading, ``consolidate_checkpoint``.
- ``folder_writer``: sharded checkpoints: writing them together, with checksums.
- ``atomic``: files and folders that get their final name when they are complete; what a kill leaves.
- ``integrity``: whether the bytes of a checkpoint are those that were saved.
- ``metadata``: reading ``.metadata`` without running code.
- ``averages``: averaged weights of Lightning's callbacks, sharded; ``hyperparameters``: those that can be saved.
- ``model_state``: tensors sharded and gathered, and the loading of weights.
- ``weights``: ``read_weights``, the weights in any checkpoint or file of weights.
- ``start``: ``start_from``, a module begun with such weights.
- ``optimizer_state``: the state of any optimizer, by the names of its parameters.
- ``scheduler_state``: ``follow_groups``, for schedulers that resume in other parameter groups.

Importing this package registers ``FSDP2Strategy`` for ``Trainer(strategy="fsdp2")`` and ``--trainer.strategy fsdp2``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_muon.strategies.atomic import SaveError, clear_leftovers
from lightning_muon.strategies.blocks import BlockPolicy, find_blocks
from lightning_muon.strategies.checkpoint_folder import consolidate_checkpoint, find_whole
from lightning_muon.strategies.checkpoint_io import AsyncAtomicCheckpointIO, AtomicCheckpointIO, use_atomic_checkpoints
from lightning_muon.strategies.fsdp1 import BlockWrapPolicy, check_resumable, clip_by_norm, protect_checkpoints
from lightning_muon.strategies.fsdp2 import FSDP2Strategy
from lightning_muon.strategies.integrity import DamagedCheckpointError, check_whole, is_checkpoint_folder, is_whole
from lightning_muon.strategies.metadata import UnsafeCheckpointError
from lightning_muon.strategies.scheduler_state import follow_groups
from lightning_muon.strategies.start import start_from
from lightning_muon.strategies.weights import SavedWeights, find_ties, read_weights

__all__ = [
    "AsyncAtomicCheckpointIO",
    "AtomicCheckpointIO",
    "BlockPolicy",
    "BlockWrapPolicy",
    "DamagedCheckpointError",
    "FSDP2Strategy",
    "SaveError",
    "SavedWeights",
    "UnsafeCheckpointError",
    "check_resumable",
    "check_whole",
    "clear_leftovers",
    "clip_by_norm",
    "consolidate_checkpoint",
    "find_blocks",
    "find_ties",
    "find_whole",
    "follow_groups",
    "is_checkpoint_folder",
    "is_whole",
    "protect_checkpoints",
    "read_weights",
    "start_from",
    "use_atomic_checkpoints",
]

StrategyRegistry.register(
    "fsdp2", FSDP2Strategy, description="Fully sharded data parallelism of any module, on DTensors", override=True
)
