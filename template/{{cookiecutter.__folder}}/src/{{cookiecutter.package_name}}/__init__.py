"""A model trained with Muon.

Project: {{ cookiecutter.project_name | replace('\\', '') | replace('"', "'") | wordwrap(50) }}
"""
