"""A data module for language models whose tokens are streamed from object storage, by litdata."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import default_collate
from typing_extensions import override

from lightning_muon.data.extras import package
from lightning_muon.data.text import TextDataModule

if TYPE_CHECKING:
    from litdata import StreamingDataLoader


class StreamedTextDataModule(TextDataModule):
    """Samples of text that ``litdata.optimize`` made into chunks of tokens, in a folder or in object storage.

    Chunks are downloaded while the run needs them, by the rank that needs them, so the text may be larger than any
    disk. The loaders, the order of samples and the state in checkpoints are litdata's: a run goes on in mid-epoch with
    any number of workers, but with the same number of ranks and the same batch size.
    All ranks get equally many samples; the few that are left over at the end of an epoch are not used.

    Args:
        train: Folder of the chunks, or its address, such as ``s3://bucket/train``.
        val: Those of the validation, likewise.
        test: Those of the test, likewise.
        tokenizer: The tokenizer that made the tokens, see :class:`~lightning_muon.data.TextDataModule`.
        end: The token between documents, by its text; default: the usual one of the vocabulary.
        context: Input tokens per sample.
        batch_size: Samples per batch and device.
        prompt: The text that ``predict`` continues.
        num_workers: Processes that load samples, for each device.
        seed: Seed of the order of samples.

    Raises:
        ModuleNotFoundError: If litdata is not installed.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        train: str,
        val: str,
        test: str | None = None,
        tokenizer: str = "bytes",
        end: str | None = None,
        context: int = 256,
        batch_size: int = 16,
        prompt: str = "def ",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        with package("litdata", "streaming"):
            import litdata  # noqa: F401, PLC0415
        super().__init__(
            tokenizer=tokenizer,
            end=end,
            context=context,
            batch_size=batch_size,
            prompt=prompt,
            num_workers=num_workers,
            seed=seed,
        )
        self.addresses = {"train": train, "val": val, "test": test}

    @property
    def unigram_loss(self) -> None:  # type: ignore[override]
        """``None``: the whole text would have to be downloaded."""

    @override
    def prepare_data(self) -> None:
        """Do nothing: the chunks are prepared."""

    @override
    def train_dataloader(self) -> "StreamingDataLoader":
        return self._streamed("train")

    @override
    def val_dataloader(self) -> "StreamingDataLoader":
        return self._streamed("val")

    @override
    def test_dataloader(self) -> "StreamingDataLoader":
        return self._streamed("test")

    def _streamed(self, split: str) -> "StreamingDataLoader":
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader  # noqa: PLC0415

        address = self.addresses[split]
        if address is None:
            raise ValueError(f"--data.{split}: say where the chunks of the {split} split are")
        samples = StreamingDataset(
            address,
            item_loader=TokensLoader(block_size=self.context + 1),
            shuffle=split == "train",
            seed=self.seed,
            # Otherwise ranks may get different numbers of batches, and the last ones would wait for ever.
            drop_last=True,
        )
        return StreamingDataLoader(
            samples,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=_as_indices,
            pin_memory=torch.cuda.is_available(),
        )


def _as_indices(samples: list[Any]) -> Tensor:
    batch: Tensor = default_collate(samples)
    return batch.long()
