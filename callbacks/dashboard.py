"""TensorBoard pages that show at one look how a run is."""

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from tensorboard.compat.proto.summary_pb2 import Summary
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole
from lightning_muon.callbacks.health_log import HealthLog
from lightning_muon.callbacks.logging import Listener, log_text, logged_step, warn
from lightning_muon.callbacks.matrices import module_names, muon_groups
from lightning_muon.callbacks.monitor import check_only_one
from lightning_muon.callbacks.sampling import sampled_matrices
from lightning_muon.callbacks.shards import whole
from lightning_muon.callbacks.tensorboard.pages import (
    Page,
    config_card,
    layout,
    layout_summary,
    routing_card,
    singular_values,
)
from lightning_muon.callbacks.tensorboard.run_hyperparameters import (
    Value,
    judging_metrics,
    page_entry,
    run_hyperparameters,
)
from lightning_muon.report.tags import tag_of


class MuonDashboard(Callback, Listener):
    """Lay out TensorBoard so that each page shows at one look how a run is.

    - **Verdict**: ``at_a_glance/health``, up to 1 where the run is healthy and above 2 where it is bad, and the same
      scale for each quantity, ``by_quantity/<quantity>``, judged as ``report`` does, from all that the monitors log.
      Beside it are copies of loss and speed, in the group that a logger shows first. With matplotlib there is the run
      in one picture: ``health.png`` in its folder, and in the loggers.
    - **Custom Scalars**: health, loss, speed and learning rate first, then the charts of each quantity. A chart appears
      when the run logs its tags, from any callback; those of the first two sections have their place always.
    - **Text**: ``at_a_glance/verdict``, what is wrong since when and what to do; ``watch/routing``, the algorithm of
      each parameter and the reason; ``watch/config``, the configuration of the run; and ``watch/warnings``.
    - **HParams**: optimizer, learning rate, weight decay and others, and the metric that ``ModelCheckpoint`` or
      ``EarlyStopping`` monitors. With ``TensorBoardLogger(default_hp_metric=True)`` Lightning has filled this page
      already; then its ``hp_metric`` gets the value of that metric.
    - **Histograms**: ``weight_spectrum/<name>``, the singular values of some of Muon's matrices, in the first step,
      then every ``spectrum_every_n_steps``, and at the end.

    It judges where the trainer logs, and waits for nothing between. Without a ``TensorBoardLogger`` it has no pages. It
    belongs behind the monitors in the list of callbacks: what those behind it log is judged one log later.

    Args:
        spectrum_every_n_steps: How often to write histograms of singular values, in optimizer steps; 0 for never. The
            decomposition is slow, so this should be much larger than the trainer's ``log_every_n_steps``.
        sample: How many parameters get a histogram.
        max_elements: The largest parameter that gets one, in elements. The time for one grows with the power 3/2.

    Raises:
        MisconfigurationException: If an argument is wrong, or the trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import MuonDashboard, WeightRMSMonitor
        >>> trainer = Trainer(callbacks=[WeightRMSMonitor(), MuonDashboard()])
    """

    def __init__(self, spectrum_every_n_steps: int = 500, sample: int = 4, max_elements: int = 1 << 20) -> None:
        super().__init__()
        check_whole("MuonDashboard", least=0, spectrum_every_n_steps=spectrum_every_n_steps)
        check_whole("MuonDashboard", sample=sample, max_elements=max_elements)
        self.spectrum_every_n_steps = spectrum_every_n_steps
        self.sample = sample
        self.max_elements = max_elements
        self._layout: Page = {}
        self._hyperparameters: dict[str, Value] = {}
        self._hyperparameters_end: Summary | None = None  # marks the end of the run on the HParams page
        self._spectrum_at: int | None = None
        self._logged = 0
        self._health: HealthLog | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_only_one(trainer, MuonDashboard, "; keep one: there is one page to lay out.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_dir = trainer.log_dir  # on every rank: a broadcast
        self._health = HealthLog(trainer, log_dir) if trainer.is_global_zero and trainer.loggers else None
        self._layout, self._hyperparameters_end, self._spectrum_at, self._logged = {}, None, None, 0
        of_data = {} if trainer.datamodule is None else trainer.datamodule.hparams_initial  # type: ignore[attr-defined]
        saved = {**of_data, **pl_module.hparams_initial}
        self._hyperparameters = run_hyperparameters(trainer, saved)
        log_text(trainer, "routing", routing_card(trainer.optimizers, pl_module))
        if config := config_card(log_dir, saved):
            log_text(trainer, "config", config)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer._logger_connector.should_update_logs:
            metrics = trainer.callback_metrics  # on every rank: reading them may reduce them
            if self._health is not None:
                self._health.hear_metrics(trainer, metrics, of_validation=False)
                self._health.judge(trainer, is_over=False)
            # New charts come early in a run, and reading the metrics is slow: only after 1, 2, 4, 8, … logs.
            self._logged += 1
            if self._logged & (self._logged - 1) == 0:
                self._lay_out(trainer)
        if self.spectrum_every_n_steps and logged_step(trainer) % self.spectrum_every_n_steps == 0:
            self._log_spectra(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._lay_out(trainer)
            self._log_hyperparameters(trainer)
            metrics = trainer.callback_metrics
            if self._health is not None:
                self._health.hear_metrics(trainer, metrics, of_validation=True)
                self._health.draw_now_and_then(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._health is not None:
            self._health.draw(trainer, self._health.judge(trainer, is_over=True))
        self._lay_out(trainer)
        self._log_hyperparameters(trainer)
        self._log_final_metric(trainer)
        if self.spectrum_every_n_steps:
            self._log_spectra(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._health is not None:
            self._health.draw(trainer, self._health.judge(trainer, is_over=True))

    @override
    def hear_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._health is not None:
            self._health.hear(step, scalars)

    @override
    def hear_text(self, step: int, name: str, text: str) -> None:
        if self._health is not None:
            self._health.hear_text(step, name, text)

    def _lay_out(self, trainer: Trainer) -> None:
        """Write the layout if there are new charts: TensorBoard uses the last one."""
        page = layout(trainer.callback_metrics)  # on every rank: reading metrics may reduce them
        if page != self._layout:
            self._layout = page
            for writer in _writers(trainer):
                prefix = f"{writer._prefix}-" if writer._prefix else ""
                writer.experiment._get_file_writer().add_summary(layout_summary(page, prefix))

    def _log_hyperparameters(self, trainer: Trainer) -> None:
        """Write them once, as soon as there is a metric: TensorBoard keeps the first list of metrics."""
        metrics = judging_metrics(trainer)
        if self._hyperparameters_end is None and metrics:
            columns, start, self._hyperparameters_end = page_entry(self._hyperparameters, metrics)
            for writer in _writers(trainer):
                writer.experiment._get_file_writer().add_summary(columns)
                writer.experiment._get_file_writer().add_summary(start)

    def _log_final_metric(self, trainer: Trainer) -> None:
        final = [float(trainer.callback_metrics[name]) for name in judging_metrics(trainer)]
        for writer in _writers(trainer):
            if self._hyperparameters_end is not None:
                writer.experiment._get_file_writer().add_summary(self._hyperparameters_end)
            if final and writer._default_hp_metric:
                writer.log_metrics({"hp_metric": final[0]}, step=logged_step(trainer))

    def _log_spectra(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write histograms of singular values, at most once a step. A collective of all ranks for DTensors."""
        step = logged_step(trainer)
        if step == self._spectrum_at or not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            return
        first, self._spectrum_at = self._spectrum_at is None, step
        chosen = sampled_matrices(trainer.optimizers, module_names(pl_module), self.sample, self.max_elements)
        if first and not chosen and muon_groups(trainer.optimizers):
            warn(
                trainer,
                f"MuonDashboard: no Muon matrix is whole and has at most max_elements={self.max_elements} elements, so"
                " there are no histograms of singular values. Raise max_elements, or set spectrum_every_n_steps=0.",
            )
        for name, sampled in chosen.items():
            matrix = whole(sampled.parameter)
            if trainer.is_global_zero and (values := singular_values(matrix, **sampled.layout)) is not None:
                for writer in _writers(trainer):
                    writer.experiment.add_histogram(tag_of(f"weight_spectrum/{name}"), values, step)


def _writers(trainer: Trainer) -> list[TensorBoardLogger]:
    """Return the TensorBoard loggers on rank zero; none on other ranks."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return loggers if trainer.is_global_zero else []
