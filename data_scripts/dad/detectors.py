"""Detection of phrases with zero-shot detectors, and of people with any detector."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torchvision.ops import box_convert, nms

from mra.common.pretrained import load_pretrained


TOKEN_MODELS = ("grounding-dino", "mm-grounding-dino")  # give scores per token of one text
QUERY_MODELS = ("owlvit", "owlv2")  # give scores per text of a list
PERSON_LABELS = ("person", "pedestrian", "human", "people")
_SAME_PERSON = 0.7  # IoU
_RECORDED = 0.1  # weaker detections of people are not recorded


@dataclass
class PhraseBoxes:
    """Detections in one image.

    Attributes:
        boxes: `(boxes, 4)` of cx, cy, w, h in 0..1, clipped to the image; some may be empty.
        scores: highest score of each phrase's words for each box, `(boxes, phrases)`.
        best: highest score over all words, `(boxes,)`.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    best: torch.Tensor


class PhraseDetector:
    """Detector of phrases with a model of `AutoModelForZeroShotObjectDetection`: Grounding DINO, OWL-ViT and similar.

    Args:
        name: folder or Hub id.
        argument: name of the configuration's argument, for messages.
        dtype, device: dtype and device of the weights.

    Raises:
        ValueError: if there is no such model, or its scores cannot be assigned to phrases.
    """

    def __init__(
        self, name: str, argument: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        model = load_pretrained(AutoModelForZeroShotObjectDetection, name, argument, dtype=dtype)
        self.model = model.to(device).eval()
        self.processor = load_pretrained(AutoProcessor, name, argument)
        self.kind = self.model.config.model_type
        if self.kind not in TOKEN_MODELS + QUERY_MODELS:
            known = ", ".join(TOKEN_MODELS + QUERY_MODELS)
            raise ValueError(f"{argument}: {name!r} is of type {self.kind}; expected one of {known}")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[PhraseBoxes]:
        """Detect phrases in images.

        Args:
            images: RGB images.
            phrases: at least one phrase for each image, in lower or upper case.
        """
        detect = self._detect_by_tokens if self.kind in TOKEN_MODELS else self._detect_by_queries
        return detect(list(images), [[phrase.lower() for phrase in own] for own in phrases])

    def _forward(self, images: Sequence[Image.Image], text: Any, **options: Any) -> tuple[Any, Any]:
        inputs = self.processor(images=images, text=text, return_tensors="pt", **options).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return inputs, self.model(**inputs)

    def _detect_by_tokens(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[PhraseBoxes]:
        texts = [". ".join(own) + "." for own in phrases]
        inputs, outputs = self._forward(images, texts, padding=True)
        scores = outputs.logits.float().sigmoid().cpu()  # (images, boxes, max_text_len), 0 past the text
        boxes = outputs.pred_boxes.float().cpu()
        tokens = self.processor.tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="pt")
        if not torch.equal(tokens["input_ids"], inputs["input_ids"].cpu()):
            raise ValueError("ground.model: its processor tokenises texts differently, so phrases cannot be located")
        found = []
        for own, own_scores, own_boxes, offsets in zip(phrases, scores, boxes, tokens["offset_mapping"], strict=True):
            spans = find_token_spans(own, offsets.tolist())
            by_phrase = [own_scores[:, span].amax(dim=1) for span in spans]
            found.append(PhraseBoxes(cut_at_edges(own_boxes), torch.stack(by_phrase, dim=1), own_scores.amax(dim=1)))
        return found

    def _detect_by_queries(self, images: Sequence[Image.Image], phrases: Sequence[Sequence[str]]) -> list[PhraseBoxes]:
        options = {"padding": "max_length", "truncation": True}  # these models read texts of a fixed length
        _, outputs = self._forward(images, phrases, **options)
        scores = outputs.logits.float().sigmoid().cpu()  # (images, boxes, most phrases)
        found = []
        for image, own, own_scores, boxes in zip(
            images, phrases, scores, outputs.pred_boxes.float().cpu(), strict=True
        ):
            if self.kind == "owlv2":  # the image is in the upper left corner of a square
                side = max(image.size)
                boxes = boxes * torch.tensor([side / image.width, side / image.height]).repeat(2)
            own_scores = own_scores[:, : len(own)]
            found.append(PhraseBoxes(cut_at_edges(boxes), own_scores, own_scores.amax(dim=1)))
        return found


def find_token_spans(phrases: Sequence[str], offsets: Sequence[Sequence[int]]) -> list[list[int]]:
    """Find which tokens of "first phrase. second phrase." belong to each phrase.

    Args:
        phrases: phrases in the order of the text.
        offsets: start and end character of every token; both 0 for special tokens.

    Raises:
        ValueError: if a phrase has no token because the text was truncated.
    """
    spans, start = [], 0
    for phrase in phrases:
        end = start + len(phrase)
        spans.append([place for place, (first, last) in enumerate(offsets) if start <= first < last <= end])
        if not spans[-1]:
            raise ValueError(f"{phrase!r} has no token: there are more phrases than the detector can read at a time")
        start = end + len(". ")
    return spans


def cut_at_edges(boxes: torch.Tensor) -> torch.Tensor:
    """Clip boxes `(boxes, 4)` of cx, cy, w, h at the edges of the image; a box outside gets area 0."""
    return box_convert(box_convert(boxes, "cxcywh", "xyxy").clamp(0, 1), "xyxy", "cxcywh")


class PersonDetector:
    """Detector of people, with fixed classes (DETR, YOLOS, RT-DETR) or phrases.

    Args:
        name: folder or Hub id of either kind of detector.
        dtype, device: dtype and device of the weights.

    Raises:
        ValueError: if there is no such model, or it has no class for people.
    """

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection

        argument = "filter.person_model"
        config = load_pretrained(AutoConfig, name, argument)
        self.phrases = None
        if config.model_type in TOKEN_MODELS + QUERY_MODELS:
            self.phrases = PhraseDetector(name, argument, dtype, device)
            return
        self.model = load_pretrained(AutoModelForObjectDetection, name, argument, dtype=dtype).to(device).eval()
        self.processor = load_pretrained(AutoImageProcessor, name, argument)
        self.labels = {number for number, label in config.id2label.items() if label.lower() in PERSON_LABELS}
        if not self.labels:
            known = ", ".join(list(config.id2label.values())[:8])
            raise ValueError(f"{argument}: {name!r} has no label {PERSON_LABELS[0]}; its labels are {known}, ...")

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[list[list[float]]]:
        """Detect the people in every image.

        Returns:
            For each image a list of `[score, cx, cy, w, h]`, best first, with boxes in 0..1.
        """
        if self.phrases is not None:
            found = [(each.boxes, each.scores[:, 0]) for each in self.phrases(images, [["a person"]] * len(images))]
        else:
            found = self._detect(list(images))
        return [_list_persons(boxes, scores) for boxes, scores in found]

    def _detect(self, images: Sequence[Image.Image]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        inputs = self.processor(images=images, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = self.model(**inputs)
        sizes = [(1, 1)] * len(images)  # boxes stay in 0..1
        results = self.processor.post_process_object_detection(outputs, threshold=_RECORDED, target_sizes=sizes)
        found = []
        for result in results:
            person = torch.tensor([label in self.labels for label in result["labels"].tolist()], dtype=torch.bool)
            boxes = box_convert(result["boxes"].float().cpu(), "xyxy", "cxcywh")
            found.append((cut_at_edges(boxes[person]), result["scores"].float().cpu()[person]))
        return found


def _list_persons(boxes: torch.Tensor, scores: torch.Tensor) -> list[list[float]]:
    kept = nms(box_convert(boxes, "cxcywh", "xyxy"), scores, _SAME_PERSON)
    rows = torch.cat([scores[kept, None], boxes[kept]], dim=1).tolist()
    return [[round(value, 4) for value in row] for row in rows if row[0] >= _RECORDED]
