"""The images: by default scikit-learn's handwritten digits, 1797 of 8 × 8 pixels, without a download."""

from sklearn.datasets import load_digits

from lightning_muon.data import ImageDataModule, LabelledImages


class ImageData(ImageDataModule):
    """The images of ``folder``, which has a folder for each class, or handwritten digits.

    For data of another kind, override ``train_dataloader`` and ``val_dataloader``; see ``ImageDataModule``.
    """

    def default_images(self) -> LabelledImages:
        """Return the digits; their values are from 0 to 16."""
        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype("uint8")
        return LabelledImages(list(images), digits.target.tolist(), [str(name) for name in digits.target_names])
