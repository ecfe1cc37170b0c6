"""Everything that needs a GPU, measured by one command: ``python -m benchmarks.gpu``.

- ``__main__``: the command line, the record and the printed tables
- ``processes``: each section in its own process, with a time limit
- ``measuring``: what a section reports: rows, what was skipped, what failed
- ``subject``: the GPT that is trained, and the optimizers of ``configs/``
- ``marked_tests``: the tests marked ``gpu``
- ``optimizer_steps``: the optimizer step, beside torch's Muon
- ``training``: the whole training step, and its peak memory
- ``lightning_runs``: the monitors' cost and host syncs, and the sharding strategies on one device
- ``polar_factors``: each polar method, beside the floor of its FLOPs
- ``goals``: what is expected of these numbers
"""
