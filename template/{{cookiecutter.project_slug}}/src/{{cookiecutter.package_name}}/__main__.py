"""The program: ``python -m {{ cookiecutter.package_name }} fit|validate|test|predict|report``."""

from pathlib import Path

from lightning_muon.cli import main
from {{ cookiecutter.package_name }}.data import TextData
from {{ cookiecutter.package_name }}.module import TextModule

if __name__ == "__main__":
    main(TextModule, TextData, default_config=Path(__file__).parents[2] / "configs" / "default.yaml")
