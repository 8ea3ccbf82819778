"""Plain implementations of what MRA computes in fewer steps: padded, row by row of the definition, nothing shared.

They are what the benchmarks compare with and what the tests take for the truth.
"""

import torch
import torch.nn.functional as F
from transformers.masking_utils import create_bidirectional_mask

from losses_mra import choose_hard_negatives, contrastive_loss, masked_language_loss, matching_loss


def plain_fuse(model, text_hidden_states, attention_mask, image_hidden_states, image_attention_mask=None):
    """
    Runs every fusion layer on every token of every row.

    Args:
        model: an `MRAModel`.
        text_hidden_states: `(pairs, length, text hidden_size)`.
        attention_mask: `(pairs, length)`.
        image_hidden_states: `(pairs, 1 + patches, vision hidden_size)`.
        image_attention_mask: `(pairs, 1 + patches)`; all visible when absent.

    Returns:
        `(pairs, length, text hidden_size)`.
    """
    config = model.config.text_config
    self_mask = create_bidirectional_mask(config, text_hidden_states, attention_mask)
    cross_mask = create_bidirectional_mask(
        config, text_hidden_states, image_attention_mask, encoder_hidden_states=image_hidden_states
    )
    hidden_states = text_hidden_states
    for layer in model.fusion_layers:
        hidden_states, _ = layer.attention(hidden_states, self_mask)
        hidden_states, _ = layer.crossattention(
            hidden_states, encoder_hidden_states=image_hidden_states, encoder_attention_mask=cross_mask
        )
        hidden_states = layer.output(layer.intermediate(hidden_states), hidden_states)
    return hidden_states


def plain_match_logits(model, text_hidden_states, attention_mask, image_hidden_states, image_attention_mask=None):
    """Scores pairs of rows, given as to [`plain_fuse`]: `(pairs, 2)` logits."""
    fused = plain_fuse(model, text_hidden_states, attention_mask, image_hidden_states, image_attention_mask)
    return model.match_head(fused[:, 0])


@torch.no_grad()
def plain_rerank(model, text_hidden_states, attention_mask, image_hidden_states, top_indices):
    """
    Scores each query's top k, one query at a time, on captions padded to their full length.

    Args:
        model: an `MRAModel`.
        text_hidden_states: `(queries, max_text_length, text hidden_size)`.
        attention_mask: `(queries, max_text_length)`.
        image_hidden_states: `(images, 1 + patches, vision hidden_size)`.
        top_indices: `(queries, k)`.

    Returns:
        `(queries, k)` logits of class 1.
    """
    scores = torch.empty(top_indices.shape)
    for query, images in enumerate(top_indices):
        logits = plain_match_logits(
            model,
            text_hidden_states[query].expand(len(images), -1, -1),
            attention_mask[query].expand(len(images), -1),
            image_hidden_states[images],
        )
        scores[query] = logits[:, 1]
    return scores


def plain_itm_loss(model, images, texts, attention_mask, negative_images, negative_texts):
    """
    Matching loss of a batch, its true pairs in one pass through the fusion layers and its negatives in another.

    Args:
        model: an `MRAModel`.
        images: `(batch, 1 + patches, vision hidden_size)` hidden states.
        texts: `(batch, max_text_length, text hidden_size)` hidden states.
        attention_mask: `(batch, max_text_length)`.
        negative_images: `(batch,)`, another image for each text.
        negative_texts: `(batch,)`, another text for each image.

    Returns:
        Scalar.
    """
    matched = plain_match_logits(model, texts, attention_mask, images)
    others = plain_match_logits(
        model,
        torch.cat([texts, texts[negative_texts]]),
        torch.cat([attention_mask, attention_mask[negative_texts]]),
        torch.cat([images[negative_images], images]),
    )
    labels = torch.cat([labels_of(matched, 1), labels_of(others, 0)])
    return matching_loss(torch.cat([matched, others]), labels)


def labels_of(logits, label):
    """The same class for every row."""
    return torch.full((len(logits),), label, device=logits.device)


def plain_mlm_loss(model, images, mlm_input_ids, attention_mask, labels):
    """
    Masked-language loss of padded captions, predicted at every position.

    Args:
        model: an `MRAForPreTraining`.
        images: `(batch, 1 + patches, vision hidden_size)` hidden states.
        mlm_input_ids, labels: `(batch, length)`, padded here to `max_text_length`.
        attention_mask: `(batch, max_text_length)`.

    Returns:
        Scalar.
    """
    missing = attention_mask.shape[1] - mlm_input_ids.shape[1]
    mlm_input_ids = F.pad(mlm_input_ids, (0, missing), value=model.config.text_config.pad_token_id)
    texts = model.get_text_hidden_states(mlm_input_ids, attention_mask)
    logits = model.mlm_head(plain_fuse(model.mra, texts, attention_mask, images))
    return masked_language_loss(logits.flatten(0, 1), F.pad(labels, (0, missing), value=-100).flatten())


def plain_finetuning_losses(model, batch, generator=None):
    """
    Losses of fine-tuning as published: every text padded, the image projected again for every text that meets it.

    Args:
        model: an `MRAForPreTraining`.
        batch: keyword arguments of its `forward`, with augmented captions and without regions.
        generator: draws the hard negatives, in the order in which `MRAForPreTraining` draws them.

    Returns:
        The terms by their names in `MRAPreTrainingOutput`, and their weighted sum `loss`.
    """
    losses, config, mra = {}, model.config, model.mra
    images = model.get_image_hidden_states(batch["pixel_values"])
    for prefix in ("", "augmented_"):
        attention_mask = batch[f"{prefix}attention_mask"]
        texts = model.get_text_hidden_states(batch[f"{prefix}input_ids"], attention_mask)
        if not prefix:
            image_embeds = mra.project_image(images)
        text_embeds, identities = mra.project_text(texts), batch["identity_ids"]
        losses[f"{prefix}itc_loss"] = contrastive_loss(
            image_embeds, text_embeds, identities, model.temperature, config.label_smoothing
        )
        negative_images, negative_texts = plain_negatives(model, image_embeds, text_embeds, identities, generator)
        losses[f"{prefix}itm_loss"] = plain_itm_loss(
            mra, images, texts, attention_mask, negative_images, negative_texts
        )
    losses["mlm_loss"] = plain_mlm_loss(
        model, images, batch["mlm_input_ids"], batch["attention_mask"], batch["labels"]
    )
    plain = losses["itc_loss"] + config.itm_weight * losses["itm_loss"] + config.mlm_weight * losses["mlm_loss"]
    augmented = losses["augmented_itc_loss"] + losses["augmented_itm_loss"]
    return losses | {"loss": plain + config.augmentation_weight * augmented}


@torch.no_grad()
def plain_negatives(model, image_embeds, text_embeds, identities, generator):
    """Hard negatives of a batch in which no identity stands alone: for each text an image, for each image a text."""
    similarity = image_embeds @ text_embeds.t() / model.temperature
    negative_images, _ = choose_hard_negatives(similarity.t(), identities, generator)
    return negative_images, choose_hard_negatives(similarity, identities, generator)[0]
