"""What watches a run: monitors of Muon's health, for any Lightning trainer."""

from lightning_muon.callbacks.auto_weight_decay import AutoWeightDecay
from lightning_muon.callbacks.dashboard import MuonDashboard
from lightning_muon.callbacks.gradients import GradientMonitor
from lightning_muon.callbacks.optimizer_time import OptimizerTimeMonitor
from lightning_muon.callbacks.orthogonality import OrthogonalityMonitor
from lightning_muon.callbacks.update_rms import UpdateRMSMonitor
from lightning_muon.callbacks.weight_rms import WeightRMSMonitor

__all__ = [
    "AutoWeightDecay",
    "GradientMonitor",
    "MuonDashboard",
    "OptimizerTimeMonitor",
    "OrthogonalityMonitor",
    "UpdateRMSMonitor",
    "WeightRMSMonitor",
]
