"""Arguments of the commands on a gallery, and the gallery that they name."""

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mra.common.arguments import option
from mra.gallery.types import DEFAULT_COLLECTION, DEFAULT_RERANK, DEFAULT_TOP


if TYPE_CHECKING:
    from mra.gallery.gallery import Gallery


TOKEN_VARIABLE = "MILVUS_TOKEN"
GIB = 2**30


@dataclass
class PlaceArguments:
    """Where the gallery lies."""

    theme_name: ClassVar[str] = "gallery"

    gallery: str = option(help="path ending in .db, or http://host:19530 of a Milvus server")
    collection: str = option(DEFAULT_COLLECTION, "name of the gallery there")
    token: str | None = option(None, f"of a Milvus server; better set the variable {TOKEN_VARIABLE}")
    files: str | None = option(None, "folder of copied images and cached tokens, where it is not the usual one")


@dataclass
class EncoderArguments:
    """What encodes images and sentences."""

    theme_name: ClassVar[str] = "model"

    model: str | None = option(None, "model folder or Hub id; the one the gallery was built with when left out")
    backend: Literal["torch", "onnx"] = option("torch", "onnx: --model is an export")
    device: str | None = option(None, "cpu, cuda, ...; the GPU if there is one when left out")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "of the forward passes")
    token_cache: float = option(4.0, "most GiB of cached tokens", metavar="GIB")

    def __post_init__(self) -> None:
        if not 0 <= self.token_cache < math.inf:
            raise ValueError(f"--token_cache must be a number of GiB, at least 0, got {self.token_cache}")
        if self.backend == "onnx" and self.model is None:
            raise ValueError("--backend onnx needs --model, the folder that `mra export` wrote")
        if self.backend == "onnx" and self.dtype is not None:
            raise ValueError("--dtype is for --backend torch: an export has the precision it was exported with")


@dataclass
class NewGalleryArguments:
    """What is settled when a gallery is made."""

    theme_name: ClassVar[str] = "new gallery"

    token_dtype: Literal["float32", "float16"] | None = option(None, "of cached tokens; float32 when left out")
    index: Literal["flat", "hnsw", "ivf"] | None = option(
        None, "flat is exact; when left out: flat, or hnsw on a server"
    )


@dataclass
class SourceArguments:
    """What to index."""

    theme_name: ClassVar[str] = "images"

    images: str = option(help="folder of images, or folder or Hub id that load_dataset reads")
    metadata: str | None = option(None, "CSV file with the column path, and camera, time and any others")
    split: str | None = option(None, "of a data set")
    prefix: str = option("", "put before the keys, to keep equal file names apart")
    prune: bool = option(False, "remove images that are no longer in the source")
    copy_images: bool = option(False, "keep a copy of each image; without it, only of images that have no file")
    batch_size: int = option(32, "images in a forward pass")
    num_workers: int = option(2, "threads that decode images")


@dataclass
class RemovalArguments:
    """Which images to remove."""

    where: str | None = option(None, """which ones, such as 'camera == "c3"'""")
    keys: list[str] | None = option(None, "which ones, by key")
    delete_files: bool = option(False, "delete your own files of these images too")

    def __post_init__(self) -> None:
        if (self.where is None) == (self.keys is None):
            raise ValueError("give either --where or --keys, to say which images")


@dataclass
class StatsArguments:
    """How to print."""

    json: bool = option(False, "print one JSON object")


@dataclass
class CalibrationArguments:
    """What to calibrate on."""

    dataset: str = option(help="folder or Hub id with columns image, captions and image_id")
    split: str = option("validation", "split of it")
    rerank: int = option(DEFAULT_RERANK, "images re-ranked for each query")
    max_false_alarms: float | None = option(None, "most false alarms to accept, a share such as 0.05")


@dataclass
class SearchArguments:
    """What to search for."""

    theme_name: ClassVar[str] = "search"

    texts: list[str] = option(
        [], "a sentence; several are searched one after the other", positional=True, metavar="TEXT"
    )
    image: str | None = option(None, "picture of the person; with a sentence, both count equally")
    top: int = option(DEFAULT_TOP, "hits to show")
    rerank: int = option(DEFAULT_RERANK, "nearest images to re-rank, 0 for none")
    where: str | None = option(None, """restricts the search, such as 'camera == "c3" and time > "2026-01-31"'""")
    threshold: float | None = option(None, "matching probability of a likely hit; the calibrated one or 0.5")
    phrase: list[str] = option([], "gets a matching probability with each hit; can be repeated", repeated=True)
    save: str | None = option(None, "write a picture of the best hits of each search")
    json: bool = option(False, "print one JSON object a search")

    def __post_init__(self) -> None:
        if not self.texts and self.image is None:
            raise ValueError("give a sentence, --image, or both")


def open_gallery(
    place: PlaceArguments, encoder: EncoderArguments | None = None, new: NewGalleryArguments | None = None
) -> "Gallery":
    """Open the gallery that the arguments name.

    Raises:
        ValueError: as `Gallery`, and if the ONNX export of the arguments cannot be loaded.
    """
    import torch

    from mra.gallery.gallery import Gallery

    encoder = encoder or EncoderArguments()
    exported = None
    if encoder.backend == "onnx" and encoder.model is not None:
        from mra.retrieval.onnx_encoder import OnnxEncoder

        exported = OnnxEncoder(encoder.model, encoder.device)
    return Gallery(
        place.gallery,
        encoder.model,
        collection=place.collection,
        token=place.token or os.environ.get(TOKEN_VARIABLE),
        device=encoder.device,
        dtype=None if encoder.dtype is None else getattr(torch, encoder.dtype),
        encoder=exported,
        files=place.files,
        token_cache=int(encoder.token_cache * GIB),
        token_dtype=new and new.token_dtype,
        index=new and new.index,
    )
