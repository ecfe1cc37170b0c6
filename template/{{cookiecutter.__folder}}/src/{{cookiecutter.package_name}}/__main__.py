"""The program: fit, validate, test, predict, routes, report, export, consolidate.

Start it by ``python -m {{ cookiecutter.package_name }} fit``.
"""

from pathlib import Path

from lightning_muon.cli import main

if __name__ == "__main__":
    main(
        # Import paths, so that `report` starts without torch and Lightning.
        "{{ cookiecutter.package_name }}.module.{{ cookiecutter.__module_class }}",
        "{{ cookiecutter.package_name }}.data.{{ cookiecutter.__data_class }}",
        default_config=Path(__file__).parents[2] / "configs" / "default.yaml",
    )
