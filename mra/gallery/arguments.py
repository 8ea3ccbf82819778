"""Options that the commands on a gallery share."""

import argparse
import os
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from mra.gallery.gallery import Gallery
from mra.gallery.milvus import INDEXES
from mra.gallery.place import DEFAULT_COLLECTION
from mra.gallery.token_cache import TOKEN_DTYPES


TOKEN_VARIABLE = "MILVUS_TOKEN"
GIB = 2**30


def add_place(parser: argparse.ArgumentParser) -> None:
    """Options that say where a gallery lies."""
    parser.add_argument("--gallery", required=True, help="path ending in .db, or http://host:19530 of a Milvus server")
    parser.add_argument(
        "--collection", default=DEFAULT_COLLECTION, help="name of the gallery there (default: %(default)s)"
    )
    parser.add_argument("--token", help=f"of a Milvus server; better set the variable {TOKEN_VARIABLE}")
    parser.add_argument("--files", help="folder of copied images and cached tokens, where it is not the usual one")


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that say what encodes."""
    parser.add_argument("--model", help="model folder or Hub id; the one the gallery was built with when left out")
    parser.add_argument("--backend", choices=("torch", "onnx"), default="torch", help="onnx: --model is an export")
    parser.add_argument("--device", help="cpu, cuda, ...; the GPU if there is one when left out")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the forward passes")
    parser.add_argument(
        "--token_cache",
        type=float,
        default=4.0,
        metavar="GIB",
        help="most GiB of cached tokens (default: %(default)s)",
    )


def add_new(parser: argparse.ArgumentParser) -> None:
    """Options of a gallery that is made."""
    parser.add_argument("--token_dtype", choices=TOKEN_DTYPES, help="of cached tokens in a new gallery (float32)")
    parser.add_argument(
        "--index", choices=tuple(INDEXES), help="of a new gallery: flat is exact (default: flat; server: hnsw)"
    )


def open_gallery(args: argparse.Namespace) -> Gallery:
    """Open the gallery that the arguments name.

    Raises:
        ValueError: as `Gallery`, and if an ONNX backend is asked for without the folder of an export.
    """
    options = vars(args)
    encoder = None
    if options.get("backend") == "onnx":
        if args.model is None:
            raise ValueError("--backend onnx needs --model, the folder that mra.retrieval.export wrote")
        if args.dtype is not None:
            raise ValueError("--dtype is for --backend torch: an export has the precision it was exported with")
        from mra.retrieval.onnx_encoder import OnnxEncoder

        encoder = OnnxEncoder(args.model, args.device)
    return Gallery(
        args.gallery,
        options.get("model"),
        collection=args.collection,
        token=args.token or os.environ.get(TOKEN_VARIABLE),
        device=options.get("device"),
        dtype=getattr(torch, options["dtype"]) if options.get("dtype") else None,
        encoder=encoder,
        files=args.files,
        token_cache=int(options.get("token_cache", 4.0) * GIB),
        token_dtype=options.get("token_dtype"),
        index=options.get("index"),
    )


def progress_bar(unit: str) -> Callable[[int, int], None]:
    """A progress bar that is told images done and images in all."""
    bars = []

    def update(done: int, total: int) -> None:
        if not bars:  # at the first image, below what loading the model prints
            bars.append(tqdm(total=total, unit=f" {unit}", leave=False))
        bars[0].update(done - bars[0].n)
        if done == total:
            bars[0].close()

    return update
