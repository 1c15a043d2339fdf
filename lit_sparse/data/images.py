"""Images with a class each."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, BinaryIO, ClassVar

from datasets import Image
from torch import Tensor
from transformers import AutoImageProcessor

from lit_sparse.data.media import MediaData, Medium, load_processor
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class ImageMedium(Medium):
    """Images, decoded by pillow and processed by an image processor."""

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


@dataclass(kw_only=True, eq=False, repr=False)
class ImageData(MediaData):
    """Images with a class each, from a folder or from the hub; needs ``pip install "lit-sparse[vision]"``.

    Images are turned upright and converted to RGB, unless the image processor says ``do_convert_rgb: false``. The image
    processor of the backbone then resizes, crops and normalises them. Batches hold ``pixel_values`` and ``labels``,
    class ids (long). Test splits whose labels are all hidden (-1) give batches without labels; so does prediction.

    Args:
        image: Column of the images; in folders of images it is ``image``.
    """

    image: str = "image"

    _medium_class = ImageMedium

    def _load_medium(self, name: str) -> ImageMedium:
        if find_spec("PIL") is None:
            raise UsageError('Images need pillow: install the vision extra, pip install "lit-sparse[vision]".')
        return ImageMedium(load_processor(AutoImageProcessor, name))
