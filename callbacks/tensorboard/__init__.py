"""What ``MuonDashboard`` writes for the pages of TensorBoard.

- ``pages``: charts for Custom Scalars, tables for Text, singular values for Histograms
- ``run_hyperparameters``: the entry of a run for HParams
"""
