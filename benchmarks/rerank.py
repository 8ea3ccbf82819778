"""Time re-ranking: pairs of query and image, padded and one query at a time, against `mra.retrieval.rerank`.

python benchmarks/rerank.py --full_size --json
python benchmarks/rerank.py --full_size --json --device cuda --dtype bfloat16 --queries 512 --gallery 256 --k 128
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/rerank.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.measure import (
    MIB,
    Cost,
    ModelBenchmark,
    caption_lengths,
    describe_device,
    make_config,
    matmul_rate,
    peak_memory,
    reset_peak_memory,
    show,
)
from configuration_mra import MRAConfig
from modeling_mra import MRAModel
from mra.common.arguments import option, parse_arguments
from mra.common.sharding import cut_batches
from mra.retrieval.encode import ImageEncodings, TextEncodings
from mra.retrieval.reranking import rerank
from mra.retrieval.towers import forward_context
from tests.oracle.plain import plain_rerank


@dataclass
class RerankBenchmark(ModelBenchmark):
    """Options of this benchmark."""

    queries: int | None = option(None, "number of queries; 48 at full size when left out")
    gallery: int | None = option(None, "gallery images; 8 at full size when left out")
    k: int | None = option(None, "images re-ranked per query; 8 at full size when left out")
    image_batch_size: int = option(64, "images to hold keys and values of")
    batch_size: int | None = option(None, "most pairs per forward pass")


def main(argv: list[str] | None = None) -> None:
    """Print both costs, their ratio and the largest difference of scores."""
    (args,) = parse_arguments([RerankBenchmark], description=__doc__, argv=argv, config=False)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    defaults = (48, 8, 8) if args.full_size else (6, 8, 5)
    queries, gallery, k = (
        given or default for given, default in zip((args.queries, args.gallery, args.k), defaults, strict=True)
    )
    model = make_model(make_config(args.full_size)).to(device)  # pyright: ignore[reportArgumentType]  # a decorator hides `self`
    padded, mask, texts, images = make_encodings(model.config, queries, gallery, args.image_batch_size, dtype)
    top_indices = torch.rand(queries, gallery).topk(k).indices

    def ours() -> torch.Tensor:
        return rerank(model, texts, images, top_indices, batch_size=args.batch_size, dtype=dtype)[0]

    def plain() -> torch.Tensor:
        with forward_context(model, dtype):
            return plain_rerank(
                model,
                padded.to(device),
                mask.to(device),
                cast(torch.Tensor, images.hidden_states)[:, 0].to(device),
                top_indices.to(device),
            )

    if device.type != "cpu":
        ours()
        plain()
    costs, scores, peaks = {"plain": Cost(), "ours": Cost()}, {}, {}
    # Ours runs before and after, so that changes in machine speed favour neither.
    for name, run in (("ours", ours), ("plain", plain), ("ours", ours)):
        reset_peak_memory(device)
        with costs[name].measured(device):
            scores[name] = run()
        peaks[name] = peak_memory(device)
    pairs = top_indices.numel()
    plain_seconds, our_seconds = costs["plain"].on(device) / pairs, costs["ours"].on(device) / (2 * pairs)
    rate = matmul_rate(device, dtype)
    plain_work, our_work = multiply_adds(model.config, texts.lengths, gallery, k)
    results = {
        "device": describe_device(device),
        "dtype": args.dtype,
        "pairs": pairs,
        "mean_text_length": texts.lengths.double().mean().item(),
        "plain_cpu_ms_per_pair": 1e3 * costs["plain"].cpu_seconds / pairs,
        "cpu_ms_per_pair": 1e3 * costs["ours"].cpu_seconds / (2 * pairs),
        "plain_pairs_per_second": pairs / costs["plain"].seconds,
        "pairs_per_second": 2 * pairs / costs["ours"].seconds,
        "plain_multiply_adds_per_pair": plain_work,
        "multiply_adds_per_pair": our_work,
        "matmul_multiply_adds_per_second": rate,
        "plain_share_of_matmul_rate": plain_work / plain_seconds / rate,
        "share_of_matmul_rate": our_work / our_seconds / rate,
        "cpu_ratio": 2 * costs["plain"].cpu_seconds / costs["ours"].cpu_seconds,
        "seconds_ratio": 2 * costs["plain"].seconds / costs["ours"].seconds,
        "multiply_adds_ratio": plain_work / our_work,
        "score_deviation": scores["plain"].std().item(),
        "max_abs_difference": (scores["ours"] - scores["plain"]).abs().max().item(),
    }
    if device.type == "cuda":
        results |= {f"{name}_peak_memory_mib": peak / MIB for name, peak in peaks.items()}
        results["peak_memory_ratio"] = peaks["plain"] / peaks["ours"]
    show(results, args.json)


def make_model(config: MRAConfig) -> MRAModel:
    """Build a random model whose weights are large enough that the scores of different pairs differ visibly."""
    model = MRAModel(config).eval()
    with torch.no_grad():
        for parameter in [*model.fusion_layers.parameters(), *model.match_head.parameters()]:
            if parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
    return model


def make_encodings(
    config: MRAConfig, queries: int, gallery: int, image_batch_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, TextEncodings, ImageEncodings]:
    """Build random encodings of captions of different lengths and of images with one view.

    Returns:
        `(queries, max_text_length, hidden)` padded hidden states and their mask, the same texts without padding, and the
        images.
    """
    width, longest = config.text_config.hidden_size, config.max_text_length
    lengths = caption_lengths(queries, longest)
    mask = torch.arange(longest) < lengths[:, None]
    padded = torch.randn(queries, longest, width).to(dtype)
    texts = TextEncodings(torch.empty(queries, 0), padded[mask], lengths)
    tokens = torch.randn(gallery, 1, 1 + config.vision_config.num_patches, config.vision_config.hidden_size).to(dtype)
    batches = cut_batches(gallery, image_batch_size)
    return padded, mask.long(), texts, ImageEncodings(torch.empty(gallery, 0), tokens, torch.arange(gallery), batches)


def multiply_adds(config: MRAConfig, lengths: torch.Tensor, gallery: int, k: int) -> tuple[float, float]:
    """Count the multiply-adds of the fusion layers' matrix products for one pair, on average.

    Args:
        config: the model's configuration.
        lengths: `(queries,)` tokens of each query.
        gallery: images.
        k: images matched with each query.

    Returns:
        Those of the plain implementation, and those of ours, without padding and repeated computations.
    """
    text, tokens = config.text_config, 1 + config.vision_config.num_patches
    width, layers = text.hidden_size, text.num_fusion_layers
    square, feed_forward = width * width, 2 * width * text.intermediate_size
    image_width = config.vision_config.hidden_size
    keys_values = 2 * tokens * image_width * width

    def self_attention(length: int) -> int:
        return 4 * length * square + 2 * length**2 * width

    def cross_attention(length: int) -> int:
        return 2 * length * square + 2 * length * tokens * width

    padded = config.max_text_length
    plain = layers * (self_attention(padded) + cross_attention(padded) + padded * feed_forward + keys_values)
    length, square_length = lengths.double().mean().item(), lengths.double().square().mean().item()
    middle = (6 * square + feed_forward + 2 * tokens * width) * length + 2 * width * square_length
    of_first_to_image = 2 * square + 2 * image_width * width + 2 * tokens * text.num_attention_heads * image_width
    last = 4 * square + 2 * length * text.num_attention_heads * width + of_first_to_image + feed_forward
    once_a_text = (
        5 * square * length + 2 * width * square_length
    ) / k  # self-attention and queries of the first layer
    first = (square + feed_forward + 2 * tokens * width) * length
    once_an_image = (layers - 1) * keys_values * gallery / (len(lengths) * k)
    return float(plain), first + (layers - 2) * middle + last + once_a_text + once_an_image


if __name__ == "__main__":
    main()
