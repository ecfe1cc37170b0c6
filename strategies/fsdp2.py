"""``FSDP2Strategy``: shard any model with torch's ``fully_shard``, and save checkpoints that load anywhere."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.strategies.fsdp import _move_torchmetrics_to_device
from lightning.fabric.utilities.init import _materialize_distributed_module
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.strategies.averages import (
    TRAINED_WEIGHTS,
    averages_of,
    check_callbacks,
    gathered_averages,
    laid_out,
    shard_averages,
)
from lightning_muon.strategies.blocks import BlockPolicy, check_complete, find_blocks, is_sharded
from lightning_muon.strategies.checkpoint_folder import (
    find_whole_together,
    read_checkpoint_folder,
    write_checkpoint_folder,
)
from lightning_muon.strategies.checkpoint_io import AsyncAtomicCheckpointIO, AtomicCheckpointIO, snapshot
from lightning_muon.strategies.hyperparameters import warn_of_modules, without_modules
from lightning_muon.strategies.integrity import is_checkpoint_folder
from lightning_muon.strategies.metadata import not_plain
from lightning_muon.strategies.model_state import gather, load_model_state
from lightning_muon.strategies.optimizer_state import gathered, matched, named_state
from lightning_muon.strategies.scheduler_state import follow_groups

Output = TypeVar("Output")

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class FSDP2Strategy(ModelParallelStrategy):
    r"""Shard parameters, gradients and optimizer state over all devices with torch's ``fully_shard`` (FSDP2).

    The module needs no ``configure_model``: it is made as for one device. Then each of its blocks is sharded on its
    own, so that only one or two of them are gathered at a time, and the rest is sharded together. ``training_step`` and
    the other steps may call any method of any submodule. If ``configure_model`` itself shards something, with
    ``self.device_mesh["data_parallel"]``, the strategy shards nothing more.

    ``--trainer.precision bf16-mixed`` keeps and updates the weights in float32, gathers them in bfloat16, and reduces
    gradients in float32. ``bf16-true``, ``16-true``, ``32-true`` and ``64-true`` use that type for everything.

    Checkpoints load under any number of devices. Those of one device and of DDP load here, and files written with
    ``state_dict_type="full"`` load there: weights and optimizer state, exactly.

    Of Lightning's callbacks ``WeightAveraging`` and ``EMAWeightAveraging`` average the shards;
    ``StochasticWeightAveraging`` is refused. Modules among the saved hyperparameters are left out of checkpoints.

    Args:
        blocks: Which modules are sharded on their own: class names, such as ``["Block"]``, or a function
            ``(name, module) -> bool``. Default: the layers that repeat, see
            :func:`~lightning_muon.strategies.find_blocks`.
        replicate_size: Number of replicas of the model (HSDP), each sharded over neighbouring devices. If it is the
            number of nodes, shards stay inside a node, and only gradients travel between nodes.
        reshard_after_forward: Free the gathered weights of a block after its forward and gather them again for its
            backward: less memory, more communication (ZeRO-3). ``False`` keeps them gathered (ZeRO-2).
        accumulate_sharded: Reduce the gradients after each accumulated batch, instead of once after the last: less
            memory, because no rank keeps full gradients, and more communication.
        find_unused_parameters: Set it if a rank may not use a parameter that another rank uses, such as an expert
            without a token. A missing gradient then counts as zero, even if no rank has one. Needs torch 2.13.
        cpu_offload: Keep weights, gradients and optimizer state in CPU memory, and update them there.
        state_dict_type: ``"sharded"``: a checkpoint is a folder to which each rank writes its shards. ``"full"``: it is
            one file, as from one device, gathered on rank 0.
        process_group_backend: Default: ``nccl`` on GPUs, ``gloo`` on CPUs.
        timeout: Limit for the duration of a collective.

    Raises:
        ValueError: If an argument has an invalid value. When training starts: if a block is not found,
            ``replicate_size`` does not divide the world size, or the precision is not one of the above.
    """

    def __init__(
        self,
        blocks: list[str] | BlockPolicy | None = None,
        replicate_size: int = 1,
        reshard_after_forward: bool = True,
        accumulate_sharded: bool = False,
        find_unused_parameters: bool = False,
        cpu_offload: bool = False,
        state_dict_type: Literal["sharded", "full"] = "sharded",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if replicate_size < 1:
            raise ValueError(f"replicate_size must be at least 1, got {replicate_size}")
        if state_dict_type not in {"sharded", "full"}:
            raise ValueError(f"state_dict_type must be 'sharded' or 'full', got {state_dict_type!r}")
        if find_unused_parameters and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ValueError(f"find_unused_parameters needs torch 2.13, this is {torch.__version__}")
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.blocks = blocks
        self.replicate_size = replicate_size
        self.reshard_after_forward = reshard_after_forward
        self.accumulate_sharded = accumulate_sharded
        self.find_unused_parameters = find_unused_parameters
        self.cpu_offload = cpu_offload
        self.state_dict_type = state_dict_type
        self._background_group: dist.ProcessGroup | None = None

    @property
    @override
    def checkpoint_io(self) -> CheckpointIO:
        """What saves and loads files, :class:`AtomicCheckpointIO` unless it was given."""
        if self._checkpoint_io is None:
            self._checkpoint_io = AtomicCheckpointIO()
        return super().checkpoint_io

    @checkpoint_io.setter
    @override
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io

    @override
    def setup_environment(self) -> None:
        check_callbacks(self._trainer)
        ParallelStrategy.setup_environment(self)
        if self.cpu_offload and self.root_device.type == "cpu":
            rank_zero_warn("cpu_offload has no effect: the accelerator is the CPU")
            self.cpu_offload = False
        if self.cpu_offload and self._process_group_backend is None:
            # The norms of gradients on the CPU are reduced there.
            self._process_group_backend = f"cpu:gloo,{self.root_device.type}:nccl"
        self._setup_distributed()
        if self._device_mesh is None:
            self._device_mesh = self._make_mesh()
        cast("LightningModule", self.lightning_module)._device_mesh = self._device_mesh

    def _make_mesh(self) -> DeviceMesh:
        """Make the mesh: ``data_parallel`` over all devices; with replicas, also ``replicate`` and ``shard``."""
        if self.world_size % self.replicate_size:
            raise ValueError(f"replicate_size {self.replicate_size} does not divide the {self.world_size} devices")
        if self.replicate_size == 1:
            return init_device_mesh(self.root_device.type, (self.world_size,), mesh_dim_names=("data_parallel",))
        shape = (self.replicate_size, self.world_size // self.replicate_size)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
        mesh._flatten("data_parallel")
        return mesh

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    @property
    def _root(self) -> nn.Module:
        return cast("nn.Module", self.model)

    @property
    def _trainer(self) -> Trainer:
        return cast("LightningModule", self.lightning_module).trainer

    @override
    def setup(self, trainer: Trainer) -> None:
        policy = _mixed_precision(self.precision_plugin)
        cast("Accelerator", self.accelerator).setup(trainer)
        _turn_inference_mode_off(trainer)
        self.model = self.precision_plugin.convert_module(self._root)
        if not is_sharded(self._root):
            self._shard(self._root, policy)
        elif self.world_size > 1:
            check_complete(self._root)
        _materialize_distributed_module(self._root, self.root_device)
        self._move_to_device()
        shard_averages(averages_of(trainer), self._root, self.root_device)
        self.barrier()
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting and not self.cpu_offload:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self, model: nn.Module, policy: MixedPrecisionPolicy) -> None:
        options: dict[str, Any] = {"mesh": self.device_mesh, "mp_policy": policy}
        if self.cpu_offload:
            options["offload_policy"] = CPUOffloadPolicy()
        blocks = find_blocks(model, self.blocks)
        self._broadcast_weights(model)
        for block in blocks:
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **options)
        # The rest is used at both ends of the model: it would be freed only to be gathered again immediately.
        fully_shard(model, reshard_after_forward=False, **options)
        if self.find_unused_parameters:
            cast("FSDPModule", model).set_reduce_scatter_unused_params(True)
        for step in _STEPS:
            register_fsdp_forward_method(model, step)

    def _broadcast_weights(self, model: nn.Module) -> None:
        """Copy the weights of rank 0 to all ranks: each rank keeps one shard, and the shards must fit together."""
        for tensor in chain(model.parameters(), model.buffers()):
            if not tensor.is_meta:
                on_device = tensor.detach().to(self.root_device).contiguous()
                dist.broadcast(on_device, src=0)
                tensor.data.copy_(on_device)

    def _move_to_device(self) -> None:
        """Move the module to the device; with ``cpu_offload`` all but the shards, which stay on the CPU."""
        if not self.cpu_offload:
            self._root.to(self.root_device)
            return
        for buffer in self._root.buffers():
            buffer.data = buffer.data.to(self.root_device)
        _move_torchmetrics_to_device(self._root, self.root_device)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._resharded(super().validation_step(*args, **kwargs))

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return self._resharded(super().test_step(*args, **kwargs))

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._resharded(super().predict_step(*args, **kwargs))

    def _resharded(self, output: Output) -> Output:
        """Free what no backward will need. Otherwise ``parameters()`` returns gathered tensors, not the shards."""
        self._reshard()
        return output

    def _reshard(self) -> None:
        for module in self._sharded_modules():
            module.reshard()

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Accumulate gradients without reducing them, except with ``accumulate_sharded``."""
        if self.accumulate_sharded:
            yield
            return
        for module in self._sharded_modules():
            module.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for module in self._sharded_modules():
                module.set_requires_gradient_sync(True, recurse=False)

    def _sharded_modules(self) -> list[FSDPModule]:
        return [module for module in self._root.modules() if isinstance(module, FSDPModule)]

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights, sharded; or full and on rank 0 only. A collective."""
        state = self._root.state_dict()
        if self.state_dict_type == "sharded":
            return state
        full = {name: gather(value, keep=self.is_global_zero) for name, value in state.items()}
        return full if self.is_global_zero else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state, sharded and by parameter name; or full and numbered, on rank 0 only. A collective."""
        self._reshard()
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = named_state(inner, self._root)
        return state if self.state_dict_type == "sharded" else gathered(state, keep=self.is_global_zero)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        checkpoint = self._without_modules(checkpoint)
        if self.state_dict_type == "full":
            if TRAINED_WEIGHTS in checkpoint:
                checkpoint = gathered_averages(checkpoint, keep=self.is_global_zero)
            ParallelStrategy.save_checkpoint(self, checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise TypeError("storage_options has no effect on a sharded checkpoint, which is a folder")
        plugin = self.checkpoint_io
        if not isinstance(plugin, AsyncAtomicCheckpointIO):
            write_checkpoint_folder(checkpoint, path)
            return
        plugin.join()
        if self._background_group is None:
            # Of its own: the collectives of a save are not those of training, and are on CPU tensors.
            self._background_group = dist.new_group(backend="gloo")
        plugin.start(partial(write_checkpoint_folder, snapshot(checkpoint), path, self._background_group))

    def _without_modules(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        checkpoint, dropped = without_modules(checkpoint)
        if dropped:
            warn_of_modules(dropped)
        return checkpoint

    @override
    def teardown(self) -> None:
        """Wait for a save in the background, which Lightning's strategy does not, and release the devices."""
        try:
            self.checkpoint_io.teardown()
        finally:
            super().teardown()

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        if isinstance(self.checkpoint_io, AsyncAtomicCheckpointIO):
            self.checkpoint_io.join()
        find_whole_together(path)
        checkpoint = self._read(path, weights_only)
        return laid_out(checkpoint, self._root) if averages_of(self._trainer) else checkpoint

    def _read(self, path: Path, weights_only: bool | None) -> dict[str, Any]:
        if is_checkpoint_folder(path):
            return read_checkpoint_folder(
                path, self._root.state_dict(), optimizers=bool(self.optimizers), weights_only=weights_only
            )
        if path.is_dir():
            raise ValueError(f"'{path}' is a folder, but no sharded checkpoint: it has no meta.pt or no .metadata")
        try:
            # Memory-mapped: each rank reads only its own shards.
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        except UnpicklingError as error:
            raise not_plain(path, error) from None
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        load_model_state(self._root, checkpoint["state_dict"], strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        callbacks: list[Callback] = self._trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, BaseFinetuning):
                # It adds the groups of unfrozen parts here, but with this strategy its state is restored only later.
                BaseFinetuning.on_fit_start(callback, self._trainer, cast("LightningModule", self.lightning_module))
        if states and len(states) != len(self.optimizers):
            raise ValueError(f"the checkpoint has {len(states)} optimizers, the module {len(self.optimizers)}")
        # All are matched before the first is loaded: after a mismatch nothing has changed.
        fitting = [(opt, matched(saved, opt, self._root)) for opt, saved in zip(self.optimizers, states, strict=False)]
        for optimizer, state in fitting:
            optimizer.load_state_dict(state)
        # Lightning loads the schedulers after the optimizers.
        for config, schedule in zip(self.lr_scheduler_configs, checkpoint.get("lr_schedulers", ()), strict=False):
            follow_groups(schedule, config.scheduler.optimizer.param_groups)


def _mixed_precision(plugin: Precision) -> MixedPrecisionPolicy:
    """Return the policy for ``--trainer.precision``. Inputs are not cast: if autocast is on, it does that."""
    if isinstance(plugin, MixedPrecision) and plugin.precision == "bf16-mixed":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if type(plugin) in {Precision, HalfPrecision, DoublePrecision}:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    name = getattr(plugin, "precision", type(plugin).__name__)
    raise ValueError(
        f"precision {name} does not work with fsdp2: choose bf16-mixed, bf16-true, 16-true, 32-true or 64-true"
    )


def _turn_inference_mode_off(trainer: Trainer) -> None:
    """Use ``no_grad`` instead: tensors gathered in inference mode cannot be used by a later backward."""
    loops = trainer.validate_loop, trainer.test_loop, trainer.predict_loop
    for loop in (trainer.fit_loop.epoch_loop.val_loop, *loops):
        loop.inference_mode = False
