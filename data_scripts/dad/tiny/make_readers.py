"""Build tiny random models that read images, for tests and `make demo-dad`; their outputs are meaningless.

    python -m data_scripts.dad.tiny.make_readers --output models/tiny

writes folders for `from_pretrained`: `blip`, `chat` (LLaVA) and `florence` caption, `grounding` (Grounding
DINO) and `detector` (YOLOS) give boxes, `clip` compares images with texts. With `--captions DATASET` (prepared), the
BLIP is trained on its captions for a minute, so that it writes plausible captions, independent of the image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from data_scripts.dad.command import with_plain_errors
from images_mra import read_picture
from mra.common.arguments import option, parse_arguments, require
from mra.common.files import whole_folder
from mra.common.tables import load_split
from mra.retrieval.encode import undecoded


SAMPLE_TOKENIZER = Path(__file__).resolve().parents[2] / "sample" / "tokenizer"
SPECIAL_IDS = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}  # of BERT's vocabulary, hard-coded in Grounding DINO
SIDE, PATCH = 32, 16
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
_LAYERS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
_VISION = _LAYERS | {"image_size": SIDE, "patch_size": PATCH}


def make_tokenizer() -> BertTokenizer:
    """Build a BERT tokenizer of the sample set's words with the special ids that Grounding DINO expects."""
    words = AutoTokenizer.from_pretrained(SAMPLE_TOKENIZER).get_vocab()
    vocabulary = dict(SPECIAL_IDS) | {"[PAD]": 0}
    free = (number for number in range(1, 2000) if number not in SPECIAL_IDS.values())
    for word in sorted(words, key=words.get):
        if word not in vocabulary:
            vocabulary[word] = next(free)
    for number in range(max(vocabulary.values())):  # every id below the highest needs a token
        if number not in set(vocabulary.values()):
            vocabulary[f"[unused{number}]"] = number
    return BertTokenizer(vocab=vocabulary, model_max_length=512)


def make_blip(folder: str | Path, seed: int = 0) -> None:
    """Build a BLIP captioner."""
    tokenizer = make_tokenizer()
    text = _LAYERS | {"vocab_size": len(tokenizer), "encoder_hidden_size": 32, "bos_token_id": tokenizer.cls_token_id}
    text |= {"sep_token_id": tokenizer.sep_token_id, "pad_token_id": 0, "eos_token_id": tokenizer.sep_token_id}
    config = BlipConfig(vision_config=_VISION, text_config=text | {"is_decoder": True}, projection_dim=16)
    image_processor = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    _save(folder, seed, lambda: BlipForConditionalGeneration(config), BlipProcessor(image_processor, tokenizer))


def make_chat(folder: str | Path, seed: int = 0) -> None:
    """Build a LLaVA with a chat template."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_VISION},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2, **_LAYERS, **ids},
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        vision_feature_layer=-1,
    )
    crop = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )
    _save(folder, seed, lambda: LlavaForConditionalGeneration(config), processor)


def make_florence(folder: str | Path, seed: int = 0) -> None:
    """Build a Florence-2, which is prompted with task tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[CLS]",
        eos_token="[SEP]",
        extra_special_tokens={"image_token": "<image>"},
    )
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    stages = {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1]}
    stages |= {"patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2]}
    text = {"model_type": "bart", "vocab_size": len(tokenizer), "d_model": 32, "max_position_embeddings": 128, **ids}
    for part in ("encoder", "decoder"):
        text |= {f"{part}_layers": 2, f"{part}_ffn_dim": 48, f"{part}_attention_heads": 2}
    config = Florence2Config(
        vision_config={**stages, "window_size": 4, "projection_dim": 32},
        text_config=text | {"decoder_start_token_id": tokenizer.eos_token_id, "forced_eos_token_id": None},
        image_token_id=cast(int, tokenizer.image_token_id),
    )
    image_processor: Any = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    image_processor.image_seq_length = (SIDE // 8) ** 2 + 1  # patches of the last stage and their mean
    processor = Florence2Processor(image_processor, tokenizer)
    _save(folder, seed, lambda: Florence2ForConditionalGeneration(config), processor)


def make_grounding(folder: str | Path, seed: int = 0) -> None:
    """Build a Grounding DINO with widely spread scores, so that some pass a threshold."""
    tokenizer = make_tokenizer()
    swin = {"model_type": "swin", "image_size": 64, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 2]}
    config = GroundingDinoConfig(
        backbone_config=swin | {"window_size": 4, "out_indices": [2, 3]},
        text_config={"model_type": "bert", "vocab_size": len(tokenizer), **_LAYERS},
        d_model=32,
        num_queries=20,
        num_feature_levels=3,
        max_text_len=256,
        disable_custom_kernels=True,
        encoder_layers=2,
        decoder_layers=2,  # a single layer breaks the two-stage heads
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    size = {"shortest_edge": 64, "longest_edge": 128}
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(size=size), tokenizer)
    _save(folder, seed, lambda: GroundingDinoForObjectDetection(config), processor)


def make_detector(folder: str | Path, seed: int = 0) -> None:
    """Build a YOLOS with the classes person and bicycle."""
    config = YolosConfig(
        **_LAYERS,
        image_size=[64, 64],
        patch_size=PATCH,
        num_detection_tokens=4,
        id2label={0: "person", 1: "bicycle"},
        label2id={"person": 0, "bicycle": 1},
    )
    processor = YolosImageProcessor(size={"height": 64, "width": 64}, do_pad=False)
    _save(folder, seed, lambda: YolosForObjectDetection(config), processor)


def make_clip(folder: str | Path, seed: int = 0) -> None:
    """Build a CLIP."""
    tokenizer = make_tokenizer()
    text = _LAYERS | {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "pad_token_id": 0}
    text |= {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = CLIPConfig(vision_config=_VISION, text_config=text, projection_dim=16)
    crop = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop)
    tokenizer.model_max_length = 77
    _save(folder, seed, lambda: CLIPModel(config), CLIPProcessor(image_processor, tokenizer))


MAKERS: dict[str, Callable[..., None]] = {
    "blip": make_blip,
    "chat": make_chat,
    "florence": make_florence,
    "grounding": make_grounding,
    "detector": make_detector,
    "clip": make_clip,
}


def make_readers(folder: str | Path, names: Sequence[str] = tuple(MAKERS), seed: int = 0) -> None:
    """Write the named models, each to a folder of its name."""
    for name in names:
        MAKERS[name](Path(folder) / name, seed)


def train_blip(folder: str | Path, dataset: Dataset, steps: int, seed: int = 0, batch_size: int = 32) -> list[float]:
    """Train a BLIP from [`make_blip`] on the captions of a dataset and save it in place.

    Args:
        folder: folder of the model.
        dataset: rows with `image` and `captions`.
        steps: steps of AdamW.
        seed: seed of the order.
        batch_size: pairs per step.

    Returns:
        The loss of every step.
    """
    model = BlipForConditionalGeneration.from_pretrained(folder)
    processor: Any = BlipProcessor.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    dataset, generator, losses = undecoded(dataset), torch.Generator().manual_seed(seed), []
    with torch.random.fork_rng(devices=[]):  # dropout
        torch.manual_seed(seed)
        for _ in tqdm(range(steps), desc="captions"):
            rows = [dataset[row] for row in torch.randint(len(dataset), (batch_size,), generator=generator).tolist()]
            images, texts = [read_picture(row["image"]) for row in rows], [row["captions"][0] for row in rows]
            inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
            labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    with whole_folder(folder, replaces="config.json") as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
    return losses


def _save(folder: str | Path, seed: int, make_model: Callable, processor: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model()
        for name, parameter in model.named_parameters():
            if (
                parameter.ndim > 1 and "embed_tokens" not in name
            ):  # with the usual scale 0.02 all inputs give the same output
                torch.nn.init.normal_(parameter, std=0.2)
    with whole_folder(folder, replaces="config.json") as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)


@dataclass
class ReaderArguments:
    """Options of the tiny reading models."""

    output: str = option(help="folder to write")
    models: list[str] = option(list(MAKERS), "models to write")
    seed: int = option(0, "seed of the weights")
    captions: str | None = option(None, "prepared dataset to train the BLIP on; untrained when left out")
    steps: int = option(300, "steps of the BLIP's training")

    def __post_init__(self) -> None:
        unknown = [name for name in self.models if name not in MAKERS]
        require(not unknown, "models", f"names among {', '.join(MAKERS)}", ", ".join(unknown))


def main(argv: list[str] | None = None) -> None:
    """Write the models that the command line names."""
    (options,) = parse_arguments([ReaderArguments], prog="make_readers", description=__doc__, argv=argv, config=False)

    def work() -> None:
        make_readers(options.output, options.models, options.seed)
        if options.captions and "blip" in options.models:
            train_blip(
                Path(options.output) / "blip", load_split(options.captions, "train"), options.steps, options.seed
            )
        print(f"{options.output}: {', '.join(options.models)}")

    with_plain_errors("make_readers", work, options.output)


if __name__ == "__main__":
    main()
