"""A byte-level language model, trained with Muon.

Project: {{ cookiecutter.project_name | replace('\\', '') | replace('"', "'") | wordwrap(50) }}
"""
