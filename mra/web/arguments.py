"""Arguments of the web page."""

import os
from dataclasses import dataclass

from mra.common.arguments import option
from mra.gallery.arguments import TOKEN_VARIABLE
from mra.gallery.types import DEFAULT_COLLECTION


@dataclass(frozen=True)
class UploadLimits:
    """Limits of one upload.

    Attributes:
        images: number of images.
        bytes: total size of the unpacked files.
        image_bytes: size of one image.
    """

    images: int = 10_000
    bytes: int = 2 * 2**30
    image_bytes: int = 50 * 2**20


@dataclass
class PageArguments:
    """Gallery and address of the page; MRA_MODEL, MRA_GALLERY and MRA_IMAGES are the defaults of the first options."""

    model: str | None = option(None, "model folder or Hub id; by default the one that built the gallery")
    gallery: str | None = option(None, "path ending in .db, or address of a Milvus server such as http://host:19530")
    collection: str = option(
        DEFAULT_COLLECTION, f"name of the gallery at that location; {TOKEN_VARIABLE} is the token of a server"
    )
    images: str | None = option(None, "folder or dataset to index at the start; the page can index folders in it")
    host: str | None = option(None, "address to listen on; by default only this machine can connect")
    port: int | None = option(None, "port to listen on; by default GRADIO_SERVER_PORT or 7860")
    max_upload_mb: int = option(200, "maximum size of an uploaded file in MB")
    max_upload_images: int = option(UploadLimits.images, "maximum number of images per upload")

    def __post_init__(self) -> None:
        for name in ("model", "gallery", "images"):
            setattr(self, name, getattr(self, name) or os.environ.get(f"MRA_{name.upper()}"))
        if not self.gallery:
            raise ValueError("--gallery is missing: pass it, or set MRA_GALLERY")
        if self.port is None:
            self.port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
