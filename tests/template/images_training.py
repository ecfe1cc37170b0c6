"""What the processes of the tests of an images project run: its program, on images of three colours."""

from pathlib import Path
from typing import Any

import my_muon_project.module
import torch
from my_muon_project.data import ImageData
from my_muon_project.module import ImageModule
from torch import Tensor

from lightning_muon.cli import MuonCLI

CONFIGS = Path(my_muon_project.module.__file__).parents[2] / "configs"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.accelerator=cpu"]
DATA = ["--data.folder=images", "--data.size=8", "--data.batch_size=4"]
SMALL = [
    "--model.net.widths=[8,8]",
    "--model.net.depth=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.check_val_every_n_epoch=1",
]


def run(*arguments: str) -> MuonCLI:
    args = [*arguments, *QUIET, *DATA]
    return MuonCLI(ImageModule, ImageData, default_config=CONFIGS / "default.yaml", args=args)


def watched() -> list[tuple[int, int]]:
    """Return a list that gets, for each validation that is drawn, the images and the mistakes that are shown."""
    drawn: list[tuple[int, int]] = []
    draw_confusion, draw_mistakes = my_muon_project.module.draw_confusion, my_muon_project.module.draw_mistakes
    counts: list[int] = []

    def confusion(matrix: Tensor, *arguments: Any) -> Any:
        counts.append(int(matrix.sum()))
        return draw_confusion(matrix, *arguments)

    def mistakes(worst: Any, *arguments: Any) -> Any:
        drawn.append((counts.pop(), len(worst.images)))
        return draw_mistakes(worst, *arguments)

    my_muon_project.module.draw_confusion, my_muon_project.module.draw_mistakes = confusion, mistakes
    return drawn


def metrics_of(program: MuonCLI) -> dict[str, float]:
    return {name: float(value) for name, value in program.trainer.callback_metrics.items() if name.startswith("val/")}


def fit_and_validate() -> dict[str, Any]:
    """Two steps on two ranks, then a validation; the figures of both."""
    drawn = watched()
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    fitted = run("fit", *SMALL, *two, "--trainer.max_steps=2", "--model.top_k=2")
    weights = sum(float(p.double().sum()) for p in fitted.model.parameters())
    validated = run("validate", *SMALL, *two, "--ckpt_path=last", "--model.top_k=2")
    metrics = metrics_of(validated)
    mistakes = min(16, round((1 - metrics["val/accuracy"]) * 12))
    return {"metrics": metrics, "weights": weights, "drawn": drawn, "mistakes": mistakes}


def validate() -> dict[str, Any]:
    """The same weights on one process, without a logger and with one that takes no figures."""
    drawn = watched()
    checkpoint = str(next(Path("logs").rglob("last.ckpt")))
    run("validate", *SMALL, f"--ckpt_path={checkpoint}", "--trainer.logger=false", "--model.top_k=2")
    csv = f"--config={CONFIGS / 'logger' / 'csv.yaml'}"
    return {"metrics": metrics_of(run("validate", *SMALL, csv, f"--ckpt_path={checkpoint}")), "drawn": drawn}


def fit_transformers() -> dict[str, Any]:
    """A ViT of transformers."""
    size = "num_labels: '${from_data:classes}', image_size: '${from_data:size}', patch_size: 4"
    size += ", hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16"
    name = "lightning_muon.cli.models.hugging_face"
    return _fit(f"--model.net={name}", "--model.net.model_type=vit", f"--model.net.overrides={{{size}}}")


def fit_timm() -> dict[str, Any]:
    """A ResNet of timm, with a stand-in for torchvision."""
    __import__("timm_alone").import_timm()
    options = "{num_classes: '${from_data:classes}', in_chans: '${from_data:channels}'}"
    name = "lightning_muon.cli.models.timm_model"
    return _fit(f"--model.net={name}", "--model.net.name=resnet10t", f"--model.net.options={options}")


def _fit(*network: str) -> dict[str, Any]:
    fitted = run("fit", *network, "--trainer.max_steps=2", "--trainer.limit_val_batches=1")
    predicted = run("predict", "--ckpt_path=last", "--data.predict=images/a")
    batches: Any = predicted.trainer.predict_loop.predictions
    with torch.no_grad():
        outputs = fitted.model._logits(torch.zeros(2, 3, 8, 8)).shape[1]
    return {"outputs": outputs, "classes": [row["class"] for batch in batches for row in batch]}
