"""The project of the demo, for benchmarks that train it."""

import sys
from pathlib import Path
from typing import Any

from cookiecutter.main import cookiecutter

from benchmarks.record import REPOSITORY

SMALL = ["--model.net.depth=2", "--model.context=64", "--data.batch_size=8"]  # a fifth of the time, for --quick


def inside(project: Path) -> list[str]:
    """Return arguments for a run that prints little and writes only into its project."""
    return [
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.logger.init_args.save_dir={project / 'logs'}",
        f"--data.data_dir={project / 'data'}",
    ]


def generate(folder: Path) -> tuple[Path, type[Any], type[Any]]:
    """Generate the project with the default answers, and return its folder, module class and data class."""
    cookiecutter(str(REPOSITORY), no_input=True, default_config=True, output_dir=str(folder))
    project = folder / "my-muon-project"
    sys.path.insert(0, str(project / "src"))
    try:
        from my_muon_project.data import TextData  # noqa: PLC0415
        from my_muon_project.module import TextModule  # noqa: PLC0415
    finally:
        sys.path.pop(0)
    return project, TextModule, TextData
