"""Image captioners of transformers behind one interface: chat models, BLIP-like and Florence-like models."""

import re
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BatchFeature

from mra.common.pretrained import load_pretrained


_TASK_TOKEN = re.compile(r"<[A-Z_]+>")
_SENTENCE_END = re.compile(r"(?<=[\w)\"'][.!?])\s+(?=[\"'A-Z])|\n+")
_UNCASED_SENTENCE_END = re.compile(r"(?<=[\w)\"'][.!?])\s+(?=[\"'a-z])|\n+")  # for models that write no capitals
_SPEAKERS = re.compile(r"^\s*(?:assistant|answer|caption|description)\s*:\s*", re.IGNORECASE)
_PARTED_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")
_SCRAPS = re.compile(r"</?[a-z_]+>|\[[A-Z]+\]|<\|[^|]*\|>")


class Captioner:
    """Captioner with a model of `AutoModelForImageTextToText`.

    The prompting depends on the model: its chat template if the processor has one; a task token like `<DETAILED_CAPTION>` for
    Florence-2; otherwise the prompt, if any, is the beginning of the text.

    Args:
        name: folder or Hub id.
        prompt: the prompt; None lets models without chat template start the text.
        dtype, device: dtype and device of the weights.
        max_new_tokens, num_beams: settings of the beam search.

    Raises:
        ValueError: if there is no such model, or it needs another kind of prompt.
    """

    def __init__(
        self,
        name: str,
        prompt: str | None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_new_tokens: int = 60,
        num_beams: int = 1,
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = load_pretrained(AutoModelForImageTextToText, name, "caption.model", dtype=dtype).to(device).eval()
        self.processor = load_pretrained(AutoProcessor, name, "caption.model")
        self.prompt = prompt
        self.search = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        if not self.model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"  # decoders continue the end of a text
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.parts_hyphens = " - " in tokenizer.decode(tokenizer("t-shirt")["input_ids"])
        self.kind = self._find_kind(name)

    def _find_kind(self, name: str) -> str:
        if getattr(self.processor, "chat_template", None):
            if not self.prompt:
                raise ValueError(f"caption.prompt: {name} is a chat model, which needs a prompt")
            return "chat"
        tasks = getattr(self.processor, "tasks_answer_post_processing_type", None)
        if tasks is None:
            return "plain"
        if self.prompt is None or not _TASK_TOKEN.fullmatch(self.prompt) or tasks.get(self.prompt) != "pure_text":
            known = ", ".join(token for token, kind in tasks.items() if kind == "pure_text" and "CAPTION" in token)
            raise ValueError(f"caption.prompt: {name} needs a task token, one of {known}; got {self.prompt!r}")
        return "task"

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """Caption images; return the generated texts without prompt and special tokens."""
        inputs = self._inputs(list(images)).to(self.model.device)
        for key, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[key] = value.to(self.model.dtype)
        output = self.model.generate(**inputs, **self.search)
        asked = inputs.get("input_ids")
        # Some decoders, depending on the model, repeat the question before the answer.
        repeated = 0 if asked is None else _shared_start(asked, output)
        texts = self.processor.batch_decode(output[:, repeated:], skip_special_tokens=True)
        return [self._normalize_spaces(self._without_prompt(_SCRAPS.sub(" ", text))) for text in texts]

    def _normalize_spaces(self, text: str) -> str:
        """Separate words by one space, and join the "t - shirt" of BERT's tokenizer (BLIP, GIT) to "t-shirt"."""
        text = " ".join(text.split())
        return _PARTED_HYPHEN.sub("-", text) if self.parts_hyphens else text

    def _inputs(self, images: list[Image.Image]) -> BatchFeature:
        if self.kind == "chat":
            question = {"type": "text", "text": self.prompt}
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, question]}] for image in images]
            return self.processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"padding": True, "return_tensors": "pt"},
            )
        if self.prompt is None:
            return self.processor(images=images, return_tensors="pt")
        return self.processor(images=images, text=[self.prompt] * len(images), padding=True, return_tensors="pt")

    def _without_prompt(self, text: str) -> str:
        """Remove the prompt from the start of the text, ignoring differences in spacing."""
        if self.kind == "task" or not self.prompt:
            return text
        words = [re.escape(piece) for piece in re.findall(r"\w+|[^\w\s]", self.prompt)]
        return re.sub(r"^\s*" + r"\s*".join(words), "", text, count=1, flags=re.IGNORECASE)


def _shared_start(asked: torch.Tensor, output: torch.Tensor) -> int:
    """Count the question tokens repeated at the start of every output row: all, all but the last one, or none."""
    for length in (asked.shape[1], asked.shape[1] - 1):
        if 0 < length <= output.shape[1] and torch.equal(asked[:, 1:length], output[:, 1:length]):
            return length
    return 0


def clean_style(text: str) -> str:
    """Convert a caption to SDA's style: its first sentence in lower case, without final full stop or speaker's name.

    Args:
        text: text from the model.
    """
    text = _SPEAKERS.sub("", text.strip())
    first = (_UNCASED_SENTENCE_END if text.islower() else _SENTENCE_END).split(text, maxsplit=1)[0]
    return " ".join(first.split()).strip(" .!?\"'").lower()
