"""What watches a run: monitors of Muon's health, for any Lightning trainer."""

from lightning_muon.callbacks.auto_weight_decay import AutoWeightDecay
from lightning_muon.callbacks.dashboard import MuonDashboard
from lightning_muon.callbacks.orthogonality import OrthogonalityMonitor
from lightning_muon.callbacks.weight_rms import WeightRMSMonitor

__all__ = ["AutoWeightDecay", "MuonDashboard", "OrthogonalityMonitor", "WeightRMSMonitor"]
