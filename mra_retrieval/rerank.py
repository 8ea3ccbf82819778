"""Re-ranking: matching scores of each query with its top k gallery images."""

from functools import partial

import torch
from tqdm.auto import tqdm

from .distributed import Shard, gather_in_order, without_lone_row
from .encode import ImageEncodings, TextEncodings, forward_context
from .matching import match_logits


ROWS_PER_CHUNK = 1024

# Pairs in a forward pass: on a CPU its activations should stay in the cache, an accelerator wants to be kept busy.
BATCH_SIZES = {"cpu": 32}
DEFAULT_BATCH_SIZE = 512


def similarity_matrix(
    query_embeds: torch.Tensor, gallery_embeds: torch.Tensor, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Compute the dot products (queries, gallery) of two sets of embeddings, in chunks of queries, on the CPU in float32."""
    gallery = gallery_embeds.to(device).T
    similarity = torch.empty(len(query_embeds), len(gallery_embeds))
    for start in range(0, len(query_embeds), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        similarity[rows] = (query_embeds[rows].to(device) @ gallery).cpu()
    return similarity


def top_k(similarity: torch.Tensor, k: int) -> torch.Tensor:
    """Find the k most similar gallery entries of each query, best first: (queries, k) int64.

    Raises:
        ValueError: if k is not between 1 and the size of the gallery.
    """
    if not 1 <= k <= similarity.shape[1]:
        raise ValueError(f"k must be between 1 and the gallery's {similarity.shape[1]} images, got {k}")
    return torch.cat([chunk.topk(k, dim=1).indices for chunk in similarity.split(ROWS_PER_CHUNK)])


def match_pairs(
    model,
    texts: TextEncodings,
    image_hidden_states: torch.Tensor,
    pair_texts: torch.Tensor,
    pair_images: torch.Tensor,
    *,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    log_odds: bool = False,
) -> torch.Tensor:
    """Score (text, image) pairs with the fusion layers and the matching head.

    What depends on an image alone, its keys and values in every fusion layer, is computed once, and what depends on a text
    alone once a forward pass. Texts are padded to the longest of their forward pass only; the fusion layers hide padding, so
    the scores stay the same, and pairs that come sorted by length and text waste nothing.

    Args:
        model: an MRAModel or a model whose `.mra` is one, in eval mode.
        texts: with hidden states.
        image_hidden_states: (images, views, 1 + patches, hidden), a few images: their keys and values must fit the device.
        pair_texts: (pairs,), index into `texts`.
        pair_images: (pairs,), index into `image_hidden_states`.
        batch_size: most pairs in a forward pass; None for what suits the device.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
        log_odds: subtract the logit of class 0.

    Returns:
        (views, pairs) float32 on the CPU: the logit of class 1, "match", or its log-odds.

    Raises:
        ValueError: if the batch size is not positive.
    """
    model = getattr(model, "mra", model)
    parameter = next(model.parameters())
    device, compute_dtype = parameter.device, dtype or parameter.dtype
    if batch_size is None:
        batch_size = BATCH_SIZES.get(device.type, DEFAULT_BATCH_SIZE)
    batches = cut_by_length(texts.lengths[pair_texts], batch_size)
    num_views = image_hidden_states.shape[1]
    scores = torch.empty(num_views, len(pair_texts))
    with forward_context(model, dtype):
        for view in range(num_views):
            keys_values = model.get_image_keys_values(image_hidden_states[:, view].to(device, compute_dtype))
            for batch in batches:
                pairs = slice(batch.start, batch.stop)
                rows, text_index = pair_texts[pairs].unique(return_inverse=True)
                hidden_states, attention_mask = texts.padded(rows)
                logits = without_lone_row(
                    partial(
                        match_logits,
                        model,
                        hidden_states.to(device, compute_dtype),
                        None if attention_mask.all() else attention_mask.to(device),
                        keys_values,
                    ),
                    text_index=text_index.to(device),
                    image_index=pair_images[pairs].to(device),
                ).float()
                scores[view, pairs] = (logits[:, 1] - logits[:, 0] if log_odds else logits[:, 1]).cpu()
    return scores


def cut_by_length(lengths: torch.Tensor, batch_size: int) -> list[range]:
    """Cut pairs that come sorted by text length into forward passes.

    A forward pass that is at least half full ends where longer texts begin, which would pad those it holds.

    Args:
        lengths: (pairs,), tokens of the text of each.
        batch_size: most pairs in a forward pass.

    Raises:
        ValueError: if the batch size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    batches, start = [], 0
    for end in lengths.unique_consecutive(return_counts=True)[1].cumsum(0).tolist():
        while end - start >= batch_size:
            batches.append(range(start, start + batch_size))
            start += batch_size
        if end > start and (2 * (end - start) >= batch_size or end == len(lengths)):
            batches.append(range(start, end))
            start = end
    return batches


def rerank(
    model,
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

    The pairs are ordered by batch of images, then by text length, and cut within a batch of images. The cut depends on the
    data and the batch sizes, not on the number of processes: each takes the batches whose images it holds, moves them to the
    device once, and no hidden state of an image travels between processes.

    Args:
        model: an MRAModel or a model whose `.mra` is one, in eval mode.
        texts: all queries, with hidden states.
        images: the gallery, with the hidden states of the images that this process encoded.
        top_indices: (queries, k), gallery rows to match with each query.
        batch_size: most pairs in a forward pass; None for what suits the device. Together with the batches of images, whose
            keys and values are held at a time, it bounds the memory.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
        log_odds: give the log-odds of "match" instead of its logit.
        shard: the share of this process, the same as when encoding.
        progress: show a progress bar.

    Returns:
        (views, queries, k) float32, the same on every process.

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

    results, held = [], 0
    for tile in tqdm(shard.own(list(range(len(images.batches)))), desc="re-ranking", disable=not progress):
        batch, pairs = images.batches[tile], tile_pairs[tile]
        hidden_states = images.hidden_states[held : held + len(batch)]
        held += len(batch)
        results.append(
            match_pairs(
                model,
                texts,
                hidden_states,
                pair_texts[pairs],
                pair_images[pairs] - batch.start,
                batch_size=batch_size,
                dtype=dtype,
                log_odds=log_odds,
            )
        )
    scores = torch.cat(list(gather_in_order(results, len(images.batches), shard)), dim=1)
    in_order = torch.empty_like(scores)
    in_order[:, order] = scores
    return in_order.view(-1, num_queries, k)
