"""Re-ranking: matching scores of each query with its top k gallery images."""

import torch
from tqdm.auto import tqdm

from .distributed import Shard, cut_batches, gather_in_order, without_lone_row
from .encode import ImageEncodings, TextEncodings, forward_context


ROWS_PER_CHUNK = 1024


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
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Score (text, image) pairs with the fusion layers and the matching head.

    Texts are padded to the longest of their batch only: the fusion layers hide padding, so the scores stay the same, and
    pairs that come sorted by text length waste nothing.

    Args:
        model: an MRAModel or a model whose `.mra` is one, in eval mode.
        texts: with hidden states.
        image_hidden_states: (images, views, 1 + patches, hidden), a few images that fit the device.
        pair_texts: (pairs,), index into `texts`.
        pair_images: (pairs,), index into `image_hidden_states`.
        batch_size: pairs in a forward pass.
        dtype: dtype of the forward passes (autocast); None for that of the weights.

    Returns:
        (views, pairs) float32 on the CPU: the logit of class 1, "match".
    """
    model = getattr(model, "mra", model)
    parameter = next(model.parameters())
    compute_dtype = dtype or parameter.dtype
    image_hidden_states = image_hidden_states.to(parameter.device, compute_dtype)
    num_views = image_hidden_states.shape[1]
    scores = torch.empty(num_views, len(pair_texts))
    for batch in cut_batches(len(pair_texts), batch_size):
        pairs = slice(batch.start, batch.stop)
        hidden_states, attention_mask = texts.padded(pair_texts[pairs])
        hidden_states = hidden_states.to(parameter.device, compute_dtype)
        attention_mask = attention_mask.to(parameter.device)
        images = pair_images[pairs].to(parameter.device)
        with forward_context(model, dtype):
            logits = [
                without_lone_row(
                    model.match_logits,
                    text_hidden_states=hidden_states,
                    attention_mask=attention_mask,
                    image_hidden_states=image_hidden_states[images, view],
                )
                for view in range(num_views)
            ]
        scores[:, pairs] = torch.stack(logits)[..., 1].float().cpu()
    return scores


def rerank(
    model,
    texts: TextEncodings,
    images: ImageEncodings,
    top_indices: torch.Tensor,
    *,
    batch_size: int = 256,
    dtype: torch.dtype | None = None,
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
        batch_size: pairs in a forward pass.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
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
            )
        )
    scores = torch.cat(list(gather_in_order(results, len(images.batches), shard)), dim=1)
    in_order = torch.empty_like(scores)
    in_order[:, order] = scores
    return in_order.view(-1, num_queries, k)
