"""Images with a class each."""

from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from datasets import Image
from torch import Tensor
from transformers import AutoImageProcessor

from lit_sparse.data import quickstart
from lit_sparse.data.media import MediaData, Medium
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class ImageMedium(Medium):
    """Images, decoded by pillow and made ready by an image processor."""

    kind: ClassVar[str] = "image"
    feature: ClassVar[Any] = Image(decode=False)
    endings: ClassVar[tuple[str, ...]] = (
        ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    )  # fmt: skip

    processor: Any

    def check(self, stream: BinaryIO) -> None:
        """Read the header."""
        import PIL.Image

        with PIL.Image.open(stream) as image:
            # Pillow would cut such values off at 255 and leave a white image.
            if self._to_rgb and image.mode.startswith(("I", "F")):
                raise ValueError(f"its mode is {image.mode}, but at most 8 bits per channel can be made RGB")

    def decode(self, stream: BinaryIO) -> Any:
        """The image, upright and in RGB."""
        import PIL.Image
        import PIL.ImageOps

        image = PIL.ImageOps.exif_transpose(PIL.Image.open(stream))
        return image.convert("RGB") if self._to_rgb else image

    def batch(self, decoded: list[Any]) -> dict[str, Tensor]:
        """``pixel_values``."""
        return dict(self.processor(images=decoded, return_tensors="pt"))

    @property
    def _to_rgb(self) -> bool:
        return getattr(self.processor, "do_convert_rgb", None) is not False


class ImageData(MediaData):
    """Images with a class each, from a folder or from the hub; needs ``pip install "lit-sparse[vision]"``.

    The image processor of the backbone makes what the model takes: it resizes, crops and normalises. Images are
    made RGB before, unless the processor says ``do_convert_rgb: false``, and turned as their camera noted. Batches
    hold ``pixel_values`` and ``labels``, class ids (long). A test split whose labels are all -1, as benchmarks hide
    them, gives batches without labels; so does prediction.

    Args:
        path: Where the images are: a folder with a folder for each split (train, validation, test, predict) that
            has a folder for each class; a folder of classes alone, which is then the training split; a folder with
            tables named by split (train.parquet …) or laid out like a data set of the hub; or the id of a data set
            on the hub. A table holds images or their paths, which start at the working directory.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        validation_fraction: Share of the training split, in (0, 1), to hold out as validation split where the
            source has none. The rows held out are the same in every run.
        image: Column of the images; folders of images call it ``image``.
        label: Column of the label; folders of images call it ``label``.
        labels: Names of the classes in the order of their ids. None takes them from the training split: the names
            that the column itself has, otherwise its sorted distinct values.
        processor: Hub id or folder of the image processor; None is that of the model's ``backbone``.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        num_workers: Processes that decode images and assemble batches; 0 is this one. A GPU waits for the images
            unless there are several.
        seed: Seed of the order of training rows, which depends on it and on the epoch alone.
    """

    _medium_class = ImageMedium

    def __init__(
        self,
        path: str,
        name: str | None = None,
        revision: str | None = None,
        validation_fraction: float | None = None,
        image: str = "image",
        label: str = "label",
        labels: list[str] | None = None,
        processor: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path=path,
            name=name,
            revision=revision,
            validation_fraction=validation_fraction,
            column=image,
            label=label,
            labels=labels,
            processor=processor,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )

    def _load_medium(self, name: str) -> ImageMedium:
        try:
            import PIL  # noqa: F401
        except ImportError as error:
            raise UsageError(
                'Images need pillow: install the vision extra, pip install "lit-sparse[vision]".'
            ) from error
        try:
            return ImageMedium(AutoImageProcessor.from_pretrained(quickstart.resolve(name)))
        except (ImportError, OSError, ValueError) as error:
            raise UsageError(
                f"The image processor of {name!r} could not be loaded ({' '.join(str(error).split())}): give its "
                f"folder as processor, or its hub id while the hub can be reached."
            ) from error
