"""The program: fit, validate, test, predict, routes, report, consolidate.

Start it by ``python -m {{ cookiecutter.package_name }} fit``.
"""

from pathlib import Path

from lightning_muon.cli import main

if __name__ == "__main__":
    main(
        # Import paths, so that `report` starts without torch and Lightning.
        "{{ cookiecutter.package_name }}.module.TextModule",
        "{{ cookiecutter.package_name }}.data.TextData",
        default_config=Path(__file__).parents[2] / "configs" / "default.yaml",
    )
