"""Mistakes of the user, each told in one line.

- :mod:`~lightning_muon.cli.errors.parser`: what the parser refuses, with the key, the file and the nearest valid thing.
- :mod:`~lightning_muon.cli.errors.interpolation`: which ``${…}`` cannot be read, and which lead nowhere or in a circle.
- :mod:`~lightning_muon.cli.errors.missing`: arguments that a chosen class needs and nobody gave.
- :mod:`~lightning_muon.cli.errors.settings`: values out of range that Lightning and torch do not check.
- :mod:`~lightning_muon.cli.errors.files`: files and folders that cannot be used, with the setting that names them.
- :mod:`~lightning_muon.cli.errors.user`: which other exceptions are the user's, and which are bugs.
- :mod:`~lightning_muon.cli.errors.suggestions`: the closest valid name, key or path.
"""
