"""Resuming: the command line wins, the checkpoint fills in the rest, and each difference is printed.

- :mod:`~lightning_muon.cli.resume.plan`: what the checkpoint holds, what the command line says, what follows from both.
- :mod:`~lightning_muon.cli.resume.reading`: read a checkpoint without its weights; refuse what is none.
- :mod:`~lightning_muon.cli.resume.checks`: refuse a checkpoint that does not suit the run.
- :mod:`~lightning_muon.cli.resume.callback`: carry out the plan on the restored optimizer and its schedule.
"""
