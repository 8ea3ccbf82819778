"""MRA for text-based person retrieval: Swin vision encoder, BERT text and fusion layers (arXiv 2507.10195)."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.bert.modeling_bert import BertEmbeddings
from transformers.utils import logging
from transformers.utils.generic import ModelOutput
from transformers.utils.import_utils import is_tracing


try:
    from . import losses_mra as losses
    from .batching_mra import (
        TEXTS_PER_IMAGE,
        FusionRows,
        ImageTokens,
        MatchingPairs,
        Packing,
        TextBatch,
        TextLengths,
        fuse_in_chunks,
        gather_constant,
        gather_features,
        has_values,
        own_rows,
        place_rows,
        plan_routes,
        read_masked_text,
        read_text,
        run_in_chunks,
    )
    from .checks_mra import check_pairing, check_tokens, check_training_batch, forward_method, raise_first
    from .configuration_mra import MRAConfig
    from .layers_mra import (
        NUM_PARTS,
        MRAFusionLayer,
        MRALanguageHead,
        MRAPartProjection,
        MRATextModel,
        MRAVisionModel,
        keys_and_values,
        masked_mean,
        pool_parts,
        visibility_mask,
    )
    from .losses_mra import weighted_sum  # also tells the Hub's loader that this file is needed
except ImportError:  # run from the repository root
    if __package__:
        raise
    import losses_mra as losses
    from batching_mra import (
        TEXTS_PER_IMAGE,
        FusionRows,
        ImageTokens,
        MatchingPairs,
        Packing,
        TextBatch,
        TextLengths,
        fuse_in_chunks,
        gather_constant,
        gather_features,
        has_values,
        own_rows,
        place_rows,
        plan_routes,
        read_masked_text,
        read_text,
        run_in_chunks,
    )
    from checks_mra import check_pairing, check_tokens, check_training_batch, forward_method, raise_first
    from configuration_mra import MRAConfig
    from layers_mra import (
        NUM_PARTS,
        MRAFusionLayer,
        MRALanguageHead,
        MRAPartProjection,
        MRATextModel,
        MRAVisionModel,
        keys_and_values,
        masked_mean,
        pool_parts,
        visibility_mask,
    )
    from losses_mra import weighted_sum


logger = logging.get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
ImageKeysValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class MRAOutput(ModelOutput):
    """Output of [`MRAModel`].

    Args:
        image_embeds: `(images, projection_dim)`, L2-normalised.
        text_embeds: `(texts, projection_dim)`, L2-normalised.
        image_hidden_states: `(images, 1 + patches, vision hidden_size)`, token 0 being the mean of the patches.
        text_hidden_states: `(texts, length, text hidden_size)` of the text-only layers.
    """

    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_hidden_states: torch.Tensor | None = None
    text_hidden_states: torch.Tensor | None = None


@dataclass(init=False)
class MRAPreTrainingOutput(ModelOutput):
    """Output of [`MRAForPreTraining`]; a term whose inputs were not passed is `None`.

    Terms that are added to `forward` are held under their names too.

    Args:
        loss: sum of the terms below, with the weights of the configuration.
        itc_loss: contrastive loss of image and caption.
        itm_loss: matching loss of image and caption.
        mlm_loss: masked-language loss of image and caption.
        augmented_itc_loss: contrastive loss of image and augmented caption.
        augmented_itm_loss: matching loss of image and augmented caption.
        region_itc_loss: contrastive loss of region and phrase.
        region_itm_loss: matching loss of region and phrase.
        image_embeds: `(batch, projection_dim)`, L2-normalised.
        text_embeds: `(batch, projection_dim)` of the captions, L2-normalised.
    """

    loss: torch.Tensor | None = None
    itc_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    augmented_itc_loss: torch.Tensor | None = None
    augmented_itm_loss: torch.Tensor | None = None
    region_itc_loss: torch.Tensor | None = None
    region_itm_loss: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None

    def __init__(self, *values: torch.Tensor | None, **named: torch.Tensor | None) -> None:
        # The generated `__init__` would refuse a term without a field, also when a library rebuilds the output.
        names = [field.name for field in fields(self)]
        declared = dict.fromkeys(names) | dict(zip(names, values, strict=False))
        for name, value in declared.items():
            setattr(self, name, named.pop(name, value))
        self.__post_init__()
        for name, value in named.items():
            self[name] = value

    @classmethod
    def sum_up(
        cls, terms: Mapping[str, tuple[float, torch.Tensor | None]], **embeds: torch.Tensor
    ) -> "MRAPreTrainingOutput":
        """Return the output of weighted terms and embeddings; terms that are `None` do not count."""
        computed = {name: term for name, (_, term) in terms.items() if term is not None}
        return cls(weighted_sum(terms), **computed, **embeds)


@dataclass
class MRAImageTextRetrievalOutput(ModelOutput):
    """Output of [`MRAForImageTextRetrieval`].

    Args:
        similarity: `(texts, images)` cosine similarities.
        match_logits: `(texts, images, 2)`, class 1 is "match"; `None` unless requested.
        image_embeds: `(images, projection_dim)`, L2-normalised.
        text_embeds: `(texts, projection_dim)`, L2-normalised.
        logits_per_image: `(images, texts)` similarities divided by the temperature, named as in CLIP.
    """

    similarity: torch.Tensor | None = None
    match_logits: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None


# ---------------------------------------------------------------- models


class MRAPreTrainedModel(PreTrainedModel):
    """Base of the MRA models: initialisation and attention implementation."""

    config: MRAConfig
    config_class = MRAConfig
    base_model_prefix = "mra"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]  # transformers' own models set tuples
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["MRASwinBlock", "MRATextLayer", "MRAFusionLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
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

    def set_attn_implementation(self, attn_implementation: str, **kwargs: Any) -> None:
        """Set the attention implementation, `sdpa` or `eager`, of the BERT layers and the Swin windows."""
        implementation = self.get_correct_attn_implementation(attn_implementation)
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = implementation
        _sync_attention(self)


def _sync_attention(model: PreTrainedModel) -> None:
    """Set timm's switch for fused attention to what the configuration says."""
    for module in model.modules():
        if isinstance(module, MRAVisionModel):
            module.set_fused_attention(model.config.vision_config._attn_implementation == "sdpa")


class MRAModel(MRAPreTrainedModel):
    """MRA without a training objective: vision encoder, text and fusion layers, projections and matching head."""

    _keys_to_ignore_on_load_unexpected = [r"^temperature$", r"^mlm_head\."]  # noqa: RUF012

    def __init__(self, config: MRAConfig) -> None:
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

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.head_initialization != "published":
            return
        projections = (self.vision_projection, self.text_projection)
        if not isinstance(module, nn.Linear):
            return
        if any(module is getattr(projection, "linear", None) for projection in projections):
            init.normal_(module.weight, std=1e-5)
        elif module in (*projections, *self.match_head):
            bound = module.in_features**-0.5  # as `nn.Linear.reset_parameters`, which would overwrite loaded weights
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings of the text encoder."""
        return self.text_model.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings of the text encoder."""
        self.text_model.embeddings.word_embeddings = cast(nn.Embedding, value)

    def get_image_hidden_states(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode `(batch, 3, height, width)` to `(batch, 1 + patches, vision hidden_size)`; token 0 is the mean."""
        return self.vision_model(pixel_values)

    def get_text_hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Encode tokens with the text-only layers.

        Args:
            input_ids: `(batch, length)`.
            attention_mask: `(batch, length)`, 1 = token; every position is a token when absent.
            lengths: leading positions of each row to encode; all when absent. The rest of the row is 0 in the result. With
                lengths nothing is asked of the device, so the values of tokens and mask are not checked.

        Returns:
            `(batch, length, text hidden_size)`.

        Raises:
            ValueError: if tokens or mask have a wrong shape, type or value.
        """
        problems = check_tokens(self.config.text_config, input_ids, attention_mask)
        if lengths is None:
            raise_first(problems)
            self._warn_without_mask(input_ids, attention_mask)
        packing = Packing(input_ids.shape, input_ids.device, lengths)
        mask = visibility_mask(attention_mask, self.dtype, self.config.text_config._attn_implementation)
        return packing.unpack(self.text_model(input_ids, mask, packing))

    def get_image_keys_values(self, image_hidden_states: torch.Tensor) -> ImageKeysValues:
        """Project images once for all texts that are paired with them in [`fuse`].

        Args:
            image_hidden_states: `(images, length, vision hidden_size)`.

        Returns:
            Keys and values of each fusion layer, `(images, heads, length, width of a head)` each.
        """
        image_hidden_states = image_hidden_states.to(self.dtype)
        layers = cast(Sequence[MRAFusionLayer], self.fusion_layers)
        return [keys_and_values(layer.crossattention, image_hidden_states) for layer in layers]

    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, image_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embed images, from pixels or from their hidden states.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            image_hidden_states: `(batch, 1 + patches, vision hidden_size)`.

        Returns:
            `(batch, projection_dim)`, L2-normalised.

        Raises:
            ValueError: unless exactly one of the two is given.
        """
        if pixel_values is not None and image_hidden_states is None:
            image_hidden_states = self.get_image_hidden_states(pixel_values)
        elif pixel_values is not None or image_hidden_states is None:
            raise ValueError("`pixel_values` or `image_hidden_states` must be given, and not both")
        return self.project_image(image_hidden_states)

    def get_text_features(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        text_hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed captions, from tokens or from their hidden states.

        Args:
            input_ids: `(batch, length)`; shorter captions are padded to `max_text_length`, because `part_pooling` pools
                over the padding.
            attention_mask: `(batch, length)`, 1 = token; every position is a token when absent.
            text_hidden_states: `(batch, max_text_length, text hidden_size)`.

        Returns:
            `(batch, projection_dim)`, L2-normalised.

        Raises:
            ValueError: unless exactly one of `input_ids` and `text_hidden_states` is given, and as in
                [`get_text_hidden_states`].
        """
        if input_ids is not None and text_hidden_states is None:
            text_hidden_states = self.get_text_hidden_states(*self.pad_captions(input_ids, attention_mask))
        elif input_ids is not None or text_hidden_states is None:
            raise ValueError("`input_ids` or `text_hidden_states` must be given, and not both")
        return self.project_text(text_hidden_states)

    def pad_captions(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad `(batch, length)` tokens and their mask to `max_text_length`, which `part_pooling` pools over.

        Longer captions stay as they are, with a warning where they are pooled. Without a mask every position is a token.
        """
        check_tokens(self.config.text_config, input_ids, attention_mask)
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
                "`attention_mask` is missing although `input_ids` hold padding, which is then read as text: pass the "
                "mask that the model's MRAProcessor returns"
            )

    def _warn_of_length(self, length: int) -> None:
        limit = self.config.max_text_length
        is_pooled = self.config.projection_type == "part_pooling"
        if length > limit and is_pooled and not is_tracing():
            logger.warning_once(
                f"`input_ids` holds texts of {length} tokens, but in training the model pooled over {limit} "
                "(`max_text_length`), so their embeddings differ: cut and pad texts with the model's MRAProcessor"
            )

    def project_image(self, image_hidden_states: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Project image tokens to the shared space.

        Args:
            image_hidden_states: `(batch, 1 + patches, vision hidden_size)`.
            patch_mask: `(batch, patches)`, 1 = pooled; all patches when absent. `linear` reads only token 0.

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
        rows: FusionRows | None = None,
    ) -> torch.Tensor:
        """Let texts attend to images in the fusion layers.

        What depends only on the text or only on the image is computed once for each.

        Args:
            text_hidden_states: `(texts, length, text hidden_size)` of the text-only layers.
            attention_mask: `(texts, length)`, 1 = token.
            image_hidden_states: `(images, image tokens, vision hidden_size)`.
            image_attention_mask: `(pairs, image tokens)`, 1 = visible; all when absent.
            image_keys_values: from [`get_image_keys_values`], instead of the hidden states.
            rows: which text meets which image, and which positions are read; when absent, text i meets image i and every
                position is read.

        Returns:
            `(pairs, length or n, text hidden_size)`; length is the longest of the given lengths, n the positions of the
            rows.

        Raises:
            ValueError: if no images are given, or texts, masks, images and pairs do not fit together.
        """
        rows = rows or FusionRows()
        if image_keys_values is None:
            if image_hidden_states is None:
                raise ValueError("`image_hidden_states` or `image_keys_values` must be given, got neither")
            image_keys_values = self.get_image_keys_values(image_hidden_states)
        images, _ = image_keys_values[0]
        check_pairing(text_hidden_states, attention_mask, images, image_attention_mask, rows)
        longest = rows.longest(text_hidden_states.shape[1])
        hidden_states = text_hidden_states.to(self.dtype)[:, :longest]
        attention_mask = None if attention_mask is None else attention_mask[:, :longest]
        implementation = self.config.text_config._attn_implementation
        self_mask = visibility_mask(attention_mask, hidden_states.dtype, implementation)
        cross_mask = visibility_mask(image_attention_mask, hidden_states.dtype, implementation)
        if len(self.fusion_layers) == 1 and rows.text_index is not None:
            # A single layer cannot both pair texts and pick positions of the pairs, so the texts are paired before it.
            hidden_states, self_mask = hidden_states[rows.text_index], _take(self_mask, rows.text_index)
            rows = replace(rows, text_index=None, text_lengths=rows.pair_lengths)
        routes, result = plan_routes(rows, hidden_states.shape[:2], hidden_states.device, len(self.fusion_layers))
        hidden_states = routes[0].packing.pack(hidden_states)
        for layer, (keys, values), route in zip(self.fusion_layers, image_keys_values, routes, strict=True):
            hidden_states = layer(hidden_states, keys, values, self_mask, cross_mask, route)
            if route.pairing is not None:  # from here on each pair has a row of its own
                self_mask = _take(self_mask, route.pairing[0])
        return result.unpack(hidden_states)

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
        """Score pairs of text and image.

        Args:
            text_hidden_states: `(texts, length, text hidden_size)` of the text-only layers.
            attention_mask: `(texts, length)`, 1 = token.
            image_hidden_states: `(images, image tokens, vision hidden_size)`.
            image_attention_mask: `(pairs, image tokens)`, 1 = visible; all when absent.
            image_keys_values: from [`get_image_keys_values`], instead of the hidden states.
            text_index: `(pairs,)`, text of each pair; text i belongs to pair i when absent.
            image_index: `(pairs,)`, image of each pair; image i belongs to pair i when absent.

        Returns:
            `(pairs, 2)` logits, class 1 is "match".

        Raises:
            ValueError: as in [`fuse`].
        """
        pairs = text_hidden_states if text_index is None else text_index
        first = torch.zeros(len(pairs), 1, dtype=torch.long, device=text_hidden_states.device)
        rows = FusionRows(text_index, image_index, first)
        fused = self.fuse(
            text_hidden_states, attention_mask, image_hidden_states, image_attention_mask, image_keys_values, rows
        )
        return self.match_head(fused[:, 0])

    @forward_method
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> MRAOutput:
        """Encode images, texts or both.

        Args:
            pixel_values: `(images, 3, height, width)`.
            input_ids: `(texts, length)`, padded to `max_text_length` if shorter.
            attention_mask: `(texts, length)`, 1 = token; every position is a token when absent.

        Raises:
            ValueError: if neither images nor texts are given, or an argument has a wrong shape, type or value.
        """
        if pixel_values is None and input_ids is None:
            raise ValueError("`pixel_values`, `input_ids` or both must be given, got neither")
        output = MRAOutput()
        if pixel_values is not None:
            hidden_states = self.get_image_hidden_states(pixel_values)
            output.image_hidden_states, output.image_embeds = hidden_states, self.project_image(hidden_states)
        if input_ids is not None:
            hidden_states = self.get_text_hidden_states(*self.pad_captions(input_ids, attention_mask))
            output.text_hidden_states, output.text_embeds = hidden_states, self.project_text(hidden_states)
        return output


def _of_inner_model(method: Callable[Concatenate[MRAModel, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Offer a method of [`MRAModel`] on a model whose `.mra` is one."""

    @functools.wraps(method)
    def call(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return getattr(self.mra, method.__name__)(*args, **kwargs)

    return call


class MRAEncodersMixin:
    """Encoders and fusion of the inner [`MRAModel`], for the models that wrap one."""

    get_image_hidden_states = _of_inner_model(MRAModel.get_image_hidden_states)
    get_text_hidden_states = _of_inner_model(MRAModel.get_text_hidden_states)
    get_image_features = _of_inner_model(MRAModel.get_image_features)
    get_text_features = _of_inner_model(MRAModel.get_text_features)
    get_image_keys_values = _of_inner_model(MRAModel.get_image_keys_values)
    fuse = _of_inner_model(MRAModel.fuse)
    match_logits = _of_inner_model(MRAModel.match_logits)


class MRAForImageTextRetrieval(MRAEncodersMixin, MRAPreTrainedModel):
    """MRA for retrieval: scores every text against every image, with the matching head on request."""

    _keys_to_ignore_on_load_unexpected = [r"^mlm_head\."]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"^temperature$"]  # noqa: RUF012  an MRAModel has none, the configuration does

    def __init__(self, config: MRAConfig) -> None:
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
        """Score every text against every image.

        Args:
            pixel_values: `(images, 3, height, width)`.
            input_ids: `(texts, length)`, padded to `max_text_length` if shorter.
            attention_mask: `(texts, length)`, 1 = token; every position is a token when absent.
            return_match_logits: whether to run every pair through the fusion layers as well.

        Raises:
            ValueError: if an argument has a wrong shape, type or value.
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
    """MRA with its training objective on image and caption, augmented caption, region and phrase.

    Attributes:
        chunk_size: images that pass the Swin at a time in training; texts and pairs pass BERT and the fusion layers eight
            times as many at a time (see [`run_in_chunks`]). All at once when `None`. It is not saved with the model.
    """

    _tied_weights_keys = {  # noqa: RUF012
        "mlm_head.decoder.weight": "mra.text_model.embeddings.word_embeddings.weight",
    }

    def __init__(self, config: MRAConfig) -> None:
        super().__init__(config)
        self.mra = MRAModel(config)
        self.temperature = nn.Parameter(torch.tensor([float(config.temperature)]))  # DeepSpeed cannot share scalars
        self.mlm_head = MRALanguageHead(config.text_config)
        self.chunk_size: int | None = None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the decoder of the masked-language head."""
        return self.mlm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder of the masked-language head."""
        self.mlm_head.decoder = cast(nn.Linear, value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the word embeddings, the decoder tied to them, and its bias; see [`PreTrainedModel`]."""
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
        lengths: TextLengths | None = None,
    ) -> MRAPreTrainingOutput:
        """Compute the losses whose inputs are passed.

        Args:
            pixel_values: `(batch, 3, height, width)`.
            input_ids: `(batch, max_text_length)` captions. Shorter texts of any kind are padded.
            attention_mask: `(batch, max_text_length)` of the captions, 1 = token.
            mlm_input_ids: `(batch, max_text_length)` masked captions; their mask is that of the captions.
            labels: `(batch, max_text_length)` tokens of the masked captions, -100 where nothing is masked.
            identity_ids: `(batch,)`; rows of one identity are not negatives of each other. Each row is an identity of its
                own when absent.
            augmented_input_ids: `(batch, max_text_length)` augmented captions.
            augmented_attention_mask: `(batch, max_text_length)`, 1 = token.
            phrase_input_ids: `(batch, max_text_length)` phrases, each of one region of its image.
            phrase_attention_mask: `(batch, max_text_length)`, 1 = token.
            region_attention_mask: `(batch, 1 + patches)`, 1 = the patch overlaps the box; `config.region_features` decides
                on index 0, whatever is passed.
            phrase_ids: `(batch,)`; equal phrases share an id.
            generator: draws the hard negatives.
            lengths: lengths of the texts, from the collator; padding is then skipped.

        Raises:
            ValueError: if an argument is missing or has a wrong shape, type or value.
        """
        config, lengths = self.config, lengths or TextLengths()
        caption = TextBatch("caption", input_ids, attention_mask, lengths.caption, identity_ids)
        augmented = read_text("augmented", augmented_input_ids, augmented_attention_mask, lengths, identity_ids)
        phrase = read_text("phrase", phrase_input_ids, phrase_attention_mask, lengths, phrase_ids)
        masked = read_masked_text(mlm_input_ids, labels, attention_mask, lengths)
        texts = [text for text in (phrase, caption, augmented, masked) if text is not None]
        check_training_batch(config, pixel_values, texts, region_attention_mask)

        # Encode
        images = run_in_chunks(self.mra.get_image_hidden_states, self.chunk_size, pixel_values)
        self._encode_texts(texts)
        image_tokens, region_embeds = self._encode_regions(images, region_attention_mask)

        # Contrast: BatchNorm sees regions first, then captions, then augmented captions (reference notes, "Model")
        region_itc_loss = self._contrast(region_embeds, phrase, generator)
        image_embeds = self.mra.project_image(images)
        itc_loss, augmented_itc_loss = (self._contrast(image_embeds, x, generator) for x in (caption, augmented))

        # Match captions, augmented captions and phrases, and predict masked tokens
        self._fuse_texts(texts, image_tokens)
        region_itm_loss, itm_loss, augmented_itm_loss = map(self._match, (phrase, caption, augmented))
        mlm_loss = self._predict_masked(masked)

        terms = {
            "region_itc_loss": (config.region_weight, region_itc_loss),
            "itc_loss": (1.0, itc_loss),
            "augmented_itc_loss": (config.augmentation_weight, augmented_itc_loss),
            "region_itm_loss": (config.region_weight, region_itm_loss),
            "itm_loss": (config.itm_weight, itm_loss),
            "augmented_itm_loss": (config.augmentation_weight, augmented_itm_loss),
            "mlm_loss": (config.mlm_weight, mlm_loss),
        }
        return MRAPreTrainingOutput.sum_up(terms, image_embeds=image_embeds, text_embeds=caption.embeds)

    def _encode_texts(self, texts: list[TextBatch]) -> None:
        """Pad every kind of text to `max_text_length`, and set its hidden states from one pass."""
        counts = []
        for text in texts:
            text.input_ids, text.attention_mask = self.mra.pad_captions(text.input_ids, text.attention_mask)
            if text.labels is not None:
                text.labels = F.pad(text.labels, (0, text.input_ids.shape[1] - text.labels.shape[1]), value=-100)
            # Features pool over the padding too, so it has to be encoded; masked captions have no features.
            reads_padding = text.kind != "masked" and self.config.projection_type == "part_pooling"
            counts += text.counts(with_padding=reads_padding)
        input_ids = torch.cat([text.input_ids for text in texts])
        attention_mask = torch.cat([text.attention_mask for text in texts])
        inputs = input_ids, attention_mask, counts
        encode = self.mra.get_text_hidden_states
        hidden_states = run_in_chunks(encode, self.chunk_size, *inputs, per_image=TEXTS_PER_IMAGE)
        for text, states in zip(texts, hidden_states.chunk(len(texts)), strict=True):
            text.hidden_states = states

    def _encode_regions(
        self, image_hidden_states: torch.Tensor, region_attention_mask: torch.Tensor | None
    ) -> tuple[ImageTokens, torch.Tensor | None]:
        """Add the tokens of regions to those of their images, and embed the regions.

        Args:
            image_hidden_states: `(batch, 1 + patches, vision hidden_size)`.
            region_attention_mask: `(batch, 1 + patches)`; there are no regions when absent.

        Returns:
            The tokens, and `(batch, projection_dim)` of the regions or `None`.
        """
        if region_attention_mask is None:
            return ImageTokens(image_hidden_states), None
        follows_paper = self.config.region_features == "paper"
        patches, patch_mask = image_hidden_states[:, 1:], region_attention_mask[:, 1:]
        region_token = masked_mean(patches, patch_mask)[:, None]
        embeds = self.mra.project_image(
            torch.cat([region_token, patches], dim=1), patch_mask if follows_paper else None
        )
        whole = torch.cat([torch.ones_like(patch_mask[:, :1]), torch.ones_like(patch_mask)], dim=1)
        region = torch.cat([torch.zeros_like(patch_mask[:, :1]), patch_mask], dim=1)
        if not follows_paper:
            return ImageTokens(image_hidden_states, region, whole), embeds
        # One more token, visible to phrases only: keys and values of all other tokens serve region and image.
        tokens = torch.cat([image_hidden_states, region_token], dim=1)
        return ImageTokens(tokens, F.pad(region, (0, 1), value=1), F.pad(whole, (0, 1), value=0)), embeds

    def _contrast(
        self, image_embeds: torch.Tensor | None, text: TextBatch | None, generator: torch.Generator | None
    ) -> torch.Tensor | None:
        """Embed a kind of text, contrast it with images over all processes, and draw the pairs to match.

        Args:
            image_embeds: `(batch, projection_dim)` of images or regions, L2-normalised.
            text: with its hidden states; its `embeds` and `pairs` are set.
            generator: draws the hard negatives.

        Returns:
            The contrastive loss, or `None` if this kind of text was not passed.
        """
        if text is None or image_embeds is None:
            return None
        config = self.config
        text.embeds = self.mra.project_text(text.hidden_states)
        all_images, all_texts = (gather_features(x, config.itc_gradient) for x in (image_embeds, text.embeds))
        if text.identity_ids is None:
            identities = torch.arange(len(all_images), device=image_embeds.device)
        else:
            identities = gather_constant(text.identity_ids)
        loss = losses.contrastive_loss(
            all_images, all_texts, identities, self.temperature, config.label_smoothing, config.itc_chunk_size
        )
        if config.itm_negatives == "all":
            text.pairs = self._draw_pairs(all_images, all_texts, identities, generator, own_rows)
        else:
            text.pairs = self._draw_pairs(image_embeds, text.embeds, own_rows(identities), generator)
        return loss

    @torch.no_grad()
    def _draw_pairs(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        identity_ids: torch.Tensor,
        generator: torch.Generator | None,
        take_own: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> MatchingPairs:
        """Draw a hard negative image for each text, then a text for each image; `take_own` picks own rows."""
        similarity = image_embeds @ text_embeds.t() / self.temperature
        negative_images, has_image = losses.choose_hard_negatives(similarity.t(), identity_ids, generator)
        negative_texts, has_text = losses.choose_hard_negatives(similarity, identity_ids, generator)
        rows = torch.arange(len(identity_ids), device=image_embeds.device)
        drawn = (rows, negative_images, has_image, negative_texts, has_text)
        return MatchingPairs.join(*(drawn if take_own is None else map(take_own, drawn)))

    def _fuse_texts(self, texts: list[TextBatch], images: ImageTokens) -> None:
        """Set `rows` and `fused` of every kind of text from one pass through the fusion layers.

        Args:
            texts: with `hidden_states` and, except masked captions, which meet their own images, `pairs`.
            images: tokens of this process.
        """
        states = torch.cat([text.hidden_states for text in texts])
        attention_mask = torch.cat([text.attention_mask for text in texts])
        if self.config.itm_negatives == "all":
            images, states = images.gathered(), gather_features(states)
            attention_mask = gather_constant(attention_mask)
        rows = place_rows(texts, len(images.tokens))
        mask = images.mask_of(texts)
        if self.chunk_size is None:
            fused = self.mra.fuse(states, attention_mask, images.tokens, mask, rows=rows)
        else:
            keys_values = self.mra.get_image_keys_values(images.tokens)
            fused = fuse_in_chunks(self.mra.fuse, self.chunk_size, states, attention_mask, keys_values, mask, rows)
        parts = fused.split([len(text.rows.text_index) for text in texts])
        for text, part in zip(texts, parts, strict=True):
            text.fused = part[:, : text.rows.positions.shape[1]]

    def _match(self, text: TextBatch | None) -> torch.Tensor | None:
        """Return the matching loss of a kind of text, or `None` if it was not passed."""
        if text is None:
            return None
        return losses.matching_loss(self.mra.match_head(text.fused[:, 0]), text.pairs.labels)

    def _predict_masked(self, text: TextBatch | None) -> torch.Tensor | None:
        """Return the masked-language loss, or `None` if no masked captions were passed."""
        if text is None or text.labels is None:
            return None
        labels = text.labels.gather(1, text.rows.positions)
        return losses.masked_language_loss(self.mlm_head(text.fused).flatten(0, 1), labels.flatten())


def _take(tensor: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """Return rows of a tensor that may be absent."""
    return None if tensor is None else tensor.index_select(0, index)


MRAModel.register_for_auto_class("AutoModel")
MRAForPreTraining.register_for_auto_class("AutoModelForPreTraining")
MRAForImageTextRetrieval.register_for_auto_class("AutoModelForZeroShotImageClassification")

__all__ = ["MRAForImageTextRetrieval", "MRAForPreTraining", "MRAModel", "MRAPreTrainedModel"]
