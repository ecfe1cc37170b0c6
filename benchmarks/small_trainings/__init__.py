"""Small trainings of many kinds, with AdamW and with routed groups: ``python -m benchmarks.small_trainings``."""
