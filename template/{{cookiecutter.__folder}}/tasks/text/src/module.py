"""The LightningModule: loss and metrics of a language model, and the text that it writes."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn
from torchmetrics.aggregation import MeanMetric
from torchmetrics.text import Perplexity

from lightning_muon.callbacks import writes_predictions
from {{ cookiecutter.package_name }}.generation import check_sampling, generate
from {{ cookiecutter.package_name }}.training import TrainingModule


class TextModule(TrainingModule):
    """Train a network to predict the next token.

    Args:
        net: Maps tokens (batch, time), int64, to logits (batch, time, vocabulary). Its output may also be an object
            with these as ``logits``, as the models of ``transformers`` have it. Its ``balance_loss``, if it has one, is
            added to the loss.
        context: Largest number of input tokens.
        balance: Factor of the network's ``balance_loss``, by which experts are used alike.
        sample_tokens: Number of tokens that ``predict`` writes.
        temperature: Divisor of the logits in ``predict``. Smaller values give more likely text, 0 the likeliest.
        top_k: ``predict`` draws from this many most likely tokens.
        top_p: ``predict`` draws from the most likely tokens that together have this probability.
        training: The optimizer, its schedule and the routing.
    """

    def __init__(
        self,
        net: nn.Module,
        context: int = 256,
        balance: float = 0.01,
        sample_tokens: int = 400,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        **training: Any,
    ) -> None:
        super().__init__(net, **training)
        if sample_tokens < 0:
            raise ValueError(f"sample_tokens must be at least 0, got {sample_tokens}")
        check_sampling(temperature, top_k, top_p)
        self.save_hyperparameters()
        self.context = context
        self.balance = balance
        self.sample_tokens = sample_tokens
        self.sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.val_loss, self.val_perplexity = MeanMetric(), Perplexity()
        self.test_loss, self.test_perplexity = MeanMetric(), Perplexity()

    @property
    def flops_per_batch(self) -> int | None:
        """Floating-point operations of a batch in training, which ``throughput/mfu`` needs; ``None``: not known."""
        of_token = getattr(self.net, "flops_per_token", None)
        batch_size = getattr(self.trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        return None if of_token is None or batch_size is None else of_token() * self.context * batch_size

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of a batch (batch, context + 1), in nats per token."""
        _, _, loss = self._next_tokens(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss + self.balance * getattr(self.net, "balance_loss", 0.0)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log loss and perplexity of the validation text."""
        self._evaluate(batch, "val", self.val_loss, self.val_perplexity)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log loss and perplexity of the test text."""
        self._evaluate(batch, "test", self.test_loss, self.test_perplexity)

    def on_validation_epoch_end(self) -> None:
        """Log the loss of a model that knows how frequent tokens are and nothing else, as a baseline."""
        unigram_loss = getattr(self.trainer.datamodule, "unigram_loss", None)  # type: ignore[attr-defined]
        if unigram_loss is not None:
            self.log("val/unigram_loss", unigram_loss, sync_dist=True)

    def predict_step(self, batch: list[dict[str, Any]], batch_idx: int) -> list[dict[str, Any]]:
        """Continue the prompts of a batch; print them, or return them for the file that ``--output`` names."""
        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        prompts = [sample["tokens"] for sample in batch]
        # The seed of the run and the place of the prompt: not what else is in the batch.
        seeds = [(torch.initial_seed() + sample["index"]) % 2**63 for sample in batch]
        options = {**self.sampling, "stop": tokenizer.end, "seeds": seeds}
        written = generate(self.net, prompts, self.sample_tokens, self.context, **options)
        texts = [tokenizer.decode(tokens.tolist()) for tokens in written]
        if not writes_predictions(self.trainer):
            self.print("\n\n".join(texts))
        starts = [len(tokenizer.decode(prompt.tolist())) for prompt in prompts]
        return [
            {**sample["given"], "completion": text[start:]}
            for sample, text, start in zip(batch, texts, starts, strict=True)
        ]

    def _next_tokens(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (batch, context, vocabulary), targets (batch, context) and the loss."""
        output, targets = self.net(batch[:, :-1]), batch[:, 1:]
        logits = getattr(output, "logits", output)
        return logits, targets, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def _evaluate(self, batch: Tensor, stage: str, mean_loss: MeanMetric, perplexity: Perplexity) -> None:
        logits, targets, loss = self._next_tokens(batch)
        mean_loss.update(loss, weight=len(batch))
        perplexity.update(logits.float(), targets)
        self.log_dict({f"{stage}/loss": mean_loss, f"{stage}/perplexity": perplexity}, prog_bar=True)
