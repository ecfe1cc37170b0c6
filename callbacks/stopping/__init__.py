"""How :class:`~lightning_muon.callbacks.StopOnSignal` ends a run.

- :mod:`~lightning_muon.callbacks.stopping.receiver`: hear signals at any moment, and end the process in time.
- :mod:`~lightning_muon.callbacks.stopping.agreement`: all ranks stop after the same step.
- :mod:`~lightning_muon.callbacks.stopping.last_checkpoint`: where the run is saved, so that it resumes exactly.
"""
