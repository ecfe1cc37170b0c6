"""``--ckpt_path last``: the newest checkpoint of earlier runs that can be resumed.

Lightning looks only into the folder to which this run will write. With a logger that numbers its runs that is a new
one, in which there is nothing yet.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_muon.cli.output import say
from lightning_muon.cli.resume.plan import ResumePlan

LAST = "last"


def newest_checkpoint(trainer: Mapping[str, Any]) -> Path | None:
    """Return the newest checkpoint in the folders of runs with the same settings of logger and checkpoints.

    Checkpoints that cannot be read are named and skipped. What killed saves have left is put in order first.

    Args:
        trainer: The trainer's arguments, as they are parsed.
    """
    from lightning_muon.strategies import clear_leftovers  # noqa: PLC0415 - runs without a checkpoint start faster

    found: dict[Path, float] = {}
    for folder, pattern in _places(trainer):
        above = pattern.rpartition("/")[0]
        for checkpoints in folder.glob(above) if above else (folder,):
            clear_leftovers(checkpoints)  # a folder whose save was killed between its two renames gets its name back
        found |= {path: _modified(path) for path in folder.glob(pattern)}
    for path in sorted(found, key=lambda path: found[path], reverse=True):
        try:
            if ResumePlan.of(str(path), fitting=True).saved is not None:
                return path
        except (OSError, ValueError, RuntimeError) as error:
            say(f"--ckpt_path last: '{path}' is skipped: {' '.join(str(error).split())}")
    return None


def _modified(path: Path) -> float:
    # A folder's own time is that of its newest entry, not of what was written into it last.
    times: list[float] = [file.stat().st_mtime for file in (path, *(path.iterdir() if path.is_dir() else ()))]
    return max(times)


def _places(trainer: Mapping[str, Any]) -> Iterator[tuple[Path, str]]:
    """Yield each folder, and the pattern of the checkpoints below it."""
    root = Path(trainer.get("default_root_dir") or ".")
    yield root, "hpc_ckpt_*.ckpt"  # what Lightning saves when SLURM requeues
    for callback in _listed(trainer.get("callbacks")):
        if directory := _arguments(callback).get("dirpath"):
            yield Path(directory), "*.ckpt"
    loggers = _listed(trainer.get("logger"))
    if loggers == [False]:
        yield root / "checkpoints", "*.ckpt"
        return
    # The folder of checkpoints is that of the first logger.
    logger = loggers[0] if loggers else True
    arguments = _arguments(logger)
    name, version = arguments.get("name", "lightning_logs"), arguments.get("version")
    folder = Path(arguments.get("save_dir") or root) / str(name or "")
    if isinstance(version, int):
        version = f"version_{version}"
    yield folder, f"{version or '*'}/checkpoints/*.ckpt"


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _arguments(spec: Any) -> Mapping[str, Any]:
    arguments = spec.get("init_args") if hasattr(spec, "get") else None
    return vars(arguments) if arguments is not None and not isinstance(arguments, Mapping) else arguments or {}
