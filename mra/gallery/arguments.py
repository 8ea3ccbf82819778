"""Command-line arguments of the gallery commands."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mra.common.arguments import option, require
from mra.gallery.types import DEFAULT_COLLECTION, DEFAULT_MATCHED_VIEWS, DEFAULT_RERANK, DEFAULT_TOP


if TYPE_CHECKING:
    from mra.gallery.gallery import Gallery


TOKEN_VARIABLE = "MILVUS_TOKEN"
GIB = 2**30

# Address that only this machine can connect to.
LOOPBACK = "127.0.0.1"


@dataclass
class PlaceArguments:
    """Location of the gallery."""

    theme_name: ClassVar[str] = "gallery"

    gallery: str = option(help="path ending in .db, or address of a Milvus server such as http://host:19530")
    collection: str = option(DEFAULT_COLLECTION, "name of the gallery at that location")
    token: str | None = option(None, f"token of the Milvus server; prefer the environment variable {TOKEN_VARIABLE}")
    files: str | None = option(None, "folder of copied images and cached tokens, instead of the default one")


@dataclass
class EncoderArguments:
    """Model that encodes images and texts."""

    theme_name: ClassVar[str] = "model"

    model: str | None = option(None, "model folder or Hub id; by default the one that built the gallery")
    backend: Literal["auto", "torch", "onnx"] = option(
        "auto",
        "onnx runs the ONNX export that --model is, or that its folder `onnx` holds; auto does so to search and serve on a "
        "CPU if the export is of the gallery's model, and else uses PyTorch",
    )
    device: str | None = option(None, "cpu, cuda, ...; by default the GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] | None = option(
        None,
        "dtype of the forward passes; auto, the faster of float32 and bfloat16 on this device; int8, the image encoder alone, "
        "on a CPU, calibrated on the first 32 images",
    )
    token_cache: float = option(4.0, "maximum size of the token cache in GiB", metavar="GIB")

    def __post_init__(self) -> None:
        if self.token_cache < 0:
            raise ValueError(f"--token_cache must be at least 0 GiB, got {self.token_cache}")
        if self.backend == "onnx" and self.dtype is not None:
            raise ValueError(
                "--dtype cannot be used with --backend onnx, which runs in the precision of the export: omit it"
            )


@dataclass
class NewGalleryArguments:
    """Settings that are fixed when a gallery is created."""

    theme_name: ClassVar[str] = "new gallery"

    token_dtype: Literal["float32", "float16"] | None = option(None, "dtype of cached tokens; float16 by default")
    matched_views: Literal[1, 2] = option(
        DEFAULT_MATCHED_VIEWS, "views of an image that a search matches; 2 adds the mirror image, as in evaluation"
    )
    index: Literal["flat", "hnsw", "ivf"] | None = option(
        None, "kind of index; flat is exact; by default flat, on a server hnsw"
    )


@dataclass
class SourceArguments:
    """Images to index."""

    theme_name: ClassVar[str] = "images"

    images: str = option(help="folder of images, or dataset (folder or Hub id) for load_dataset")
    metadata: str | None = option(None, "CSV file with the column path, and optionally camera, time and others")
    split: str | None = option(None, "split of the dataset")
    prefix: str = option("", "prefix of the keys, to distinguish equal file names")
    prune: bool = option(False, "remove images that are no longer in the source")
    copy_images: bool = option(False, "copy all images into the gallery; by default only those without a file")
    batch_size: int = option(32, "images per forward pass")
    num_workers: int = option(2, "threads that decode images")


@dataclass
class RemovalArguments:
    """Images to remove."""

    where: str | None = option(None, """condition on the images to remove, such as 'camera == "c3"'""")
    keys: list[str] | None = option(None, "keys of the images to remove")
    delete_files: bool = option(False, "also delete your own files of these images")

    def __post_init__(self) -> None:
        if (self.where is None) == (self.keys is None):
            raise ValueError("exactly one of --where and --keys must be given, to choose the images")


@dataclass
class StatsArguments:
    """Output format."""

    json: bool = option(False, "print one JSON object")


@dataclass
class CalibrationArguments:
    """Dataset to calibrate on."""

    dataset: str = option(help="dataset (folder or Hub id) with columns image, captions and image_id")
    split: str = option("validation", "split of the dataset")
    rerank: int = option(DEFAULT_RERANK, "images to re-rank per query")
    max_false_alarms: float | None = option(None, "maximum share of false alarms, such as 0.05")


@dataclass
class SearchArguments:
    """Query of a search, and what to return."""

    theme_name: ClassVar[str] = "search"

    texts: list[str] = option(
        [], "text to search for; several are searched one after another", positional=True, metavar="TEXT"
    )
    image: str | None = option(None, "image of the person; with a text, both have equal weight")
    top: int = option(DEFAULT_TOP, "number of hits")
    rerank: int = option(DEFAULT_RERANK, "number of nearest images to re-rank, 0 for none")
    early_stop: bool = option(True, "stop re-ranking as soon as the first --top hits are settled")
    where: str | None = option(None, """filter, such as 'camera == "c3" and time > "2026-01-31"'""")
    threshold: float | None = option(
        None, "matching probability of a likely hit; by default the calibrated one, or 0.5"
    )
    phrase: list[str] = option([], "phrase to match with each hit; can be repeated", repeated=True)
    save: str | None = option(None, "image file to draw the best hits of each search in")
    json: bool = option(False, "print one JSON object per search")

    def __post_init__(self) -> None:
        if not self.texts and self.image is None:
            raise ValueError("TEXT or --image must be given, or both")


@dataclass
class ServeArguments:
    """Address to listen on."""

    port: int = option(8765, f"port of {LOOPBACK}, to which only this machine can connect; 0 for any free one")

    def __post_init__(self) -> None:
        require(0 <= self.port < 2**16, "port", "from 0 to 65535", self.port)


def open_gallery(
    place: PlaceArguments,
    encoder: EncoderArguments | None = None,
    new: NewGalleryArguments | None = None,
    auto: Literal["auto", "torch"] = "torch",
) -> "Gallery":
    """Open the gallery named by the arguments.

    Args:
        place: its location.
        encoder: its model; None for a command that needs none.
        new: settings of a new gallery.
        auto: what `--backend auto` stands for in the command.

    Raises:
        ValueError: as for `Gallery`.
    """
    from mra.gallery.gallery import Gallery

    encoder = encoder or EncoderArguments()
    return Gallery(
        place.gallery,
        encoder.model,
        collection=place.collection,
        token=place.token or os.environ.get(TOKEN_VARIABLE),
        device=encoder.device,
        dtype=encoder.dtype,
        backend=auto if encoder.backend == "auto" else encoder.backend,
        files=place.files,
        token_cache=int(encoder.token_cache * GIB),
        token_dtype=new and new.token_dtype,
        matched_views=new.matched_views if new else DEFAULT_MATCHED_VIEWS,
        index=new and new.index,
    )
