"""Sweeps: grids, searches by Optuna, runs that end early, and TensorBoard's page of hyperparameters."""

import json
import time
from pathlib import Path

import optuna  # noqa: F401 - once for all workers that are forked
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import list_session_groups
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS, ListSessionGroupsRequest
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_muon.experiments import Record, StudyError
from lightning_muon.experiments.space import Choices, Range, parse
from lightning_muon.experiments.sweep import default_folder, print_trials, sweep, write_trials
from tests.experiments.small_runs import FORK, folder_of, kill, loss, options_of, train, write_scalar

pytestmark = pytest.mark.timeout(60)
LR = Choices("lr", (0.01, 0.02, 0.04))


def accept(command: list[str]) -> None:
    """Train, or only read the command line: `lr` and `batch` are its options."""
    if unknown := {*options_of(command)} - {"lr", "batch", "ckpt_path", "print_config"}:
        wrong = next((key for key in unknown if not key.startswith("trainer.")), None)
        if wrong:
            raise SystemExit(f"error: unknown key '{wrong}'; did you mean 'lr'?")
    if command[-1] == "--print_config":
        raise SystemExit(0)
    train(command)


def values(records: list[Record]) -> list[tuple[object, object]]:
    return [(dict(one.trial.options), one.result.value) for one in records]


def test_a_grid_is_run_and_shown_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = sweep(tmp_path, [LR, parse("batch=4,8")], accept, arguments=["--trainer.max_steps=9"], jobs=2)
    assert [one.trial.name for one in records][:2] in (
        ["lr=0.02,batch=4", "lr=0.02,batch=8"],
        ["lr=0.02,batch=8", "lr=0.02,batch=4"],
    )
    assert [one.trial.options["lr"] for one in records] == [0.02, 0.02, 0.01, 0.01, 0.04, 0.04]
    write_trials(records, tmp_path)
    print_trials(records, "val/loss", tmp_path, "python -m mine", ["--trainer.max_steps=9"])
    shown = capsys.readouterr().out
    assert (
        f"best:       python -m mine fit --trainer.max_steps=9 --lr=0.02 --batch={records[0].trial.options['batch']}\n"
        in shown
    )
    assert "lr=0.02,batch=4 finished 0.25" in shown
    (first, *_) = json.loads((tmp_path / "trials.json").read_text())
    assert first["options"]["lr"] == 0.02
    assert first["value"] == loss(0.02, 4)


def test_a_wrong_key_is_refused_before_the_first_run(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^unknown key 'lrr'; did you mean 'lr'\?$"):
        sweep(tmp_path, [Choices("lrr", (1, 2))], accept)
    with pytest.raises(StudyError, match=r"^unknown key 'depth'"):
        sweep(tmp_path, [LR], accept, arguments=["--depth=1"])
    with pytest.raises(StudyError, match=r"^--vary lr: a range has no end of values: add --trials n"):
        sweep(tmp_path, [Range("lr", 0.01, 0.1)], accept)
    assert not list(tmp_path.iterdir())


def test_the_folder_is_named_after_what_varies() -> None:
    assert default_folder([LR, parse("data.batch_size=1,2")]) == Path("logs/sweep/lr,batch_size")


def test_the_page_of_hyperparameters_has_what_varies_and_the_metric(tmp_path: Path) -> None:
    sweep(tmp_path, [LR, parse("batch=4,8")], accept)
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs")).Reload()
    provider = MultiplexerDataProvider(runs, str(tmp_path / "runs"))
    context = Context(TBContext(data_provider=provider, logdir=str(tmp_path / "runs")))
    experiment = context.experiment_from_metadata(
        RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), []
    )
    assert {column.name for column in experiment.hparam_infos} == {"lr", "batch"}
    metric = experiment.metric_infos[0].name
    request = ListSessionGroupsRequest(
        allowed_statuses=[STATUS_SUCCESS], col_params=[{"metric": metric}], slice_size=9, include_metrics=True
    )
    rows = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    shown = {(row.hparams["lr"].number_value, row.hparams["batch"].number_value): row for row in rows}
    assert {*shown} == {(lr, batch) for lr in LR.values for batch in (4, 8)}
    for (lr, _), row in shown.items():
        assert [(value.name.tag, value.value) for value in row.metric_values] == [
            ("val/loss", pytest.approx(loss(lr, 4)))
        ]


@pytest.mark.slow  # four seconds
def test_a_search_goes_to_the_best_and_is_the_same_after_kills(tmp_path: Path) -> None:
    space = [Range("lr", 1e-4, 1.0, log=True), Range("batch", 1, 8), Choices("config", ("a", "b"))]
    records = sweep(tmp_path / "whole", space, read_config, trials=16)
    assert len(records) == 16
    assert 0.01 < records[0].trial.options["lr"] < 0.04
    assert {type(one.trial.options["batch"]) for one in records} == {int}
    folder = tmp_path / "killed"
    for _ in range(4):
        process = FORK.Process(target=sweep, args=(folder, space, read_config), kwargs={"trials": 16})
        process.start()
        process.join(0.5)
        if process.exitcode is None:
            kill(process)
    assert values(sweep(folder, space, read_config, trials=16)) == values(records)


def read_config(command: list[str]) -> None:
    if command[-1] == "--print_config":
        raise SystemExit(0)
    train(command)


def test_a_search_ends_when_all_choices_were_tried(tmp_path: Path) -> None:
    assert len(sweep(tmp_path, [LR], accept, trials=2)) == 2
    assert len(sweep(tmp_path, [LR], accept, trials=9)) == 3  # and its number may be raised


def slow(command: list[str]) -> None:
    """Ten values of which the second tells enough."""
    if command[-1] == "--print_config":
        raise SystemExit(0)
    lr = float(options_of(command)["lr"])
    writer = EventFileWriter(str(folder_of(command)))
    for step in range(3):
        write_scalar(writer, "val/loss", step, lr / (step + 1))
        time.sleep(8 if lr == 0.9 else 0.01)
    writer.close()


def test_a_bad_run_is_ended_early(tmp_path: Path) -> None:
    began = time.monotonic()
    records = sweep(tmp_path, [Choices("lr", (0.1, 0.2, 0.3, 0.4, 0.9))], slow, prune=True)
    assert time.monotonic() - began < 8
    assert [(one.result.status, one.result.steps) for one in records] == [("finished", 3)] * 4 + [("pruned", 1)]
    assert records[-1].result.value == pytest.approx(0.9)
    assert [(step, round(value, 5)) for step, value in records[0].curve] == [(0, 0.1), (1, 0.05), (2, 0.03333)]
