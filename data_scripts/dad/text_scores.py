"""Image-text scores of models with a shared embedding space (CLIP, SigLIP)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image

from mra.common.pretrained import load_pretrained


class TextScorer:
    """Scorer of (image, text) pairs by the cosine of their embeddings.

    Args:
        name: folder or Hub id.
        dtype, device: dtype and device of the weights.

    Raises:
        ValueError: if there is no such model, or it has no shared space.
    """

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor

        argument = "filter.score_model"
        self.model = load_pretrained(AutoModel, name, argument, dtype=dtype).to(device).eval()
        self.processor = load_pretrained(AutoProcessor, name, argument)
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            kind = self.model.config.model_type
            raise ValueError(f"{argument}: {name!r} is of type {kind}; expected a CLIP-like model of image and text")
        self.padding = (
            "max_length" if self.model.config.model_type.startswith("siglip") else True
        )  # as in its training

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """Score pairs from -1 to 1; texts are truncated to the model's length."""
        inputs = self.processor(
            images=list(images), text=list(texts), padding=self.padding, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        pixel_values = inputs.pop("pixel_values").to(self.model.dtype)
        image_embeds = self.model.get_image_features(pixel_values=pixel_values).pooler_output
        text_embeds = self.model.get_text_features(**inputs).pooler_output
        scores = F.cosine_similarity(image_embeds.float(), text_embeds.float())
        return [round(score, 5) for score in scores.tolist()]
