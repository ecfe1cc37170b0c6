"""The entry of a trial on TensorBoard's HParams page: what varies, and the metric that judges it.

Written before the run's own file: of two entries in a run, TensorBoard takes the first. So the columns of a study are
what varies in it, whatever else its runs log there.
"""

import json
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_muon.experiments.trial import Trial
from lightning_muon.report.settings import short_names


def write_start(folder: Path, trial: Trial, metric: str) -> None:
    """Write the columns of the page, and the values of a run that begins."""
    names = short_names(list(trial.options))
    values = {name: _plain(value) for name, value in zip(names, trial.options.values(), strict=True)}
    columns = [summary_v2.HParam(name) for name in names]
    _write(
        folder,
        summary_v2.hparams_config_pb(columns, [summary_v2.Metric(metric)]),
        summary_v2.hparams_pb(values, trial_id=trial.name, start_time_secs=time.time()),
    )


def write_end(folder: Path, *, succeeded: bool) -> None:
    """Write that a run has ended."""
    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    data = plugin_data_pb2.HParamsPluginData(
        session_end_info=plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    )
    value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=metadata.create_summary_metadata(data))
    value.tensor.CopyFrom(metadata.NULL_TENSOR)
    _write(folder, Summary(value=[value]))


def _write(folder: Path, *summaries: Summary) -> None:
    writer = EventFileWriter(str(folder))
    for summary in summaries:
        writer.add_event(Event(wall_time=time.time(), step=0, summary=summary))
    writer.close()


def _plain(value: Any) -> str | float | bool:
    return value if isinstance(value, str | int | float) else json.dumps(value)
