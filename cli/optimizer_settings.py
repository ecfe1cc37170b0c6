"""The optimizer that a command line of ``fit`` makes: its learning rates and weight decay, without training."""

import contextlib
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lightning_muon.cli.muon_cli import MuonCLI


class SettingsCLI(MuonCLI):
    """Take the arguments of ``fit``, and go up to the first batch: then the optimizer and the steps are known."""

    @override
    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.save_config_callback = None

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        begun = _AtFirstBatch()
        # It comes last: other callbacks may change the groups.
        self.trainer.callbacks.append(begun)  # type: ignore[attr-defined]
        try:
            super()._run_subcommand(subcommand)
        except _BegunError:
            self.optimizers = self.trainer.optimizers
            self.steps = int(self.trainer.estimated_stepping_batches)


class _BegunError(Exception):
    """Training is about to begin."""


class _AtFirstBatch(Callback):
    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise _BegunError


def optimizer_settings(
    model_class: type[LightningModule] | Callable[..., LightningModule] | str | None,
    datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | str | None,
    default_config: str | Path | Sequence[str | Path] | None,
    arguments: Sequence[str],
) -> dict[str, Any]:
    """Return, as plain values, what a comparison has to know of a run.

    Args:
        model_class: As of :func:`~lightning_muon.cli.main`, like the next two.
        datamodule_class: The data.
        default_config: The defaults.
        arguments: The command line after ``fit``.

    Raises:
        ValueError: If the module has several optimizers.

    Returns:
        ``lr`` and ``weight_decay`` (``None`` if the optimizer has none) of its groups of matrices; ``rates``, the
        learning rates of the groups of other roles; ``parameters``, their number; ``steps``, those of the run;
        ``accumulate``, the batches of a step; ``tokens_per_step``, ``None`` if the data do not know them; ``seed``,
        ``None`` if the run has none; ``task``, the names of module and data; ``device``, the name of GPU or processor.
    """
    without_traces = [
        "--trainer.logger=false",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_model_summary=false",
    ]
    cli = SettingsCLI(
        model_class, datamodule_class, default_config=default_config, args=["fit", *arguments, *without_traces]
    )
    if len(cli.optimizers) != 1:
        raise ValueError(f"the module has {len(cli.optimizers)} optimizers: only runs with one can be compared")
    groups = cli.optimizers[0].param_groups
    matrices = next((group for group in groups if group.get("role", "matrix") == "matrix"), groups[0])
    rates = {group["role"]: _rate(group) for group in groups if group.get("role", "matrix") != "matrix"}
    batch, tokens = (getattr(cli.datamodule, name, None) for name in ("batch_size", "tokens_per_sample"))
    seed = cli.config["fit"]["seed_everything"]
    module, data = (type(one).__name__ for one in (cli.model, cli.datamodule))
    return {
        "task": module if cli.datamodule is None else f"{module} on {data}",
        "device": _name_of(cli.trainer.strategy.root_device),
        "lr": _rate(matrices),
        "weight_decay": None if "weight_decay" not in matrices else float(matrices["weight_decay"]),
        "rates": rates,
        "parameters": sum(one.numel() for group in groups for one in group["params"]),
        "steps": cli.steps,
        "accumulate": cli.trainer.accumulate_grad_batches,
        "tokens_per_step": batch * tokens * cli.trainer.accumulate_grad_batches if batch and tokens else None,
        "seed": seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
    }


def _name_of(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def _rate(group: dict[str, Any]) -> float:
    """Return the learning rate of a group without its schedule, which may begin at zero."""
    return float(group.get("initial_lr", group["lr"]))
