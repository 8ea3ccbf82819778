"""Arguments of the web page."""

import os
from dataclasses import dataclass

from mra.common.arguments import option
from mra.gallery.arguments import TOKEN_VARIABLE
from mra.gallery.types import DEFAULT_COLLECTION


@dataclass(frozen=True)
class UploadLimits:
    """What one upload may hold.

    Attributes:
        images: pictures.
        bytes: of all of them, unpacked.
        image_bytes: of one.
    """

    images: int = 10_000
    bytes: int = 2 * 2**30
    image_bytes: int = 50 * 2**20


@dataclass
class PageArguments:
    """What the page shows and where it listens; MRA_MODEL, MRA_GALLERY and MRA_IMAGES stand in for what is left out."""

    model: str | None = option(None, "model folder or Hub id; the gallery's own when left out")
    gallery: str | None = option(None, "path ending in .db, or http://host:19530 of a Milvus server")
    collection: str = option(
        DEFAULT_COLLECTION, f"name of the gallery there; the token of a server is read from {TOKEN_VARIABLE}"
    )
    images: str | None = option(None, "folder or data set to index at the start; the page may index folders below it")
    host: str | None = option(None, "address to listen on; this machine alone when left out")
    port: int | None = option(None, "port to listen on; GRADIO_SERVER_PORT or 7860 when left out")
    max_upload_mb: int = option(200, "largest uploaded file")
    max_upload_images: int = option(UploadLimits.images, "most pictures of an upload")

    def __post_init__(self) -> None:
        for name in ("model", "gallery", "images"):
            setattr(self, name, getattr(self, name) or os.environ.get(f"MRA_{name.upper()}"))
        if not self.gallery:
            raise ValueError("--gallery is needed (or MRA_GALLERY)")
        if self.port is None:
            self.port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
