"""Time image encoder and matcher on a CPU: as published in float32, against the packed ones in the precision chosen for it.

The image encoder in int8 is timed in the same run, where the CPU has instructions for it.

python benchmarks/cpu.py --full_size --json
"""

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/cpu.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn.functional as F

from benchmarks.measure import Cost, caption_lengths, make_config, matmul_rate, show
from benchmarks.rerank import make_encodings, make_model
from mra.common.arguments import option, parse_arguments
from mra.common.environment import cpu_name
from mra.common.private_interfaces import has_int8_products
from mra.gallery.searching import ROUND_SIZES
from mra.retrieval.encode import TextEncodings
from mra.retrieval.matching import PairMatcher
from mra.retrieval.precision import resolve_dtype
from mra.retrieval.quantized import CALIBRATION_IMAGES, QuantizedVision
from mra.retrieval.towers import Towers, forward_context
from tests.oracle.plain import plain_rerank


PAIRS_OF_QUERY = 128
# Of them, those that a search for 20 hits, the default, matches on average before it stops early: docs/search.md.
MATCHED_OF_QUERY = 52
CPU = torch.device("cpu")


@dataclass
class CpuBenchmark:
    """Options of this benchmark."""

    full_size: bool = option(False, "use the published architecture instead of a tiny model")
    json: bool = option(False, "print the result as JSON in the last line")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "precision of the packed ones")
    images: int = option(4, "images of each encoding")
    pairs: int = option(16, "pairs that the plain matcher scores")
    repeats: int = option(3, "measurements of each, taken in turn; the best counts")
    threads: int = option(1, "CPU threads; more than one would also count waiting as CPU time")
    seed: int = option(0, "seed of weights and inputs")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print CPU-seconds of both, their ratios and how well the embeddings agree."""
    (args,) = parse_arguments([CpuBenchmark], description=__doc__, argv=argv, config=False)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = make_model(make_config(args.full_size))
    dtype = resolve_dtype(model, args.dtype) or torch.float32
    towers, matcher = Towers(model, dtype), PairMatcher(model, dtype)
    pixels = torch.randn(args.images, *model.vision_model.input_shape)

    def query(images: int) -> tuple[torch.Tensor, torch.Tensor, TextEncodings, torch.Tensor]:
        torch.manual_seed(args.seed)
        padded, mask, texts, encodings = make_encodings(model.config, 1, images, images, torch.float32)
        assert encodings.hidden_states is not None
        return padded, mask, texts, encodings.hidden_states

    padded, mask, texts, tokens = query(args.pairs)
    _, _, query_texts, query_tokens = query(PAIRS_OF_QUERY)
    rounds = query_tokens[:MATCHED_OF_QUERY].split(ROUND_SIZES["cpu"])
    everything = torch.arange(args.pairs)[None]

    def score(texts: TextEncodings, tokens: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(len(tokens), dtype=torch.long)
        return matcher.match(texts, tokens, rows, torch.arange(len(tokens)))[0]

    def encode() -> torch.Tensor:
        with forward_context(model, dtype):
            return towers.image_hidden_states(pixels)

    works = {
        "encoder_plain": lambda: model.get_image_hidden_states(pixels),
        "encoder_packed": encode,
        "matcher_plain": lambda: plain_rerank(model, padded, mask, tokens[:, 0], everything)[0],
        "matcher_packed": lambda: score(texts, tokens),
        "query": lambda: [score(query_texts, some) for some in rounds],
        "query_in_full": lambda: score(query_texts, query_tokens),
    }
    if has_int8_products():
        quantized = QuantizedVision(model.vision_model)
        for _ in range(0, CALIBRATION_IMAGES, args.images):
            quantized(torch.randn_like(pixels))
        works["encoder_int8"] = lambda: quantized(pixels)
    results = {name: work() for name, work in works.items()}  # warms up
    best = dict.fromkeys(works, float("inf"))
    for _ in range(args.repeats):
        for name, work in works.items():
            cost = Cost()
            with cost.measured(CPU):
                work()
            best[name] = min(best[name], cost.cpu_seconds)
    encoders = [name for name in works if name.startswith("encoder_")]
    embeds = {name: model.get_image_features(image_hidden_states=results[name]) for name in encoders}
    cosines = {
        name: F.cosine_similarity(embeds["encoder_plain"], embedded).min().item() for name, embedded in embeds.items()
    }
    int8 = {}
    if "encoder_int8" in works:
        int8 = {
            "image_seconds_int8": best["encoder_int8"] / args.images,
            "encoder_ratio_int8": best["encoder_plain"] / best["encoder_int8"],
            "embedding_cosine_min_int8": cosines["encoder_int8"],
        }
    difference = (results["matcher_plain"] - results["matcher_packed"]).abs().max().item()
    show(
        describe_cpu()
        | {
            "threads": args.threads,
            "dtype": str(dtype).removeprefix("torch."),
            "gmac_per_second_float32": matmul_rate(CPU, torch.float32) / 1e9,
            "image_seconds_plain": best["encoder_plain"] / args.images,
            "image_seconds": best["encoder_packed"] / args.images,
            "pair_seconds_plain": best["matcher_plain"] / args.pairs,
            "pair_seconds": best["query_in_full"] / PAIRS_OF_QUERY,
            "encoder_ratio": best["encoder_plain"] / best["encoder_packed"],
            "matcher_ratio": best["matcher_plain"] / args.pairs * PAIRS_OF_QUERY / best["query_in_full"],
            "query_seconds_128": best["query"],
            "query_pairs_matched": MATCHED_OF_QUERY,
            "query_seconds_128_without_early_stopping": best["query_in_full"],
            "query_tokens": int(caption_lengths(1, model.config.max_text_length)),
            "embedding_cosine_min": cosines["encoder_packed"],
            "largest_difference_of_logits": difference,
        }
        | int8,
        args.json,
    )


def describe_cpu() -> dict[str, Any]:
    """Return the processor's name and which of the instructions for matrix products in low precision it has."""
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(encoding="utf-8", errors="replace").split()) if flags.exists() else set()
    wanted = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "cpu": cpu_name(),
        "machine": platform.machine(),
        "flags": " ".join(flag for flag in wanted if flag in words),
    }


if __name__ == "__main__":
    main()
