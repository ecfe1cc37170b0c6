"""What the report makes of files that are damaged, unfinished, or not what their names say."""

import struct
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_muon.cli import main
from lightning_muon.report import RunLogError, read_run

STEPS = 21
FRAME = 16  # bytes of a record around its data: length 8, its checksum 4, that of the data 4


def written(folder: Path, steps: range = range(STEPS), **options: int) -> Path:
    """Write an event file with a loss that halves at each step."""
    with SummaryWriter(str(folder), **options) as writer:
        for step in steps:
            writer.add_scalar("val/loss", 2.0**-step, step)
        writer.add_text("warnings", "too large", steps[-1])
        return Path(writer.file_writer.event_writer._file_name)


def extent(file: Path, step: int) -> tuple[int, int]:
    """Where the record of a step begins and ends; the file begins with one for its version."""
    data, ends = file.read_bytes(), [0]
    while ends[-1] < len(data):
        (length,) = struct.unpack_from("<Q", data, ends[-1])
        ends.append(ends[-1] + length + FRAME)
    return ends[step + 1], ends[step + 2]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 0xFF
    file.write_bytes(data)


def assert_read_up_to_step_9(file: Path) -> None:
    run = read_run(file.parent, "run")
    assert run.scalars == {"val/loss": [(step, 2.0**-step) for step in range(10)]}
    assert run.damage == (f"'{file}' is damaged after step 9: what follows could not be read",)


def test_what_is_sound_is_read_as_tensorboard_reads_it(tmp_path: Path) -> None:
    written(tmp_path, range(8))
    written(tmp_path, range(5, 12), purge_step=5, filename_suffix=".later")  # started again from step 5
    run, theirs = read_run(tmp_path, "run"), EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert run.scalars == {"val/loss": [(event.step, event.value) for event in theirs.Scalars("val/loss")]}
    assert [step for step, _ in run.scalars["val/loss"]] == list(range(12))
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode()) for event in theirs.Tensors("warnings/text_summary")
    ]
    assert run.texts == {"warnings": texts}
    assert run.damage == ()


def test_what_a_new_start_has_replaced_is_not_there(tmp_path: Path) -> None:
    written(tmp_path)
    with SummaryWriter(str(tmp_path), purge_step=0, filename_suffix=".later") as writer:
        writer.add_scalar("train/loss", 1.0, 0)
    assert read_run(tmp_path, "run").scalars == {"train/loss": [(0, 1.0)]}


@pytest.mark.parametrize("part", ["length", "checksum of the length", "data", "checksum of the data"])
def test_damage_is_told_and_what_is_before_it_is_read(tmp_path: Path, part: str) -> None:
    file = written(tmp_path)
    start, end = extent(file, 10)
    flip(file, {"length": start, "checksum of the length": start + 8, "data": start + 20}.get(part, end - 1))
    assert_read_up_to_step_9(file)


def test_a_damaged_end_is_told(tmp_path: Path) -> None:
    file = written(tmp_path)
    start, _ = extent(file, 10)
    data = file.read_bytes()
    file.write_bytes(data[:start] + bytes(len(data) - start))  # as a crash of the machine leaves it
    assert_read_up_to_step_9(file)


def test_a_run_in_progress_is_not_damaged(tmp_path: Path) -> None:
    """Its file may end anywhere inside a record."""
    file = written(tmp_path)
    start, end = extent(file, 20)
    whole = file.read_bytes()
    for size in range(start, end):
        file.write_bytes(whole[:size])
        run = read_run(tmp_path, "run")
        assert run.scalars["val/loss"][-1] == (19, 2.0**-19), size
        assert run.damage == (), size


@pytest.mark.parametrize("name", ["events.out.tfevents.0.bad", "events.out.tfevents.9999999999.bad", "metrics.csv"])
def test_a_bad_file_does_not_take_a_good_one_with_it(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    bad = tmp_path / name
    bad.write_bytes(bytes(range(256)))
    run = read_run(tmp_path, "run")
    assert len(run.scalars["val/loss"]) == STEPS
    (line,) = run.damage
    assert line.startswith(f"left out: '{bad}' ")
    for file in tmp_path.glob("events*"):
        if file != bad:
            file.unlink()
    with pytest.raises(RunLogError, match=name):  # alone it is an error
        read_run(tmp_path, "run")


def test_damage_is_said_once_on_the_terminal_and_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "run")
    flip(file, extent(file, 10)[0])
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        main(args=["report", "--all", str(tmp_path / "run")])
    assert stop.value.code == 0
    line = " is damaged after step 9: what follows could not be read\n"
    assert capsys.readouterr().out.count(line) == 1
    assert (tmp_path / "run" / "report" / "report.md").read_text().count(line) == 1


def test_seconds_per_step_are_those_of_most_steps(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        wall = 1000.0
        for step in range(9, 60, 10):
            wall += 5.0  # 10 steps of half a second
            writer.add_scalar("train/loss", 1.0, step, walltime=wall)
            wall += 40.0  # a validation, logged one step later
            writer.add_scalar("val/loss", 1.0, step + 1, walltime=wall)
    assert read_run(tmp_path, "run").seconds_per_step == pytest.approx(5 / 9)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text("step,loss\n1,2\n2,2\n")
    assert read_run(tmp_path / "csv", "run").seconds_per_step is None
