"""Experiments on the text that the template brings along: language models of 0.2 to 13 million parameters.

Each is a command that goes on where it was after a kill, and writes a record to ``benchmarks/results`` and plots to
``docs/images``. With a GPU they take minutes, with two cores hours.

- ``comparison``: optimizers, each tuned by the same rules: ``python -m benchmarks.embedded_text.comparison``
- ``transfer``: the learning rate over three widths: ``python -m benchmarks.embedded_text.transfer``
- ``precisions``: what bfloat16 loses: ``python -m benchmarks.embedded_text.precisions``
- ``project``: the generated project in which all of them run
"""
