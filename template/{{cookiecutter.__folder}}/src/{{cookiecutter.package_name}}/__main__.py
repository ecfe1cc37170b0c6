{%- set layers = [] %}
{%- for group, choice, default in [
    ("optimizer", cookiecutter.optimizer, "moonlight"),
    ("strategy", cookiecutter.strategy, "auto"),
    ("logger", cookiecutter.logger, "tensorboard"),
] if choice != default %}{% set _ = layers.append((group, choice)) %}{% endfor -%}
"""The program: fit, validate, test, predict, routes, sweep, compare, report, export, consolidate.

Start it by ``python -m {{ cookiecutter.package_name }} fit``.
"""

from pathlib import Path

from lightning_muon.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"

if __name__ == "__main__":
    main(
        # Import paths, so that `report` starts without torch and Lightning.
        "{{ cookiecutter.package_name }}.module.{{ cookiecutter.__module_class }}",
        "{{ cookiecutter.package_name }}.data.{{ cookiecutter.__data_class }}",
{%- if layers %}
        # The base of every run, and presets over it. A --config from the same folder takes the place of a preset.
        default_config=[
            CONFIGS / "default.yaml",
{%- for group, choice in layers %}
            CONFIGS / "{{ group }}" / "{{ choice }}.yaml",
{%- endfor %}
        ],
{%- else %}
        default_config=CONFIGS / "default.yaml",
{%- endif %}
    )
