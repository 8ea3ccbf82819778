"""Configuration of the MRA text-based person retrieval model: architecture and the choices of the objective."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, PreTrainedConfig


__version__ = "0.1.0"

REGION_FEATURES = ("paper", "published_code")
ITC_GRADIENTS = ("exact", "published")
ITM_NEGATIVES = ("local", "all")
PROJECTION_TYPES = ("part_pooling", "linear")
HEAD_INITIALIZATIONS = ("bert", "published")


def _check_finite(config: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")


@strict
class MRAVisionConfig(PreTrainedConfig):
    r"""Architecture of the Swin vision encoder.

    Args:
        image_size (`list[int]`, *optional*, defaults to `[384, 256]`):
            Height and width of the input in pixels.
        patch_size (`int`, *optional*, defaults to 4):
            Side of the square patches that are embedded, in pixels.
        embed_dim (`int`, *optional*, defaults to 128):
            Width of the first stage; each further stage doubles it.
        depths (`list[int]`, *optional*, defaults to `[2, 2, 18, 2]`):
            Blocks of each stage.
        num_heads (`list[int]`, *optional*, defaults to `[4, 8, 16, 32]`):
            Attention heads of each stage.
        window_size (`list[int]`, *optional*, defaults to `[8, 8, 8, 4]`):
            Side of the attention window of each stage, cut to the shorter side of the stage; 7 everywhere at 224 x 224.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the feed-forward layers relative to the stage.
        drop_rate (`float`, *optional*, defaults to 0.0):
            Dropout after the patch embedding, the attention projection and the feed-forward layers.
        drop_path_rate (`float`, *optional*, defaults to 0.1):
            Stochastic depth of the last block; it rises linearly from 0.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every LayerNorm.

    Raises:
        ValueError: if the lists disagree in length, the image is not divisible by the total stride, or a number is not
            finite.
    """

    model_type = "mra_retrieval_vision"
    base_config_key = "vision_config"

    image_size: list[int] | tuple[int, ...] = (384, 256)
    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 128
    depths: list[int] | tuple[int, ...] = (2, 2, 18, 2)
    num_heads: list[int] | tuple[int, ...] = (4, 8, 16, 32)
    window_size: list[int] | tuple[int, ...] = (8, 8, 8, 4)
    mlp_ratio: float | int = 4.0
    drop_rate: float | int = 0.0
    drop_path_rate: float | int = 0.1
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("image_size", "depths", "num_heads", "window_size"):
            setattr(self, name, list(getattr(self, name)))
        super().__post_init__(**kwargs)
        _check_finite(self)
        stages = len(self.depths)
        for name in ("num_heads", "window_size"):
            if len(getattr(self, name)) != stages:
                raise ValueError(
                    f"`{name}` must hold one value for each of the {stages} stages of `depths`, got {getattr(self, name)}"
                )
        if len(self.image_size) != 2 or any(side <= 0 or side % self.stride for side in self.image_size):
            raise ValueError(
                f"`image_size` must be [height, width], both divisible by the total stride {self.stride}, "
                f"got {self.image_size}"
            )

    @property
    def stride(self) -> int:
        """Return the distance of two image tokens in pixels."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Return the rows and columns of the image tokens."""
        return self.image_size[0] // self.stride, self.image_size[1] // self.stride

    @property
    def effective_window_size(self) -> list[int]:
        """Return the side of each stage's window, at most the shorter side of the stage."""
        shorter = min(self.image_size) // self.patch_size
        return [min(window, shorter // 2**stage) for stage, window in enumerate(self.window_size)]

    @property
    def num_patches(self) -> int:
        """Return the number of image tokens without the global token."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def hidden_size(self) -> int:
        """Return the width of the image tokens."""
        return self.embed_dim * 2 ** (len(self.depths) - 1)


@strict
class MRATextConfig(BertConfig):
    r"""Architecture of the BERT layers: the first read only text, the last `num_fusion_layers` add cross-attention.

    Args:
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of text-only and fusion layers together.
        num_fusion_layers (`int`, *optional*, defaults to 6):
            Number of layers, counted from the last, that attend to the image.

    The other fields are those of [`~transformers.BertConfig`].

    Raises:
        ValueError: if no text-only or no fusion layer is left, or a number is not finite.
    """

    model_type = "mra_retrieval_text"
    base_config_key = "text_config"

    num_fusion_layers: int = 6

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_finite(self)
        if not 0 < self.num_fusion_layers < self.num_hidden_layers:
            raise ValueError(
                f"`num_fusion_layers` must lie between 1 and `num_hidden_layers` - 1 = {self.num_hidden_layers - 1}, "
                f"got {self.num_fusion_layers}"
            )

    @property
    def num_text_layers(self) -> int:
        """Return the number of text-only layers."""
        return self.num_hidden_layers - self.num_fusion_layers


@strict
class MRAConfig(PreTrainedConfig):
    r"""Configuration of [`MRAModel`], [`MRAForPreTraining`] and [`MRAForImageTextRetrieval`].

    Args:
        vision_config (`dict` or `MRAVisionConfig`, *optional*):
            The Swin encoder.
        text_config (`dict` or `MRATextConfig`, *optional*):
            The BERT layers.
        projection_type (`str`, *optional*, defaults to `"part_pooling"`):
            `part_pooling` concatenates three parts pooled from the tokens (text: after [CLS]), then BatchNorm, dropout
            and a linear layer; `linear` projects only the first token (the published RSTPReid model).
        projection_dim (`int`, *optional*, defaults to 2048):
            Width of the shared space; 256 with `linear` in the published models.
        projection_dropout (`float`, *optional*, defaults to 0.5):
            Dropout between BatchNorm and the linear layer of `part_pooling`.
        max_text_length (`int`, *optional*, defaults to 56):
            Captions are padded to this many tokens, because `part_pooling` pools over the padding as well.
        temperature (`float`, *optional*, defaults to 0.07):
            Initial value of the learned divisor of the similarities.
        label_smoothing (`float`, *optional*, defaults to 0.0):
            Smoothing of the contrastive targets, used when between 0 and 1.
        itm_weight, mlm_weight (`float`, *optional*, defaults to 1.0):
            Weights of the matching and the masked-language loss.
        augmentation_weight (`float`, *optional*, defaults to 0.8):
            Weight of the contrastive and matching losses on the augmented caption.
        region_weight (`float`, *optional*, defaults to 0.8):
            Weight of the contrastive and matching losses on regions and phrases: 0.8 in the paper, 0.64 in the code.
        region_features (`str`, *optional*, defaults to `"paper"`):
            `paper` pools only the patches inside the box and shows their mean to the cross-attention;
            `published_code` pools all patches and hides the mean.
        itc_gradient (`str`, *optional*, defaults to `"exact"`):
            `exact` is the gradient of the loss over all processes; `published` keeps each process's own slice, which
            after averaging is 1 / world size of it.
        itc_chunk_size (`int`, *optional*):
            Rows of the similarity matrix that the contrastive loss computes at a time, for large batches; all at once
            when left out. The loss is the same.
        itm_negatives (`str`, *optional*, defaults to `"local"`):
            Where negatives of the matching loss are drawn: from the pairs of the `local` process, as published, or from
            those of `all` processes, whose generators must then be in the same state.
        head_initialization (`str`, *optional*, defaults to `"bert"`):
            Initial weights of projections and matching head. `bert` draws them as in the BERT layers, from a normal of
            `initializer_range` with biases of 0. `published` follows the published code: the linear layer of
            `part_pooling` from a normal of 1e-5 with biases of 0, which clipped gradients keep from learning; matching
            head and `linear` projections from the defaults of [`torch.nn.Linear`].

    Raises:
        ValueError: if a choice is unknown, a number is not finite, a weight is negative or a chunk holds no row.
    """

    model_type = "mra_retrieval"
    sub_configs_defaults = {  # noqa: RUF012  # pyright: ignore[reportAssignmentType]  # a type is a valid specification
        "vision_config": MRAVisionConfig,
        "text_config": MRATextConfig,
    }

    if TYPE_CHECKING:  # their types after `__post_init__`
        vision_config: MRAVisionConfig = MRAVisionConfig()
        text_config: MRATextConfig = MRATextConfig()
    else:
        vision_config: dict | PreTrainedConfig | None = None
        text_config: dict | PreTrainedConfig | None = None
    projection_type: str = "part_pooling"
    projection_dim: int = 2048
    projection_dropout: float | int = 0.5
    max_text_length: int = 56
    temperature: float | int = 0.07
    label_smoothing: float | int = 0.0
    itm_weight: float | int = 1.0
    mlm_weight: float | int = 1.0
    augmentation_weight: float | int = 0.8
    region_weight: float | int = 0.8
    region_features: str = "paper"
    itc_gradient: str = "exact"
    itc_chunk_size: int | None = None
    itm_negatives: str = "local"
    head_initialization: str = "bert"
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        _check_finite(self)
        _check_choice("projection_type", self.projection_type, PROJECTION_TYPES)
        _check_choice("region_features", self.region_features, REGION_FEATURES)
        _check_choice("itc_gradient", self.itc_gradient, ITC_GRADIENTS)
        _check_choice("itm_negatives", self.itm_negatives, ITM_NEGATIVES)
        _check_choice("head_initialization", self.head_initialization, HEAD_INITIALIZATIONS)
        if self.itc_chunk_size is not None and self.itc_chunk_size < 1:
            raise ValueError(f"`itc_chunk_size` must be at least 1, or left out, got {self.itc_chunk_size}")
        weights = [field.name for field in dataclasses.fields(self) if field.name.endswith("_weight")]
        for name in (*weights, "label_smoothing"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` divides the similarities and must be positive, got {self.temperature}")
        if self.text_config.max_position_embeddings < self.max_text_length:
            raise ValueError(
                f"`max_text_length` must be at most {self.text_config.max_position_embeddings}, the positions of the text "
                f"encoder (`text_config.max_position_embeddings`), got {self.max_text_length}"
            )
        # One folder serves every class and needs no installation of this project.
        self.auto_map = {
            "AutoConfig": "configuration_mra.MRAConfig",
            "AutoModel": "modeling_mra.MRAModel",
            "AutoModelForPreTraining": "modeling_mra.MRAForPreTraining",
            "AutoModelForZeroShotImageClassification": "modeling_mra.MRAForImageTextRetrieval",
        }


MRAConfig.register_for_auto_class()

__all__ = ["MRAConfig", "MRATextConfig", "MRAVisionConfig"]
