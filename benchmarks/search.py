"""Time searching: a gallery of synthetic images with a model, and an index of synthetic vectors of any size.

python benchmarks/search.py --vectors 20000 --index hnsw --json
python benchmarks/search.py --vectors 200000 --pictures 0 --json
python benchmarks/search.py --full_size --vectors 0 --pictures 32 --json
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/search.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import statistics
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer

from benchmarks.measure import MIB, ModelBenchmark, describe_device, make_config, peak_memory, show
from modeling_mra import MRAForImageTextRetrieval
from mra.common.arguments import option, parse_arguments
from mra.gallery.gallery import Gallery
from mra.gallery.place import Place
from mra.gallery.store import Record
from processing_mra import MRAImageProcessor, MRAProcessor


ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "data_scripts" / "sample" / "tokenizer"
SENTENCE = "a woman in a red coat with a black backpack and white shoes, walking and looking to the left"

# Relative deviation of a person's vectors from their mean.
IMAGES_OF_A_PERSON, SPREAD, QUERY_SPREAD = 4, 0.7, 1.0
WRITTEN_AT_ONCE = 2000


@dataclass
class SearchBenchmark(ModelBenchmark):
    """Options of this benchmark."""

    vectors: int = option(1000, "synthetic vectors in the index; 0 for none")
    dim: int = option(2048, "dimension of the vectors")
    index: Literal["flat", "hnsw", "ivf"] = option("flat", "kind of index")
    queries: int = option(50, "searches to time")
    limit: int = option(128, "nearest vectors per search")
    pictures: int = option(32, "synthetic images to index with a model; 0 for none")
    model: str | None = option(None, "folder or Hub id; a random model when left out")


def main(argv: list[str] | None = None) -> None:
    """Print both parts as one result."""
    (args,) = parse_arguments([SearchBenchmark], description=__doc__, argv=argv, config=False)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    results = {
        "device": describe_device(torch.device(args.device)),
        "vectors": args.vectors,
        "pictures": args.pictures,
    }
    with tempfile.TemporaryDirectory() as folder:
        if args.pictures:
            model = args.model or save_model(Path(folder) / "model", args.full_size)
            results |= measure_pictures(Path(folder), model, args)
        if args.vectors:
            results |= measure_vectors(Path(folder), args)
    show(results, args.json)


def measure_pictures(folder: Path, model: str, args: SearchBenchmark) -> dict:
    """Time indexing and the stages of a search that re-ranks every image, with and without cached tokens."""
    generator = np.random.default_rng(args.seed)
    (folder / "pictures").mkdir()
    for number in range(args.pictures):
        pixels = generator.integers(0, 256, (24, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((128, 384)).save(folder / "pictures" / f"{number:05d}.jpg")
    dtype = getattr(torch, args.dtype)
    options = {"device": args.device, "dtype": None if dtype == torch.float32 else dtype}
    with Gallery(folder / "pictures.db", model, **options) as gallery:
        gallery.encoder  # noqa: B018 (loaded before timing)
        report = gallery.build(folder / "pictures")
        gallery.search(SENTENCE, rerank=args.pictures)
        cached = [gallery.search(SENTENCE, rerank=args.pictures).timings for _ in range(5)]
        tokens_bytes = gallery.stats().disk_bytes["tokens"] or 0
    with Gallery(folder / "pictures.db", token_cache=0, **options) as gallery:
        uncached = gallery.search(SENTENCE, rerank=args.pictures).timings["tokens"]
    results = {"build_images_per_second": report.encoded / report.seconds}
    results |= {
        f"{stage}_ms": 1e3 * statistics.median(timings[stage] for timings in cached) for stage in ("encode", "search")
    }
    for stage in ("tokens", "rerank"):
        seconds = statistics.median(timings[stage] for timings in cached)
        results[f"{stage}_ms_per_image"] = 1e3 * seconds / args.pictures
    results["uncached_tokens_ms_per_image"] = 1e3 * uncached / args.pictures
    results["token_kib_per_image"] = tokens_bytes / 1024 / args.pictures
    return results


def measure_vectors(folder: Path, args: SearchBenchmark) -> dict:
    """Time writing, opening and searching an embedded index, and compare it with exact search."""
    vectors, queries = make_vectors(args.vectors, args.dim, args.queries, args.seed)
    before = peak_memory(torch.device("cpu"))
    place = Place(folder / "vectors.db", index=args.index)
    store = place.make()
    start = time.perf_counter()
    store.create(args.dim)
    for first in range(0, len(vectors), WRITTEN_AT_ONCE):
        store.upsert(
            [
                Record(f"{row:09d}", f"{row:064x}", f"/photos/{row:09d}.jpg", "/photos", embedding=vectors[row])
                for row in range(first, min(first + WRITTEN_AT_ONCE, len(vectors)))
            ]
        )
    store.flush()
    write_seconds = time.perf_counter() - start
    place.close()
    start = time.perf_counter()
    place = Place(folder / "vectors.db")
    store = place.store
    assert store is not None
    store.search(queries[0], args.limit)
    first_seconds = time.perf_counter() - start
    seconds, recalls = [], []
    for query in queries:
        start = time.perf_counter()
        found = {record.key for record, _ in store.search(query, args.limit)}
        seconds.append(time.perf_counter() - start)
        nearest = np.argpartition(-(vectors @ query), min(args.limit, len(vectors) - 1))[: args.limit]
        recalls.append(np.mean([f"{row:09d}" in found for row in nearest]))
    results = {
        "index": args.index,
        "dim": args.dim,
        "written_per_second": len(vectors) / write_seconds,
        "open_and_first_search_s": first_seconds,
        "search_ms_median": 1e3 * statistics.median(seconds),
        "search_ms_slowest": 1e3 * max(seconds),
        "recall": float(np.mean(recalls)),
        "disk_mib": (place.index_bytes() or 0) / MIB,
        "vectors_mib": vectors.nbytes / MIB,
        "peak_memory_mib": peak_memory(torch.device("cpu")) / MIB,
        "peak_memory_before_mib": before / MIB,
    }
    place.close()
    return results


def make_vectors(count: int, dim: int, num_queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw unit vectors grouped by person, and queries near some people, but further away than their images."""
    generator = np.random.default_rng(seed)

    def unit(values: np.ndarray) -> np.ndarray:
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    people = unit(generator.standard_normal((-(-count // IMAGES_OF_A_PERSON), dim), dtype=np.float32))
    vectors = np.repeat(people, IMAGES_OF_A_PERSON, axis=0)[:count]
    for first in range(0, count, WRITTEN_AT_ONCE):
        some = vectors[first : first + WRITTEN_AT_ONCE]
        some += SPREAD * unit(generator.standard_normal(some.shape, dtype=np.float32))
        some[:] = unit(some)
    asked = people[generator.integers(len(people), size=num_queries)]
    queries = unit(asked + QUERY_SPREAD * unit(generator.standard_normal(asked.shape, dtype=np.float32)))
    return vectors, queries


def save_model(folder: Path, full_size: bool) -> str:
    """Build a random model with its processor."""
    config, tokenizer = make_config(full_size), AutoTokenizer.from_pretrained(TOKENIZER)
    config.text_config.vocab_size = len(tokenizer)
    MRAForImageTextRetrieval(config).save_pretrained(folder)
    height, width = config.vision_config.image_size
    images = MRAImageProcessor(size={"height": height, "width": width})
    MRAProcessor(images, tokenizer, config.max_text_length).save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
