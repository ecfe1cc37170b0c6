"""Text cards for TensorBoard: who updates what, and the configuration of the run, in Markdown."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from lightning_muon.callbacks.matrices import labelled_groups, module_names, own_names


def routing_card(optimizers: Iterable[Optimizer], module: LightningModule) -> str:
    """Return a table of all parameters that are updated: name, shape, algorithm, group, reason.

    Algorithm and reason are those in the optimizer's groups; where these say nothing, the optimizer is the algorithm.
    """
    names = module_names(module)
    lines = ["| parameter | shape | algorithm | group | reason |", "| --- | --- | --- | --- | --- |"]
    for label, optimizer, _, group in labelled_groups(optimizers):
        algorithm = str(group.get("algorithm", type(optimizer).__name__))
        reasons = group.get("reasons") or [""] * len(group["params"])
        for own, parameter, reason in zip(own_names(label, group), group["params"], reasons, strict=True):
            shape = "×".join(map(str, parameter.shape)) or "scalar"
            cells = (f"`{names.get(id(parameter), own)}`", shape, algorithm, label, reason)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def config_card(log_dir: str | Path | None, hyperparameters: Mapping[str, Any]) -> str | None:
    """Return the configuration of a run as YAML.

    Args:
        log_dir: Where LightningCLI saved it, as ``config.yaml``; the newest of several, ``config-1.yaml``, … is taken.
        hyperparameters: Of module and data, which are shown where there is no such file.

    Returns:
        ``None`` if there is neither.
    """
    saved = sorted(Path(log_dir).glob("config*.yaml"), key=lambda path: path.stat().st_mtime) if log_dir else []
    if saved:
        text = saved[-1].read_text()
    elif hyperparameters:
        text = yaml.safe_dump(_plain(hyperparameters), sort_keys=False)
    else:
        return None
    return f"```yaml\n{text.rstrip()}\n```"


def _plain(value: object) -> object:
    """Return what YAML can hold; anything else as Python writes it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
