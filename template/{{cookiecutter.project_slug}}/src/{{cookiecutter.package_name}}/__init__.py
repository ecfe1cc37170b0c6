"""{{ cookiecutter.project_name | replace('\\', '') | replace('"', "'") }}: a byte-level language model, trained with Muon."""
