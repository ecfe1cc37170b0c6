"""The map of orthogonality by operator and depth, and the spread over experts, against singular values in float64."""

import importlib.util
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_muon.callbacks import GradientMonitor, MuonDashboard, OrthogonalityMonitor
from lightning_muon.callbacks.operator_map import is_due
from lightning_muon.callbacks.operators import Operator, Operators
from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.report import compare, print_comparison, write_report
from lightning_muon.report.orthogonality_map import OrthogonalityMap, draw_map
from lightning_muon.report.run_log import RunLog
from tests.callbacks.mixing import EXPERTS, MOMENTUM, STEPS, Mixing, exact, muon
from tests.callbacks.watched import watched
from tests.processes import REPOSITORY, launch

Fit = Callable[..., Trainer]

PROGRAM = Path(__file__).with_name("mixing.py")
PLOTS = importlib.util.find_spec("matplotlib") is not None


class Sources(Callback):
    """By operator and depth what each step has orthogonalized, (1 − μ)G + μM; and the gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[tuple[str, int, int | None], Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        found: dict[tuple[str, int, int | None], Tensor] = {}
        self.gradients.append({})
        for name, p in pl_module.named_parameters():
            if p.grad is None or "momentum_buffer" not in optimizer.state[p]:
                continue
            self.gradients[-1][name] = p.grad.clone()
            source = (1 - MOMENTUM) * p.grad + MOMENTUM * optimizer.state[p]["momentum_buffer"]
            path = name.removesuffix(".weight").split(".")
            depth, path = path[2], path[3:]
            if path[-1] == "qkv":
                for place, block in enumerate(source.chunk(3)):
                    found[f"attention.{'qkv'[place]}", int(depth), None] = block
            elif source.ndim == 3:
                for number, (matrix, gradient) in enumerate(zip(source, p.grad, strict=True)):
                    if gradient.any():
                        found[f"mlp.{path[-1]}", int(depth), number] = matrix
            elif "experts" in path:
                found[f"mlp.experts.{path[-1]}", int(depth), int(path[-2])] = source
            else:
                found[".".join(path), int(depth), None] = source
        self.steps.append(found)


def test_values_on_a_gpt_with_experts(
    fit: Fit, tensorboard: TensorBoardLogger, events: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix each: blocks of fused projections, experts of a stack and of a list; what rests is left out."""
    monkeypatch.setattr("lightning_muon.callbacks.orthogonality.is_due", lambda number: number < 3)
    sources = Sources()
    trainer = fit(
        Mixing(), callbacks=[sources, OrthogonalityMonitor()], logger=tensorboard, max_epochs=-1, max_steps=STEPS
    )
    logged = events(trainer).scalars()
    texts = [OrthogonalityMap.of_text(text) for text in events(trainer).texts("orthogonality_map")]
    maps = {found.step: found for found in texts if found is not None}
    assert sorted(maps) == [0, 1, 3]
    for step, found in maps.items():
        expected = {place: exact(matrix) for place, matrix in sources.steps[step].items()}
        assert len(expected) == 3 * 4 + 2 * 2 * (EXPERTS - 1) + 2 * EXPERTS
        cells = {
            (name if expert is None else f"{name}, expert {expert}", str(depth)): (
                pytest.approx(error, abs=0.0051),
                steps,
            )
            for (name, depth, expert), (error, steps) in expected.items()
        }
        assert dict(found.cells) == dict[Any, Any](cells)
        assert found.taken == 5
        by_operator: defaultdict[str, list[tuple[float, int]]] = defaultdict(list)
        for (name, _, _), value in expected.items():
            by_operator[name].append(value)
        for name, values in by_operator.items():
            mean = sum(error for error, _ in values) / len(values)
            assert dict(logged[f"operator_error/{name}"])[step] == pytest.approx(mean, rel=1e-4)
            assert dict(logged[f"needed_steps/{name}"])[step] == max(needed for _, needed in values)
    first = ["attention.q", "attention.k", "attention.v", "attention.out"]
    assert maps[0].operators[:5] == [*first, "mlp.up, expert 0"]  # in the order of the model
    assert maps[0].depths == ["0", "1", "2"]


def test_the_experts_of_a_layer_are_compared(fit: Fit) -> None:
    sources = Sources()
    trainer = fit(Mixing(), callbacks=[sources, GradientMonitor(1, per_parameter=True)])
    found = {name: float(value) for name, value in watched(trainer).items() if name.startswith("expert_balance")}
    gradients = sources.gradients[-1]
    for layer in ("0.weight", "2.weight"):
        of_list = [gradients[f"net.blocks.1.mlp.experts.{i}.{layer}"].square().mean().sqrt() for i in range(EXPERTS)]
        expected = float(min(of_list) / (sum(of_list) / EXPERTS))
        assert 0.3 < expected < 0.9
        assert found[f"expert_balance/net.blocks.1.mlp.experts.*.{layer}"] == pytest.approx(expected, rel=1e-5)
    for layer in ("0.mlp.up", "0.mlp.down", "2.mlp.up", "2.mlp.down"):
        assert found[f"expert_balance/net.blocks.{layer}"] == 0.0  # the last expert gets no tokens
    assert found["expert_balance/min"] == 0.0
    assert len(found) == 3 + 6


def test_the_experts_of_a_stack_are_compared(fit: Fit) -> None:
    class Used(Mixing):
        def on_after_backward(self) -> None:
            generator = torch.Generator().manual_seed(0)
            for name, p in self.named_parameters():
                if name.endswith("mlp.up"):
                    p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) * torch.tensor(
                        [3.0, 1.0, 2.0, 2.0]
                    ).view(4, 1, 1)

    trainer = fit(Used(), callbacks=[GradientMonitor(1, per_parameter=True)])
    assert float(watched(trainer)["expert_balance/net.blocks.2.mlp.up"]) == pytest.approx(0.5, rel=0.1)


def test_adamw_too_is_measured_for_its_experts(fit: Fit) -> None:
    trainer = fit(Mixing(partial(torch.optim.AdamW, lr=0.01)), callbacks=[OrthogonalityMonitor(), GradientMonitor(1)])
    assert float(watched(trainer)["expert_balance/min"]) == 0.0
    assert not [name for name in watched(trainer) if name.startswith(("operator_error", "needed_steps"))]


def test_the_same_on_every_rank() -> None:
    """However a matrix is cut: its pieces, and its experts, are on other ranks."""
    (alone,) = launch(PROGRAM, "find", 1, "one", path=[REPOSITORY])
    ways = ("ddp", "ddp_sharded_state", "fsdp2", "fsdp")
    ranks = launch(PROGRAM, "find", 2, *ways, path=[REPOSITORY])
    assert [sum(name.startswith("operator_error") for name in step) for step in alone["one"]] == [0, 0, 0, 8]
    for found in ranks:
        for way in ways:
            assert found[way] == ranks[0][way]
            for here, there in zip(found[way], alone["one"], strict=True):
                assert here == pytest.approx(there, rel=1e-4, abs=1e-7), way


def test_between_maps_nothing_is_asked_for(fit: Fit) -> None:
    """After 4, 8, 16, 32, 48 … measurements, and at the last of a run whose length is known."""
    assert [number for number in range(70) if is_due(number)] == [4, 8, 16, 32, 48, 64]
    asked: list[int] = []

    def configure(groups: list[dict[str, Any]]) -> MuonAdamW:
        optimizer = muon(groups)
        optimizer.register_step_post_hook(lambda o, *_: asked.append(len(o._source_hooks)))
        return optimizer

    fit(Mixing(configure), callbacks=[OrthogonalityMonitor()])
    assert asked == [0, 0, 0, 1]
    asked.clear()
    fit(Mixing(configure), callbacks=[OrthogonalityMonitor()], max_steps=3, max_epochs=-1)
    assert asked == [0, 0, 1]


def test_other_parameters_have_their_turn(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model is too large for one map, the steps come with later ones; errors are known at once."""
    monkeypatch.setattr("lightning_muon.callbacks.operator_map.ELEMENTS_ON_CPU", 1000)
    monkeypatch.setattr("lightning_muon.callbacks.orthogonality.is_due", lambda _: True)
    seen: list[set[str]] = []

    class Seen(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append({name for name in watched(trainer) if name.startswith("needed_steps")})

    trainer = fit(Mixing(), callbacks=[OrthogonalityMonitor(), Seen()])
    assert 0 < len(seen[0]) < len(seen[1]) <= len(seen[3])
    assert len([name for name in watched(trainer) if name.startswith("operator_error")]) == 8


@pytest.mark.parametrize(
    ("optimizer", "taken"),
    [
        (partial(muon, orthogonalizer="polar_express", orthogonalizer_options={"steps": 7}), 7),
        (partial(muon, orthogonalizer="svd", orthogonalizer_options={}), None),
    ],
)
def test_other_methods(
    fit: Fit, tensorboard: TensorBoardLogger, events: Any, optimizer: Any, taken: int | None
) -> None:
    trainer = fit(Mixing(optimizer), callbacks=[OrthogonalityMonitor()], logger=tensorboard)
    (found, *_) = [OrthogonalityMap.of_text(text) for text in events(trainer).texts("orthogonality_map")]
    assert found is not None
    assert found.taken == taken
    assert {steps is None for _, steps in found.cells.values()} == {taken is None}


@pytest.mark.parametrize(
    ("names", "layouts", "expected"),
    [
        (
            ["encoder.layers.0.fc.weight", "decoder.layers.11.fc.weight"],
            None,
            ["encoder.layers.fc 0", "decoder.layers.fc 11"],
        ),
        (["0.weight", "2.weight"], None, ["weight 0", "weight 2"]),
        (["features.3.conv.1.weight"], None, ["1 3"]),
        (["proj.weight", "h.1.proj.weight"], None, ["proj None", "h.proj 1"]),
        (
            ["h.2.attn.in_proj_weight", "h.2.fc.kernel"],
            [{"blocks": 3}, {}],
            ["attn.q 2", "attn.k 2", "attn.v 2", "fc 2"],
        ),
        (["h.0.c_attn.weight", "h.0.b.weight"], [{"blocks": 2, "transposed": True}, {}], ["k 0", "v 0", "b 0"]),
        (["h.0.gate_up_proj", "h.0.x"], [{"blocks": 2}, {}], ["gate 0", "up 0", "x 0"]),
        (["h.0.mixed", "h.0.x"], [{"blocks": 4}, {}], ["mixed 0"] * 4 + ["x 0"]),
    ],
)
def test_names_of_operators(names: list[str], layouts: list[dict[str, Any]] | None, expected: list[str]) -> None:
    params = [nn.Parameter(torch.zeros(12, 12)) for _ in names]
    group: dict[str, Any] = {
        "params": params,
        "param_names": names,
        "algorithm": "muon",
        "layouts": layouts or [{}] * len(names),
    }
    operators = Operators([MuonAdamW([group])], {})
    found: list[Operator] = []
    for name, layout in zip(names, group["layouts"], strict=True):
        size = 12 * 12 // layout.get("blocks", 1)
        step = 12 // layout["blocks"] if layout.get("transposed") else size
        found += [operators.of(name, step * block) for block in range(layout.get("blocks", 1))]
    assert [f"{operator.name} {operator.depth}" for operator in found] == expected


def test_heads_are_of_their_projection() -> None:
    class GQA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.num_kv_heads = 4, 2
            self.qkv = nn.Linear(16, 32, bias=False)
            self.out = nn.Linear(16, 16, bias=False)

    model = nn.ModuleList([GQA(), GQA()])
    operators = Operators([MuonAdamW(route_parameters(model, per_head=True))], {})
    found = [operators.of("0.qkv.weight", 4 * 16 * head).name for head in range(8)]
    assert found == ["q"] * 4 + ["k"] * 2 + ["v"] * 2


CELLS: dict[tuple[str, str], tuple[float, int | None]] = {
    ("attention.q", "0"): (0.41, 7),
    ("attention.q", "10"): (0.93, 13),
    ("attention.q", "2"): (float("nan"), None),
    ("a|b*c", "–"): (0.7, None),
}


def test_a_map_is_read_from_its_text(tmp_path: Path) -> None:
    found = OrthogonalityMap.of_text(OrthogonalityMap(24, 5, CELLS).as_text())
    assert found is not None
    assert (found.step, found.taken, found.depths) == (24, 5, ["–", "0", "2", "10"])
    assert str(found.cells["attention.q", "2"]) == "(nan, None)"
    assert found.cells["attention.q", "10"] == (0.93, 13)
    assert OrthogonalityMap.of_text("nothing") is None
    assert OrthogonalityMap.of_run(RunLog("run", tmp_path, {}, None)) is None


@pytest.mark.skipif(not PLOTS, reason="matplotlib is optional")
def test_the_picture(tmp_path: Path) -> None:
    """Of a map with NaN; and of one that is too large for numbers in its cells."""
    from PIL import Image

    assert draw_map("run $x$", OrthogonalityMap(24, 5, CELLS), tmp_path / "small.png") is None
    colours = {colour for _, colour in Image.open(tmp_path / "small.png").convert("RGB").getcolors(1 << 20) or []}
    assert any(r > 150 and g < 90 and b < 90 for r, g, b in colours)  # 0.93 is red
    large = {(f"layer.{i}", str(depth)): (0.4, i % 9) for i in range(60) for depth in range(96)}
    assert draw_map("run", OrthogonalityMap(24, 5, large), tmp_path / "large.png") is None
    width, height = Image.open(tmp_path / "large.png").size
    assert max(width, height) < 2600


def test_it_is_drawn_and_reported(fit: Fit, tensorboard: TensorBoardLogger, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(Mixing(), callbacks=[OrthogonalityMonitor(), MuonDashboard()], logger=tensorboard)
    folder = Path(str(trainer.log_dir))
    assert (folder / "orthogonality.png").exists() == PLOTS
    comparison = compare([folder], limit=1)
    print_comparison(comparison, figures=True)
    out = capsys.readouterr().out
    assert "mlp.down, expert 0" in out
    written, _ = write_report(comparison, folder / "report")
    assert (folder / "report" / "orthogonality-1.png" in written) == PLOTS
    page = (folder / "report" / "report.md").read_text()
    assert "| `attention.q` |" in page
    assert ("(orthogonality-1.png)" in page) == PLOTS
