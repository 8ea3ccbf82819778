"""MRA for text-based person retrieval: Swin vision encoder, BERT text layers, BERT fusion layers (arXiv 2507.10195)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.utils import ModelOutput, logging


try:
    from .configuration_mra import MRAConfig
    from .layers_mra import (
        NUM_PARTS,
        MRAFusionLayer,
        MRALanguageHead,
        MRAPartProjection,
        MRATextModel,
        MRAVisionModel,
        Packing,
        keys_and_values,
        masked_mean,
        pool_parts,
        visibility_mask,
    )
    from .losses_mra import (
        MatchingPairs,
        TextBatch,
        check_pairing,
        check_texts,
        check_training_batch,
        choose_hard_negatives,
        contrastive_loss,
        forward_method,
        gather_constant,
        gather_features,
        has_values,
        join_rows,
        masked_language_loss,
        masked_rows,
        matching_loss,
        matching_rows,
        own_rows,
        raise_first,
    )
except ImportError:  # run from the repository root
    if __package__:
        raise
    from configuration_mra import MRAConfig
    from layers_mra import (
        NUM_PARTS,
        MRAFusionLayer,
        MRALanguageHead,
        MRAPartProjection,
        MRATextModel,
        MRAVisionModel,
        Packing,
        keys_and_values,
        masked_mean,
        pool_parts,
        visibility_mask,
    )
    from losses_mra import (
        MatchingPairs,
        TextBatch,
        check_pairing,
        check_texts,
        check_training_batch,
        choose_hard_negatives,
        contrastive_loss,
        forward_method,
        gather_constant,
        gather_features,
        has_values,
        join_rows,
        masked_language_loss,
        masked_rows,
        matching_loss,
        matching_rows,
        own_rows,
        raise_first,
    )


logger = logging.get_logger(__name__)

ImageKeysValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class MRAOutput(ModelOutput):
    """
    Output of [`MRAModel`].

    Args:
        image_embeds: `(images, projection_dim)`, L2-normalised.
        text_embeds: `(texts, projection_dim)`, L2-normalised.
        image_hidden_states: `(images, 1 + patches, vision hidden_size)`, token 0 being the mean of the patches.
        text_hidden_states: `(texts, length, text hidden_size)` of the text-only layers.
    """

    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    image_hidden_states: torch.FloatTensor | None = None
    text_hidden_states: torch.FloatTensor | None = None


@dataclass
class MRAPreTrainingOutput(ModelOutput):
    """
    Output of [`MRAForPreTraining`]; a term whose inputs were not passed is `None`.

    Args:
        loss: weighted sum of the terms below, with the weights of the configuration.
        itc_loss, itm_loss, mlm_loss: contrastive, matching and masked-language losses of image and caption.
        augmented_itc_loss, augmented_itm_loss: the same on the augmented caption.
        region_itc_loss, region_itm_loss: the same on the region and its phrase.
        image_embeds, text_embeds: `(batch, projection_dim)`, L2-normalised.
    """

    loss: torch.FloatTensor | None = None
    itc_loss: torch.FloatTensor | None = None
    itm_loss: torch.FloatTensor | None = None
    mlm_loss: torch.FloatTensor | None = None
    augmented_itc_loss: torch.FloatTensor | None = None
    augmented_itm_loss: torch.FloatTensor | None = None
    region_itc_loss: torch.FloatTensor | None = None
    region_itm_loss: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None


@dataclass
class MRAImageTextRetrievalOutput(ModelOutput):
    """
    Output of [`MRAForImageTextRetrieval`].

    Args:
        similarity: `(texts, images)` cosine similarities.
        match_logits: `(texts, images, 2)`, class 1 being "match"; `None` unless asked for.
        image_embeds: `(images, projection_dim)`, L2-normalised.
        text_embeds: `(texts, projection_dim)`, L2-normalised.
        logits_per_image: `(images, texts)` similarities divided by the temperature, as CLIP names them.
    """

    similarity: torch.FloatTensor | None = None
    match_logits: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None


# ---------------------------------------------------------------- models


class MRAPreTrainedModel(PreTrainedModel):
    """Initialisation, attention implementation and gradient checkpointing shared by the MRA models."""

    config: MRAConfig
    config_class = MRAConfig
    base_model_prefix = "mra"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["SwinTransformerBlock", "MRATextLayer", "MRAFusionLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "relative_position_bias_table"):
            init.trunc_normal_(module.relative_position_bias_table, std=0.02)
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
        if isinstance(module, BertEmbeddings):
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[-1])[None])
            init.zeros_(module.token_type_ids)
        if isinstance(module, MRALanguageHead):
            init.zeros_(module.bias)
        if isinstance(module, (MRAForPreTraining, MRAForImageTextRetrieval)):
            init.constant_(module.temperature, module.config.temperature)

    def set_attn_implementation(self, attn_implementation: str, **kwargs):
        """Sets the attention implementation, `sdpa` or `eager`, of the BERT layers and of the Swin windows."""
        implementation = self.get_correct_attn_implementation(attn_implementation)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = implementation
        _sync_attention(self)

    def _set_gradient_checkpointing(self, enable: bool = True, *args, **kwargs):
        super()._set_gradient_checkpointing(enable, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, MRAVisionModel):
                module.swin.set_grad_checkpointing(enable)


def _sync_attention(model: PreTrainedModel) -> None:
    """timm keeps its own switch for fused attention: set it as the configuration says."""
    for module in model.modules():
        if isinstance(module, MRAVisionModel):
            module.set_fused_attention(model.config.vision_config._attn_implementation == "sdpa")


class MRAModel(MRAPreTrainedModel):
    """Vision encoder, text layers, fusion layers, projections and matching head."""

    _keys_to_ignore_on_load_unexpected = [r"^temperature$", r"^mlm_head\."]  # noqa: RUF012

    def __init__(self, config: MRAConfig):
        super().__init__(config)
        config._attn_implementation = config._attn_implementation  # spreads to the sub-configurations
        vision, text = config.vision_config, config.text_config
        self.vision_model = MRAVisionModel(vision)
        self.text_model = MRATextModel(text)
        self.fusion_layers = nn.ModuleList(
            [MRAFusionLayer(text, vision.hidden_size, i) for i in range(text.num_text_layers, text.num_hidden_layers)]
        )
        if config.projection_type == "part_pooling":
            self.vision_projection = MRAPartProjection(
                NUM_PARTS * vision.hidden_size, config.projection_dim, config.projection_dropout
            )
            self.text_projection = MRAPartProjection(
                (1 + NUM_PARTS) * text.hidden_size, config.projection_dim, config.projection_dropout
            )
        else:
            self.vision_projection = nn.Linear(vision.hidden_size, config.projection_dim)
            self.text_projection = nn.Linear(text.hidden_size, config.projection_dim)
        self.match_head = nn.Sequential(
            nn.Linear(text.hidden_size, 2 * text.hidden_size),
            nn.LayerNorm(2 * text.hidden_size, eps=1e-5),
            nn.GELU(),
            nn.Linear(2 * text.hidden_size, 2),
        )
        _sync_attention(self)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if self.config.head_initialization != "published":
            return
        projections = (self.vision_projection, self.text_projection)
        if any(module is getattr(projection, "linear", None) for projection in projections):
            init.normal_(module.weight, std=1e-5)
        elif isinstance(module, nn.Linear) and module in (*projections, *self.match_head):
            bound = module.in_features**-0.5  # as `nn.Linear.reset_parameters`, which would overwrite loaded weights
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    def get_input_embeddings(self):
        """Word embeddings of the text encoder."""
        return self.text_model.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        """Replaces the word embeddings of the text encoder."""
        self.text_model.embeddings.word_embeddings = value

    def get_image_hidden_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encodes `(batch, 3, height, width)` to `(batch, 1 + patches, vision hidden_size)`; token 0 is the mean."""
        return self.vision_model(pixel_values)

    def get_text_hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """
        Encode tokens with the text-only layers.

        Args:
            input_ids, attention_mask: `(batch, length)`; 1 = token.
            lengths: positions of each row to encode, from the first on; all when absent. The rest of the row is 0 in the
                result. Where they are given, nothing is asked of the device: the values of ids and mask are not checked.

        Returns:
            `(batch, length, text hidden_size)`.

        Raises:
            ValueError: if ids or mask have another shape or type, or a value that the model cannot read.
        """
        problems = check_texts(self.config.text_config, {"": (input_ids, attention_mask)})
        if lengths is None:
            raise_first(problems)
            self._warn_without_mask(input_ids, attention_mask)
        packing = Packing(*input_ids.shape, input_ids.device, lengths)
        mask = visibility_mask(attention_mask, self.dtype, self.config.text_config._attn_implementation)
        return packing.unpack(self.text_model(input_ids, mask, packing))

    def get_image_keys_values(self, image_hidden_states: torch.Tensor) -> ImageKeysValues:
        """
        Projects images once for all texts that will meet them in [`fuse`].

        Args:
            image_hidden_states: `(images, length, vision hidden_size)`.

        Returns:
            Keys and values of each fusion layer, `(images, heads, length, width of a head)` each.
        """
        image_hidden_states = image_hidden_states.to(self.dtype)
        return [keys_and_values(layer.crossattention, image_hidden_states) for layer in self.fusion_layers]

    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, image_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Embeds images, from pixels or from hidden states that are already there.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            image_hidden_states: `(batch, 1 + patches, vision hidden_size)`.

        Returns:
            `(batch, projection_dim)`, L2-normalised.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if (pixel_values is None) == (image_hidden_states is None):
            raise ValueError("`pixel_values` or `image_hidden_states` must be given, and not both")
        if image_hidden_states is None:
            image_hidden_states = self.get_image_hidden_states(pixel_values)
        return self.project_image(image_hidden_states)

    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embeds captions, from tokens or from hidden states that are already there.

        Args:
            input_ids, attention_mask: `(batch, length)`; shorter ones are padded to `max_text_length`, because
                `part_pooling` pools over the padding.
            text_hidden_states: `(batch, max_text_length, text hidden_size)`.

        Returns:
            `(batch, projection_dim)`, L2-normalised.

        Raises:
            ValueError: unless exactly one of `input_ids` and `text_hidden_states` is given, or as
                [`get_text_hidden_states`] does.
        """
        if (input_ids is None) == (text_hidden_states is None):
            raise ValueError("`input_ids` or `text_hidden_states` must be given, and not both")
        if text_hidden_states is None:
            text_hidden_states = self.get_text_hidden_states(*self.pad_captions(input_ids, attention_mask))
        return self.project_text(text_hidden_states)

    def pad_captions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Pad `(batch, length)` tokens and their mask to `max_text_length`, which `part_pooling` pools over.

        Longer ones are left alone, with a warning where they are pooled. Without a mask every position is a token.
        """
        check_texts(self.config.text_config, {"": (input_ids, attention_mask)})
        self._warn_without_mask(input_ids, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        missing = max(self.config.max_text_length - input_ids.shape[1], 0)
        self._warn_of_length(input_ids.shape[1])
        input_ids = F.pad(input_ids, (0, missing), value=self.config.text_config.pad_token_id)
        return input_ids, F.pad(attention_mask, (0, missing), value=0)

    def _warn_without_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        padding = self.config.text_config.pad_token_id
        if attention_mask is None and has_values(input_ids) and (input_ids == padding).any():
            logger.warning_once(
                "`attention_mask` is missing although `input_ids` hold padding, which is then read as text: pass the mask "
                "that the model's MRAProcessor gives"
            )

    def _warn_of_length(self, length: int) -> None:
        limit = self.config.max_text_length
        is_pooled = self.config.projection_type == "part_pooling"
        if length > limit and is_pooled and not torch.compiler.is_compiling():
            logger.warning_once(
                f"`input_ids`: texts are padded to {length} tokens, but the model pools over {limit} (`max_text_length`), so "
                "that their embeddings are unlike those it was trained with: cut and pad texts with the model's MRAProcessor"
            )

    def project_image(self, image_hidden_states: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Project image tokens to the shared space.

        Args:
            image_hidden_states: `(batch, 1 + patches, vision hidden_size)`.
            patch_mask: `(batch, patches)`, 1 = pooled; all patches when absent. `linear` reads token 0 alone.

        Returns:
            `(batch, projection_dim)`, L2-normalised.
        """
        image_hidden_states = image_hidden_states.to(self.dtype)
        if self.config.projection_type == "part_pooling":
            pooled = pool_parts(image_hidden_states[:, 1:], patch_mask)
        else:
            pooled = image_hidden_states[:, 0]
        return F.normalize(self.vision_projection(pooled), dim=-1)

    def project_text(self, text_hidden_states: torch.Tensor) -> torch.Tensor:
        """Project `(batch, max_text_length, text hidden_size)` to `(batch, projection_dim)`, L2-normalised."""
        self._warn_of_length(text_hidden_states.shape[1])
        text_hidden_states = text_hidden_states.to(self.dtype)
        pooled = text_hidden_states[:, 0]
        if self.config.projection_type == "part_pooling":
            pooled = torch.cat([pooled, pool_parts(text_hidden_states[:, 1:])], dim=1)
        return F.normalize(self.text_projection(pooled), dim=-1)

    def fuse(
        self,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_hidden_states: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        image_keys_values: ImageKeysValues | None = None,
        text_index: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        text_lengths: Sequence[int] | None = None,
        pair_lengths: Sequence[int] | None = None,
        position_counts: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """
        Lets texts attend to images in the fusion layers.

        What depends on the text or on the image alone is computed once for each. Lengths and counts are plain numbers,
        known without asking the device: linear layers then skip what lies behind them, and the result is 0 there.

        Args:
            text_hidden_states: `(texts, length, text hidden_size)` of the text-only layers.
            attention_mask: `(texts, length)`, 1 = token.
            image_hidden_states: `(images, image tokens, vision hidden_size)`.
            image_attention_mask: `(pairs, image tokens)`, 1 = visible; all when absent.
            image_keys_values: what [`get_image_keys_values`] gave for the images, instead of their hidden states.
            text_index, image_index: `(pairs,)`, text and image of each pair; row i with row i when absent.
            positions: `(pairs, n)`, text positions to return; all when absent. The last layer computes no others.
            text_lengths: tokens of each text.
            pair_lengths: tokens of each pair's text; those of `text_lengths` where `text_index` is absent.
            position_counts: how many of the n positions of each pair to compute, from the first on.

        Returns:
            `(pairs, length or n, text hidden_size)`; length is the longest of the given lengths.

        Raises:
            ValueError: if the texts, their mask, the images and the pairs differ in number or shape.
        """
        images = image_hidden_states if image_keys_values is None else image_keys_values[0][0]
        check_pairing(
            text_hidden_states, attention_mask, images, image_attention_mask, text_index, image_index, positions,
            read_values=text_lengths is None and pair_lengths is None,
        )  # fmt: skip
        text_hidden_states = text_hidden_states.to(self.dtype)
        if image_keys_values is None:
            image_keys_values = self.get_image_keys_values(image_hidden_states)
        if text_lengths is not None or pair_lengths is not None:
            longest = max(*(text_lengths or ()), *(pair_lengths or ()))
            text_hidden_states = text_hidden_states[:, :longest]
            attention_mask = None if attention_mask is None else attention_mask[:, :longest]
        implementation, device = self.config.text_config._attn_implementation, text_hidden_states.device
        layers, dtype = self.fusion_layers, text_hidden_states.dtype
        self_mask = visibility_mask(attention_mask, dtype, implementation)
        cross_mask = visibility_mask(image_attention_mask, dtype, implementation)
        if len(layers) == 1 and text_index is not None:
            # One layer cannot pair texts and pick positions of the pairs: they are paired before.
            text_hidden_states = text_hidden_states.index_select(0, text_index)
            self_mask = None if self_mask is None else self_mask.index_select(0, text_index)
            text_index, text_lengths = None, pair_lengths
        texts, length = text_hidden_states.shape[:2]
        packing = pair_packing = Packing(texts, length, device, text_lengths)
        if text_index is not None:
            pair_packing = Packing(len(text_index), length, device, pair_lengths)
        at, position_packing = None, None
        if positions is not None:
            position_packing = Packing(*positions.shape, device, position_counts)
            at = position_packing.pack(positions + pair_packing.starts()[:, None])
        hidden_states = packing.pack(text_hidden_states)
        for index, (layer, (keys, values)) in enumerate(zip(layers, image_keys_values, strict=True)):
            pairing = (text_index, pair_packing) if index == 0 and text_index is not None else (None, None)
            picking = (at, position_packing) if index == len(layers) - 1 else (None, None)
            hidden_states = layer(
                hidden_states, packing, self_mask, keys, values, cross_mask, image_index, *pairing, *picking
            )
            if index == 0 and text_index is not None:  # from here on there is one row a pair
                packing, self_mask = pair_packing, None if self_mask is None else self_mask.index_select(0, text_index)
        return (pair_packing if positions is None else position_packing).unpack(hidden_states)

    def match_logits(
        self,
        text_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_hidden_states: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        image_keys_values: ImageKeysValues | None = None,
        text_index: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores pairs of text and image, given as to [`fuse`]: `(pairs, 2)` logits, class 1 being "match"."""
        pairs = text_hidden_states if text_index is None else text_index
        first = torch.zeros(len(pairs), 1, dtype=torch.long, device=text_hidden_states.device)
        fused = self.fuse(
            text_hidden_states, attention_mask, image_hidden_states, image_attention_mask, image_keys_values,
            text_index, image_index, first,
        )  # fmt: skip
        return self.match_head(fused[:, 0])

    @forward_method
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> MRAOutput:
        """
        Encode images, texts or both.

        Args:
            pixel_values: `(images, 3, height, width)`.
            input_ids, attention_mask: `(texts, length)`, padded to `max_text_length` if shorter.

        Raises:
            ValueError: if neither images nor texts are given, or one of them is not as its encoder takes it.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("`pixel_values`, `input_ids` or both must be given, got neither")
        output = MRAOutput()
        if pixel_values is not None:
            output.image_hidden_states = self.get_image_hidden_states(pixel_values)
            output.image_embeds = self.project_image(output.image_hidden_states)
        if input_ids is not None:
            input_ids, attention_mask = self.pad_captions(input_ids, attention_mask)
            output.text_hidden_states = self.get_text_hidden_states(input_ids, attention_mask)
            output.text_embeds = self.project_text(output.text_hidden_states)
        return output


class MRAEncodersMixin:
    """Offers the encoders of the inner [`MRAModel`] on the models that wrap one."""

    def get_image_hidden_states(self, *args, **kwargs):
        """See [`MRAModel.get_image_hidden_states`]."""
        return self.mra.get_image_hidden_states(*args, **kwargs)

    def get_text_hidden_states(self, *args, **kwargs):
        """See [`MRAModel.get_text_hidden_states`]."""
        return self.mra.get_text_hidden_states(*args, **kwargs)

    def get_image_features(self, *args, **kwargs):
        """See [`MRAModel.get_image_features`]."""
        return self.mra.get_image_features(*args, **kwargs)

    def get_text_features(self, *args, **kwargs):
        """See [`MRAModel.get_text_features`]."""
        return self.mra.get_text_features(*args, **kwargs)

    def get_image_keys_values(self, *args, **kwargs):
        """See [`MRAModel.get_image_keys_values`]."""
        return self.mra.get_image_keys_values(*args, **kwargs)

    def fuse(self, *args, **kwargs):
        """See [`MRAModel.fuse`]."""
        return self.mra.fuse(*args, **kwargs)

    def match_logits(self, *args, **kwargs):
        """See [`MRAModel.match_logits`]."""
        return self.mra.match_logits(*args, **kwargs)


class MRAForImageTextRetrieval(MRAEncodersMixin, MRAPreTrainedModel):
    """Scores of texts against images: cosine similarity, and the matching head on request."""

    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\."]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"^temperature$"]  # noqa: RUF012  an MRAModel has none: the configuration's then

    def __init__(self, config: MRAConfig):
        super().__init__(config)
        self.mra = MRAModel(config)
        self.temperature = nn.Parameter(torch.tensor([float(config.temperature)]))  # for the fusion of scores
        self.post_init()

    @forward_method
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_match_logits: bool = False,
    ) -> MRAImageTextRetrievalOutput:
        """
        Score every text against every image.

        Args:
            pixel_values: `(images, 3, height, width)`.
            input_ids, attention_mask: `(texts, length)`, padded to `max_text_length` if shorter.
            return_match_logits: also runs every pair through the fusion layers.
        """
        input_ids, attention_mask = self.mra.pad_captions(input_ids, attention_mask)
        encoded = self.mra(pixel_values, input_ids, attention_mask, return_dict=True)
        match_logits = None
        if return_match_logits:
            texts, images = len(input_ids), len(pixel_values)
            match_logits = self.mra.match_logits(
                encoded.text_hidden_states,
                attention_mask,
                encoded.image_hidden_states,
                text_index=torch.arange(texts, device=input_ids.device).repeat_interleave(images),
                image_index=torch.arange(images, device=input_ids.device).repeat(texts),
            ).view(texts, images, 2)
        similarity = encoded.text_embeds @ encoded.image_embeds.t()
        return MRAImageTextRetrievalOutput(
            similarity=similarity,
            match_logits=match_logits,
            image_embeds=encoded.image_embeds,
            text_embeds=encoded.text_embeds,
            logits_per_image=similarity.t() / self.temperature,
        )


class MRAForPreTraining(MRAEncodersMixin, MRAPreTrainedModel):
    """MRA with its training objective: image and caption, augmented caption, region and phrase."""

    _tied_weights_keys = {  # noqa: RUF012
        "mlm_head.decoder.weight": "mra.text_model.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: MRAConfig):
        super().__init__(config)
        self.mra = MRAModel(config)
        self.temperature = nn.Parameter(torch.tensor([float(config.temperature)]))  # DeepSpeed cannot share scalars
        self.mlm_head = MRALanguageHead(config.text_config)
        self.post_init()

    def get_output_embeddings(self):
        """Decoder of the masked-language head."""
        return self.mlm_head.decoder

    def set_output_embeddings(self, value):
        """Replaces the decoder of the masked-language head."""
        self.mlm_head.decoder = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """Resize the word embeddings, the decoder tied to them and its bias; see [`PreTrainedModel`]."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.mlm_head.resize_bias(self.config.text_config.vocab_size)
        return embeddings

    @forward_method
    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        mlm_input_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        identity_ids: torch.Tensor | None = None,
        augmented_input_ids: torch.Tensor | None = None,
        augmented_attention_mask: torch.Tensor | None = None,
        phrase_input_ids: torch.Tensor | None = None,
        phrase_attention_mask: torch.Tensor | None = None,
        region_attention_mask: torch.Tensor | None = None,
        phrase_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        caption_lengths: Sequence[int] | None = None,
        augmented_lengths: Sequence[int] | None = None,
        phrase_lengths: Sequence[int] | None = None,
        mlm_lengths: Sequence[int] | None = None,
        max_masked: int | None = None,
    ) -> MRAPreTrainingOutput:
        """
        Compute the losses whose inputs are passed.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            input_ids, attention_mask: `(batch, max_text_length)` captions. Shorter texts of any kind are padded.
            mlm_input_ids, labels: `(batch, max_text_length)` masked captions and their tokens, -100 where not masked.
            identity_ids: `(batch,)`; rows of one identity are no negatives of each other. Every row is its own
                identity when absent.
            augmented_input_ids, augmented_attention_mask: `(batch, max_text_length)` augmented captions.
            phrase_input_ids, phrase_attention_mask: `(batch, max_text_length)` phrases of one region of each image.
            region_attention_mask: `(batch, 1 + patches)`, 1 = the patch overlaps the box; index 0 is set by
                `config.region_features`, whatever is passed.
            phrase_ids: `(batch,)`; equal phrases share an id.
            generator: draws the hard negatives.
            caption_lengths, augmented_lengths, phrase_lengths: tokens of each row's text. The fusion layers then skip
                the padding, which changes nothing but time and memory. The collator knows them without asking the
                device.
            mlm_lengths: how many leading positions of each masked caption hold its tokens and its labels.
            max_masked: the most labels that a row may hold. Masked tokens are predicted at so many positions of each
                row, again for the time alone; at every position when absent.

        Raises:
            ValueError: naming the argument that is missing, or has a shape, type or value that the model cannot read.
        """
        texts = {
            "region_": TextBatch(phrase_input_ids, phrase_attention_mask, phrase_lengths, phrase_ids),
            "": TextBatch(input_ids, attention_mask, caption_lengths, identity_ids),
            "augmented_": TextBatch(augmented_input_ids, augmented_attention_mask, augmented_lengths, identity_ids),
            "mlm_": TextBatch(mlm_input_ids, attention_mask, mlm_lengths),
        }
        check_training_batch(self.config, pixel_values, texts, labels, region_attention_mask, max_masked)
        texts = {kind: text for kind, text in texts.items() if text.input_ids is not None}
        for text in texts.values():
            text.input_ids, text.attention_mask = self.mra.pad_captions(text.input_ids, text.attention_mask)
        if labels is not None:
            labels = F.pad(labels, (0, texts["mlm_"].input_ids.shape[1] - labels.shape[1]), value=-100)
        images = image_tokens = self.mra.get_image_hidden_states(pixel_values)
        hidden_states = self._encode_texts(texts)
        losses, pairs, text_embeds, visible = {}, {}, {}, None
        # BatchNorm sees the region batch first, then the plain, then the augmented one (reference notes, "Model").
        if "region_" in texts:
            image_tokens, visible, region_embeds = self._regions(images, region_attention_mask)
        for kind in (kind for kind in texts if kind != "mlm_"):
            if kind == "":
                image_embeds = self.mra.project_image(images)
            text_embeds[kind] = self.mra.project_text(hidden_states[kind])
            losses[f"{kind}itc_loss"], pairs[kind] = self._contrast(
                region_embeds if kind == "region_" else image_embeds, text_embeds[kind], texts[kind], generator
            )
        losses |= self._fusion_losses(image_tokens, visible, texts, hidden_states, pairs, labels, max_masked)
        return MRAPreTrainingOutput(
            loss=self._weighted_sum(losses), **losses, image_embeds=image_embeds, text_embeds=text_embeds[""]
        )

    def mlm_logits(
        self, mlm_input_ids: torch.Tensor, attention_mask: torch.Tensor, image_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """
        Predicts the tokens of masked captions that see their image.

        Args:
            mlm_input_ids, attention_mask: `(batch, length)`.
            image_hidden_states: as [`MRAModel.fuse`] takes them.

        Returns:
            `(batch, length, vocab_size)`.
        """
        hidden_states = self.mra.get_text_hidden_states(mlm_input_ids, attention_mask)
        return self.mlm_head(self.mra.fuse(hidden_states, attention_mask, image_hidden_states))

    def _encode_texts(self, texts: dict[str, "TextBatch"]) -> dict[str, torch.Tensor]:
        """Hidden states of every kind of text, in one pass."""
        counts = []
        for kind, text in texts.items():
            # Features pool over the padding too, so that it has to be encoded; masked captions have none.
            reads_padding = kind != "mlm_" and self.config.projection_type == "part_pooling"
            counts += text.counts(with_padding=reads_padding)
        input_ids, attention_mask = (
            torch.cat([getattr(text, name) for text in texts.values()]) for name in ("input_ids", "attention_mask")
        )
        hidden_states = self.mra.get_text_hidden_states(input_ids, attention_mask, counts)
        return dict(zip(texts, hidden_states.chunk(len(texts)), strict=True))

    def _regions(self, image_hidden_states, region_attention_mask):
        """
        Tokens of images whose regions stand beside them, who sees which of them, and embeddings of the regions.

        Returns:
            `(batch, tokens, width)`; by kind of text, `(batch, tokens)` 1 = visible; `(batch, projection_dim)`.
        """
        follows_paper = self.config.region_features == "paper"
        patches, patch_mask = image_hidden_states[:, 1:], region_attention_mask[:, 1:]
        region_token = masked_mean(patches, patch_mask)[:, None]
        embeds = self.mra.project_image(
            torch.cat([region_token, patches], dim=1), patch_mask if follows_paper else None
        )
        whole = torch.cat([torch.ones_like(patch_mask[:, :1]), torch.ones_like(patch_mask)], dim=1)
        region = torch.cat([torch.zeros_like(patch_mask[:, :1]), patch_mask], dim=1)
        if not follows_paper:
            return image_hidden_states, {"region_": region, "": whole}, embeds
        # One more token, which the region alone sees: keys and values of all others serve region and image.
        tokens = torch.cat([image_hidden_states, region_token], dim=1)
        return tokens, {"region_": F.pad(region, (0, 1), value=1), "": F.pad(whole, (0, 1), value=0)}, embeds

    def _contrast(self, image_embeds, text_embeds, texts, generator) -> tuple[torch.Tensor, MatchingPairs]:
        """Contrastive loss over all processes, and pairs to match: negatives are of this process or of all."""
        config = self.config
        all_images, all_texts = (gather_features(x, config.itc_gradient) for x in (image_embeds, text_embeds))
        every = torch.arange(len(all_images), device=image_embeds.device)
        identities = every if texts.identity_ids is None else gather_constant(texts.identity_ids)
        itc_loss = contrastive_loss(
            all_images, all_texts, identities, self.temperature, config.label_smoothing, config.itc_chunk_size
        )
        if config.itm_negatives == "local":
            every, identities = every[: len(image_embeds)], own_rows(identities)
            all_images, all_texts = image_embeds, text_embeds
        with torch.no_grad():
            similarity = all_images @ all_texts.t() / self.temperature
        drawn = every, *choose_hard_negatives(similarity.t(), identities, generator)
        drawn = *drawn, *choose_hard_negatives(similarity, identities, generator)
        if config.itm_negatives == "all":
            drawn = map(own_rows, drawn)
        every, negative_images, has_image, negative_texts, has_text = drawn
        # Matched, (text, negative image), (negative text, image)
        labels = torch.cat([torch.ones_like(every), (~has_image).long() * -100, (~has_text).long() * -100])
        texts_of_pairs, images_of_pairs = [every, every, negative_texts], [every, negative_images, every]
        return itc_loss, MatchingPairs(torch.cat(texts_of_pairs), torch.cat(images_of_pairs), labels)

    def _fusion_losses(
        self,
        image_tokens: torch.Tensor,
        visible: dict[str, torch.Tensor] | None,
        texts: dict[str, TextBatch],
        text_hidden_states: dict[str, torch.Tensor],
        pairs: dict[str, MatchingPairs],
        labels: torch.Tensor | None,
        max_masked: int | None,
    ) -> dict[str, torch.Tensor]:
        """
        Matching losses of each kind of text and the masked-language loss, from one pass through the fusion layers.

        Args:
            image_tokens: `(batch, tokens, vision hidden_size)`.
            visible: `(batch, tokens)` 1 = visible, to regions (`region_`) and to all others; all when absent.
            texts, text_hidden_states: of each kind.
            pairs: of each kind but `mlm_`, whose captions meet their own images.
            labels, max_masked: as passed to [`forward`].
        """
        takes_all, size = self.config.itm_negatives == "all", len(image_tokens)
        gather, own = (gather_constant, own_rows) if takes_all else (_unchanged, _unchanged)
        states = torch.cat(list(text_hidden_states.values()))
        attention_mask = gather(torch.cat([text.attention_mask for text in texts.values()]))
        if takes_all:
            image_tokens, states = gather_features(image_tokens), gather_features(states)
        every_image = torch.arange(len(image_tokens), device=image_tokens.device)
        every_text = torch.arange(len(states), device=image_tokens.device).view(-1, len(texts), size)
        is_local = len(image_tokens) == size  # lengths of other processes' texts are not known here

        rows = {}
        for kind, kind_texts in zip(texts, every_text.unbind(dim=1), strict=True):  # processes, batch
            if kind == "mlm_":
                rows[kind] = masked_rows(texts[kind], own(kind_texts.flatten()), own(every_image), labels, max_masked)
            else:
                rows[kind] = matching_rows(texts[kind], kind_texts.flatten(), pairs[kind], is_local)
        image_mask = None
        if visible is not None:
            region, whole = gather(visible["region_"]), gather(visible[""])
            image_mask = torch.cat([(region if k == "region_" else whole)[r.images] for k, r in rows.items()])
        lengths = [length for text in texts.values() for length in text.counts()]
        fused = self.mra.fuse(
            states, attention_mask, image_tokens, image_mask, text_lengths=lengths if is_local else None,
            **join_rows(list(rows.values())),
        )  # fmt: skip
        losses = {}
        parts = fused.split([len(of_kind.texts) for of_kind in rows.values()])
        for (kind, of_kind), states in zip(rows.items(), parts, strict=True):
            if kind == "mlm_":
                logits = self.mlm_head(states[:, : of_kind.positions.shape[1]])
                losses["mlm_loss"] = masked_language_loss(logits.flatten(0, 1), of_kind.labels.flatten())
            else:
                losses[f"{kind}itm_loss"] = matching_loss(self.mra.match_head(states[:, 0]), of_kind.labels)
        return losses

    def _weighted_sum(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        config = self.config
        weights = {
            "itc_loss": 1.0,
            "itm_loss": config.itm_weight,
            "mlm_loss": config.mlm_weight,
            "augmented_itc_loss": config.augmentation_weight,
            "augmented_itm_loss": config.augmentation_weight,
            "region_itc_loss": config.region_weight,
            "region_itm_loss": config.region_weight,
        }
        return sum(weights[name] * loss for name, loss in losses.items())


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


MRAModel.register_for_auto_class("AutoModel")
MRAForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MRAForImageTextRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")

__all__ = ["MRAForImageTextRetrieval", "MRAForPreTraining", "MRAModel", "MRAPreTrainedModel"]
