"""Small trainings, one after the other on each rank, each described by a dict."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_muon.optim import MuonAdamW, route_parameters
from lightning_muon.strategies import FSDP2Strategy

SYMBOLS, GLOBAL_BATCH = 11, 24

Job = dict[str, Any]


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Sequences(LightningModule):
    """Predicts the next symbol. Seven rows, or eleven, do not divide among two, three or four ranks."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        torch.manual_seed(job.get("seed", 0))
        self.job = job
        self.embedding = nn.Embedding(SYMBOLS, 7)
        self.blocks = nn.ModuleList(Block(7) for _ in range(2))
        self.head = nn.Linear(7, SYMBOLS, bias=False)
        self.offset = nn.Parameter(torch.zeros(1))
        if job.get("tied"):
            self.head.weight = self.embedding.weight
        if job.get("shards_itself"):
            self.configure_model = self._shard  # type: ignore[method-assign]

    def _shard(self) -> None:
        if not isinstance(self.embedding.weight, DTensor):
            parts = [self] if self.job["shards_itself"] == "all" else [self.blocks[0]]
            for part in parts:
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.offset
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.continued(batch)

    def continued(self, tokens: Tensor) -> Tensor:
        """Goes around ``forward`` of the module that is called."""
        for _ in range(3):
            tokens = torch.cat([tokens, self.forward(tokens)[:, -1:].argmax(-1)], dim=1)
        return tokens

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups: Any = route_parameters(self)
        if self.job.get("optimizer", "MuonAdamW") == "MuonAdamW":
            # float32 throughout: sums in another order are all that may differ.
            exact = {"orthogonalizer_options": {"dtype": "float32"}, "communication_dtype": "float32"}
            return MuonAdamW(groups, lr=self.job.get("lr", 0.02), eps=1e-3, **exact, **self.job.get("options", {}))
        make = getattr(torch.optim, self.job["optimizer"])
        if self.job.get("without_names"):
            groups = [{"params": group["params"], "weight_decay": 0.1 * i} for i, group in enumerate(groups)]
        options = {"momentum": 0.9} if make is torch.optim.SGD else {"eps": 1e-3}
        optimizer: torch.optim.Optimizer = make(groups, lr=self.job.get("lr", 0.02), **options)
        return optimizer

    def train_dataloader(self) -> "Batches":
        return Batches(self.trainer)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Batches(self.trainer).batches, batch_size=None)  # type: ignore[arg-type]

    predict_dataloader = val_dataloader


class WithNetwork(Sequences):
    """Takes modules as arguments and saves all of them, as the modules of many projects do."""

    def __init__(self, job: Job, network: nn.Module, settings: dict[str, Any], width: int = 7) -> None:
        super().__init__(job)
        self.save_hyperparameters()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network(super().forward(tokens))


class Batches:
    """This rank's part of each global batch, in the micro-batches that are accumulated; resumed where it stopped."""

    def __init__(self, trainer: Trainer) -> None:
        data = torch.randint(SYMBOLS, (40, GLOBAL_BATCH, 5), generator=torch.Generator().manual_seed(1))
        rows = data.chunk(trainer.world_size, dim=1)[trainer.global_rank]
        self.batches = [part for batch in rows for part in batch.chunk(trainer.accumulate_grad_batches)]
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        start, self.position = self.position, 0
        for number, batch in enumerate(self.batches[start:], start + 1):
            self.position = number
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class EveryOther(WeightAveraging):
    """An equal average, of every second step."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % 2 == 1


class SaveAt(Callback):
    """Saves during the run: at its end the averaged weights are the model's."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path, weights_only=False)


CALLBACKS: dict[str, Callable[[], Callback]] = {
    "exponential": lambda: EMAWeightAveraging(decay=0.5),
    "equal": EveryOther,
    "epochs": lambda: StochasticWeightAveraging(0.1),
}


def run_jobs(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Run the jobs in this process; returns on rank 0 what :func:`run` returned of each."""
    results = [run(job, dist.get_world_size()) for job in jobs]
    return results if dist.get_rank() == 0 else []


def run(job: Job, world_size: int) -> dict[str, Any]:
    """Trains as the job says.

    Keys: ``strategy``, a name, or the arguments of FSDP2Strategy; ``steps``; ``resume`` and ``save``, paths;
    ``save_at``, a path by the step; ``callbacks``, names; ``network``, for :class:`WithNetwork`; ``trainer``, further
    arguments of it; ``then``, ``"predict"``; and what :class:`Sequences` reads.
    """
    strategy = job.get("strategy", "auto")
    further = dict(job.get("trainer", {}))
    trainer = Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=FSDP2Strategy(**strategy) if isinstance(strategy, dict) else strategy,
        max_steps=job["steps"],
        callbacks=[
            *(CALLBACKS[name]() for name in job.get("callbacks", ())),
            *(SaveAt(*where) for where in job.get("save_at", {}).items()),
            *further.pop("callbacks", ()),
        ],
        **{
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "limit_val_batches": 2,
            "val_check_interval": 2,
            "num_sanity_val_steps": 1,
            "limit_predict_batches": 1,
            **further,
        },
    )
    torch.manual_seed(0)
    network = nn.Linear(SYMBOLS, SYMBOLS)
    settings = {"head": nn.ReLU(), "depth": 2, "parts": [nn.Tanh()]}
    module = WithNetwork(job, network, settings) if job.get("network") else Sequences(job)
    try:
        trainer.fit(module, ckpt_path=job.get("resume"))
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        if not job.get("refused"):
            raise
        return {"error": f"{type(error).__name__}: {error}"}
    if "save" in job:
        trainer.save_checkpoint(job["save"], weights_only=False)
    result = {
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "state": whole_state(trainer, module),
        "options": [[group["lr"], group["weight_decay"]] for group in trainer.optimizers[0].param_groups],
        "loss": float(trainer.callback_metrics["val/loss"]),
        "sharded": sorted(name for name, p in module.named_parameters() if isinstance(p, DTensor)),
        "placements": {name: str(p.placements) for name, p in module.named_parameters() if isinstance(p, DTensor)},
    }
    if job.get("then") == "predict":
        result["predicted"] = trainer.predict(module)[0]  # type: ignore[index]
    return result


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().clone() if isinstance(value, Tensor) else value


def whole_state(trainer: Trainer, module: nn.Module) -> dict[str, Tensor]:
    optimizer: Any = trainer.optimizers[0]
    if hasattr(optimizer, "consolidate_state_dict"):
        optimizer.consolidate_state_dict()  # what shard_state has shared out
    if trainer.global_rank > 0 and not isinstance(trainer.strategy, FSDP2Strategy):
        return {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{names[id(parameters[number])]}: {key}": whole(value)
        for number, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }
