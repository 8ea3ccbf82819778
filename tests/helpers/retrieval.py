"""A tiny model, processor and person-search set for the tests of retrieval."""

import datasets
import torch
from PIL import Image
from transformers import BertTokenizerFast

from configuration_mra import MRAConfig
from modeling_mra import MRAForImageTextRetrieval
from processing_mra import MRAImageProcessor, MRAProcessor


COLOURS = ("red", "green", "blue", "white", "black", "yellow")
GARMENTS = ("coat", "dress", "shirt", "trousers", "shoes")
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = {
    word: index for index, word in enumerate([*SPECIALS, *COLOURS, *GARMENTS, "a", "person", "in", "with", "and"])
}
MAX_TEXT_LENGTH = 16


def tiny_config() -> MRAConfig:
    return MRAConfig(
        vision_config={
            "image_size": [64, 32],
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": [4, 4, 2, 1],
        },
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_fusion_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        },
        projection_dim=16,
        max_text_length=MAX_TEXT_LENGTH,
    )


def tiny_model(cls=MRAForImageTextRetrieval, seed: int = 0):
    """A random model with weights large enough that scores of different pairs differ visibly."""
    torch.manual_seed(seed)
    model = cls(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def tiny_processor() -> MRAProcessor:
    tokenizer = BertTokenizerFast(vocab=VOCABULARY)
    return MRAProcessor(
        MRAImageProcessor(size={"height": 64, "width": 32}), tokenizer, max_text_length=MAX_TEXT_LENGTH
    )


def tiny_dataset(num_ids: int = 5, images_per_id: int = 2, seed: int = 0) -> datasets.Dataset:
    """A set with one or two captions an image, of different lengths, identities counted from 100."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words):
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    rows = []
    for number in range(num_ids * images_per_id):
        pixels = torch.randint(0, 256, (70, 40, 3), generator=generator, dtype=torch.uint8)
        captions = [f"a person in a {pick(COLOURS)} {pick(GARMENTS)}"]
        if number % 2:
            captions.append(
                f"a {pick(COLOURS)} {pick(GARMENTS)} with a {pick(COLOURS)} {pick(GARMENTS)} and {pick(GARMENTS)}"
            )
        rows.append(
            {
                "image": Image.fromarray(pixels.numpy()),
                "captions": captions,
                "image_id": 100 + number // images_per_id,
                "camera": None,
            }
        )
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "captions": datasets.List(datasets.Value("string")),
            "image_id": datasets.Value("int64"),
            "camera": datasets.Value("string"),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)
