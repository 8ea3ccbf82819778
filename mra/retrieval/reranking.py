"""Re-ranking: matching scores of each query with its top k gallery images."""

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mra.common.sharding import Shard, gather_in_order
from mra.retrieval.encode import ImageEncodings, TextEncodings
from mra.retrieval.matching import PairMatcher
from mra.retrieval.score_fusion import match_scores


ROWS_PER_CHUNK = 1024


def similarity_matrix(
    query_embeds: torch.Tensor, gallery_embeds: torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Compute dot products `(queries, gallery)` of embeddings on the CPU in float32, in chunks of queries."""
    gallery = gallery_embeds.to(device).T
    similarity = torch.empty(len(query_embeds), len(gallery_embeds))
    for start in range(0, len(query_embeds), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        similarity[rows] = (query_embeds[rows].to(device) @ gallery).cpu()
    return similarity


def top_k(similarity: torch.Tensor, k: int) -> torch.Tensor:
    """Find the k most similar gallery entries of each query, best first: `(queries, k)` int64.

    Raises:
        ValueError: if k is not between 1 and the size of the gallery.
    """
    if not 1 <= k <= similarity.shape[1]:
        raise ValueError(f"k must be between 1 and the gallery's {similarity.shape[1]} images, got {k}")
    return torch.cat([chunk.topk(k, dim=1).indices for chunk in similarity.split(ROWS_PER_CHUNK)])


def rerank(
    model: PreTrainedModel,
    texts: TextEncodings,
    images: ImageEncodings,
    top_indices: torch.Tensor,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    log_odds: bool = False,
    shard: Shard | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Compute the matching scores of each query with its top k images, for every view of the images.

    For arguments and errors see `rerank_logits`; with `log_odds` the scores are the log-odds of "match" instead of its logit.

    Returns:
        `(views, queries, k)` float32, the same on every process.
    """
    logits = rerank_logits(
        model, texts, images, top_indices, batch_size=batch_size, dtype=dtype, shard=shard, progress=progress
    )
    return match_scores(logits, log_odds)


def rerank_logits(
    model: PreTrainedModel,
    texts: TextEncodings,
    images: ImageEncodings,
    top_indices: torch.Tensor,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    shard: Shard | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Compute both logits of the matching head for each query and its top k images, for every view of the images.

    Pairs are ordered by batch of images, then by text length, and cut within a batch of images. The cut depends on data and
    batch sizes, not on the number of processes: each process handles the batches of images that it holds and moves them to the
    device once, and hidden states of images are never exchanged.

    Args:
        model: an MRAModel, or a model with one as `.mra`, in eval mode.
        texts: all queries, with hidden states.
        images: the gallery, with the hidden states of the images that this process encoded.
        top_indices: gallery rows to match with each query, `(queries, k)`.
        batch_size: most pairs per forward pass; None for a number chosen for the device. Memory is bounded by it and by the
            batches of images, for which keys and values are held.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
        shard: the share of this process, the same as when encoding.
        progress: whether to show a progress bar.

    Returns:
        `(views, queries, k, 2)` float32, the same on every process; class 1 is "match".

    Raises:
        ValueError: if the batch size is not positive or hidden states were not kept.
    """
    shard = shard or Shard()
    if (images.hidden_states is None and len(images.rows)) or texts.hidden_states is None:
        raise ValueError("re-ranking needs hidden states: encode images and texts with keep_hidden_states=True")
    num_queries, k = top_indices.shape
    pair_texts = torch.arange(num_queries).repeat_interleave(k)
    pair_images = top_indices.flatten()
    tile_of_image = torch.empty(len(images.embeds), dtype=torch.long)
    for tile, batch in enumerate(images.batches):
        tile_of_image[batch.start : batch.stop] = tile
    by_length = texts.lengths[pair_texts].argsort(stable=True)
    order = by_length[tile_of_image[pair_images[by_length]].argsort(stable=True)]
    tile_sizes = torch.bincount(tile_of_image[pair_images], minlength=len(images.batches))
    tile_pairs = order.split(tile_sizes.tolist())

    matcher = PairMatcher(model, dtype)
    results, held = [], 0
    for tile in tqdm(shard.own(list(range(len(images.batches)))), desc="re-ranking", disable=not progress):
        batch, pairs = images.batches[tile], tile_pairs[tile]
        assert images.hidden_states is not None  # a process encoded the images of its own tiles
        hidden_states = images.hidden_states[held : held + len(batch)]
        held += len(batch)
        pair_rows = pair_images[pairs] - batch.start
        results.append(matcher.pair_logits(texts, hidden_states, pair_texts[pairs], pair_rows, batch_size))
    logits = torch.cat(list(gather_in_order(results, len(images.batches), shard)), dim=1)
    in_order = torch.empty_like(logits)
    in_order[:, order] = logits
    return in_order.view(-1, num_queries, k, 2)
