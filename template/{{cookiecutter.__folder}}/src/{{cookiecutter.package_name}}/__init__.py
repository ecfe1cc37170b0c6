"""{{ cookiecutter.__summary }}

Project: {{ cookiecutter.project_name | replace('\\', '') | replace('"', "'") | wordwrap(50) }}
"""
