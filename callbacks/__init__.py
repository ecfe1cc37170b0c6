"""Callbacks that monitor and steer a run, for any Lightning trainer.

They serve ``MuonAdamW``, ``torch.optim.Muon``, and every optimizer whose parameter groups have ``algorithm: "muon"``.

- :class:`WeightRMSMonitor`: size of weights and of layer outputs, and what bfloat16 would lose of the updates.
- :class:`UpdateRMSMonitor`: size of the updates of all groups, Muon's and others.
- :class:`OrthogonalityMonitor`: how far the applied polar factors are from orthogonal.
- :class:`GradientMonitor`: condition number and stable rank of gradient and momentum.
- :class:`AttentionLogitMonitor`: the largest attention logit of each head, and when it will be too large.
- :class:`QKClip`: holds the attention logits by rescaling queries and keys.
- :class:`OptimizerTimeMonitor`: the optimizer's share of the time of a step.
- :class:`SpeedMonitor`: samples and tokens a second, and the share of the device's peak.
- :class:`AutoWeightDecay`: weight decay that holds the weights at a good size.
- :class:`HyperparameterSchedule`: momentum, weight decay and others as a function of the step.
- :class:`TargetBatch`: gradient accumulation by the number of samples or tokens of a step.
- :class:`RunGuard`: ends a run that went bad, or skips its bad steps, and keeps such weights out of checkpoints.
- :class:`MuonDashboard`: TensorBoard pages with all of this.
- :class:`PredictionWriter`: what ``predict`` finds, as a file of JSON lines or CSV; :func:`writes_predictions`.
- :class:`StepProgressBar`: steps, loss, tokens a second and time left on the terminal; plain lines without one.
- :class:`ParameterSummary`: the parts of the model that have parameters.
- :class:`StopOnSignal`: SIGTERM and Ctrl-C end a run after its step, with a checkpoint, on all ranks alike.

Inside, ``monitor`` decides when to measure, and ``logging`` how to log. ``matrices`` finds Muon's matrices,
``sampling`` chooses some, and ``shards`` combines values over ranks. ``limits`` warns; ``record`` keeps what was
logged, by which ``health_log`` judges the run. ``arguments`` and ``points`` check what users pass, ``measures``
computes, ``attention`` finds attention and its weights, ``decay`` decides on weight decays, ``tensorboard`` makes
TensorBoard's pages, and ``stopping`` ends runs.
"""

from lightning_muon.callbacks.attention_logits import AttentionLogitMonitor
from lightning_muon.callbacks.auto_weight_decay import AutoWeightDecay
from lightning_muon.callbacks.dashboard import MuonDashboard
from lightning_muon.callbacks.gradients import GradientMonitor
from lightning_muon.callbacks.hyperparameter_schedule import HyperparameterSchedule
from lightning_muon.callbacks.optimizer_time import OptimizerTimeMonitor
from lightning_muon.callbacks.orthogonality import OrthogonalityMonitor
from lightning_muon.callbacks.parameter_summary import ParameterSummary
from lightning_muon.callbacks.prediction_writer import PredictionWriter, writes_predictions
from lightning_muon.callbacks.progress import StepProgressBar
from lightning_muon.callbacks.qk_clip import QKClip
from lightning_muon.callbacks.run_guard import NonFiniteError, RunGuard
from lightning_muon.callbacks.speed import SpeedMonitor
from lightning_muon.callbacks.stop_on_signal import StopOnSignal
from lightning_muon.callbacks.target_batch import TargetBatch
from lightning_muon.callbacks.update_rms import UpdateRMSMonitor
from lightning_muon.callbacks.weight_rms import WeightRMSMonitor

__all__ = [
    "AttentionLogitMonitor",
    "AutoWeightDecay",
    "GradientMonitor",
    "HyperparameterSchedule",
    "MuonDashboard",
    "NonFiniteError",
    "OptimizerTimeMonitor",
    "OrthogonalityMonitor",
    "ParameterSummary",
    "PredictionWriter",
    "QKClip",
    "RunGuard",
    "SpeedMonitor",
    "StepProgressBar",
    "StopOnSignal",
    "TargetBatch",
    "UpdateRMSMonitor",
    "WeightRMSMonitor",
    "writes_predictions",
]
