"""Processor of MRA: deterministic preprocessing of pedestrian crops and captions."""

from typing import Any

import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, BertConfig, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,  # pyright: ignore[reportPrivateImportUsage]  # exported, not listed
    OPENAI_CLIP_STD,  # pyright: ignore[reportPrivateImportUsage]
    PILImageResampling,
)
from transformers.utils import logging


try:
    from .captions_mra import CAPTION_STYLES, normalize_caption
    from .images_mra import to_rgb
except ImportError:  # run from the repository root
    if __package__:
        raise
    from captions_mra import CAPTION_STYLES, normalize_caption
    from images_mra import to_rgb

logger = logging.get_logger(__name__)


class MRAImageProcessor(TorchvisionBackend):
    """Image processor that resizes (bicubic), scales to 0..1 and normalises with CLIP's mean and deviation."""

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 384, "width": 256}  # noqa: RUF012
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    do_normalize = True

    def process_image(self, image: Any, do_convert_rgb: bool | None = None, **kwargs: Any) -> torch.Tensor:
        """Convert a Pillow image with [`to_rgb`], as training does; the library does the rest."""
        if do_convert_rgb and isinstance(image, Image.Image):
            image = to_rgb(image)
        return super().process_image(image, do_convert_rgb=do_convert_rgb, **kwargs)


class MRAProcessor(ProcessorMixin):
    r"""Processor of an [`MRAImageProcessor`] and a BERT tokenizer.

    Args:
        image_processor ([`MRAImageProcessor`]): for the crops.
        tokenizer (`BertTokenizer`): for captions and phrases.
        max_text_length (`int`, *optional*, defaults to 56):
            Every text is padded and cut to this many tokens, because the model pools over the padding as well.
        caption_style (`str`, *optional*, defaults to `"plain"`): see [`normalize_caption`].

    Raises:
        ValueError: if `caption_style` is unknown or the tokenizer holds no words.
    """

    def __init__(
        self,
        image_processor: MRAImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        max_text_length: int = 56,
        caption_style: str = "plain",
        **kwargs: Any,
    ) -> None:
        if caption_style not in CAPTION_STYLES:
            raise ValueError(f"`caption_style` must be one of {', '.join(CAPTION_STYLES)}, got {caption_style!r}")
        special = tokenizer.all_special_ids
        if set(tokenizer.get_vocab().values()) <= set(special):  # what transformers builds where the files are missing
            raise ValueError(
                f"`tokenizer` holds {len(special)} special tokens and no words, as if its files were missing: use the "
                "tokenizer that the model was trained with"
            )
        self.max_text_length = max_text_length
        self.caption_style = caption_style
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self, images: Any = None, text: Any = None, return_tensors: str = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Prepare images, texts or both.

        Args:
            images: one image or a list, as [`MRAImageProcessor`] takes them.
            text (`str` or `list[str]`): captions or phrases. The first text that is cut to `max_text_length` is logged.
            return_tensors: format of the result, `pt` for PyTorch.
            **kwargs: further arguments of the image processor.

        Returns:
            `pixel_values` `(images, 3, height, width)` float, `input_ids` and `attention_mask`
            `(texts, max_text_length)` integers, whichever were asked for.

        Raises:
            ValueError: if neither is given or a text is empty.
        """
        if images is None and text is None:
            raise ValueError("`images`, `text` or both must be given, got neither")
        features = {}
        if images is not None:
            features.update(self.image_processor(images, return_tensors=return_tensors, **kwargs))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            encoded = self.tokenizer(
                [self.normalize_caption(item) for item in texts],
                padding="max_length",
                truncation=True,
                max_length=self.max_text_length,
                return_token_type_ids=False,
                return_tensors=return_tensors,
            )
            if any(encoding.overflowing for encoding in encoded.encodings):
                logger.warning_once(
                    f"`text`: a text of more than {self.max_text_length} tokens (`max_text_length`) was cut, and the words "
                    "after them are not searched; this is logged once"
                )
            features.update(encoded)
        return BatchFeature(features)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> Any:
        """Load the parts without config.json, which names code that the Auto classes would ask to trust."""
        return [
            MRAImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            AutoTokenizer.from_pretrained(pretrained_model_name_or_path, config=BertConfig(), **kwargs),
        ]

    def normalize_caption(self, caption: str) -> str:
        """Prepare one caption in this processor's style."""
        return normalize_caption(caption, self.caption_style, self.max_text_length)

    def clean_caption(self, caption: str) -> str:
        """Clean one caption in this processor's style and keep all of its words."""
        return normalize_caption(caption, self.caption_style, max_words=None)

    @property
    def model_input_names(self) -> list[str]:
        """Return the names that [`__call__`] may return."""
        return ["pixel_values", "input_ids", "attention_mask"]


MRAImageProcessor.register_for_auto_class("AutoImageProcessor")
MRAProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["MRAImageProcessor", "MRAProcessor", "normalize_caption"]
