"""Encoding, ranking, re-ranking and fusion against the published evaluation, through the model (tests/reference)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_mra import MRAForImageTextRetrieval
from mra.retrieval import encode_images, encode_texts, fuse_scores, rerank, retrieval_metrics, similarity_matrix, top_k
from mra.training.published_layout import from_published, infer_config
from tests.fidelity.test_model import read, synthetic_checkpoint
from tests.reference.fill_rule import make_images


REFERENCE = Path(__file__).resolve().parents[1] / "reference"
EVALUATION = json.loads((REFERENCE / "evaluation_b.json").read_text())
IDS = torch.tensor(EVALUATION["q_pids"]), torch.tensor(EVALUATION["g_pids"])


class Pixels:
    """A prepared image in place of a picture."""

    def __init__(self, pixel_values):
        self.pixel_values = pixel_values

    def convert(self, mode):
        return self


def prepared(images=None, text=None):
    """A processor for inputs that are prepared already: pixels, and tokens written as text."""
    if images is not None:
        return {"pixel_values": torch.stack([image.pixel_values for image in images])}
    input_ids = torch.tensor([[int(token) for token in tokens.split()] for tokens in text])
    return {"input_ids": input_ids, "attention_mask": (input_ids != 0).long()}


@pytest.fixture(scope="module")
def model():
    vector = read("forward_b")
    state_dict = synthetic_checkpoint(vector)
    config = infer_config(state_dict, vector)
    weights = {name: tensor for name, tensor in from_published(state_dict, config).items() if name.startswith("mra.")}
    return MRAForImageTextRetrieval.from_pretrained(None, config=config, state_dict=weights).eval()


@pytest.fixture(scope="module")
def texts(model):
    captions = [" ".join(map(str, tokens)) for tokens in EVALUATION["texts"]["ids"]]
    return encode_texts(model, prepared, captions, keep_hidden_states=True, batch_size=8)


@pytest.mark.parametrize("flip", [False, True])
def test_fidelity_evaluation(model, texts, flip):
    expected = load_file(REFERENCE / "evaluation_b.safetensors")
    height, width = model.config.vision_config.image_size
    pixels = make_images(EVALUATION["images"]["seed"], EVALUATION["images"]["n"], height, width)
    images = [Pixels(image) for image in pixels]
    images = encode_images(model, prepared, images, flip=flip, keep_hidden_states=True, batch_size=5)
    similarity = similarity_matrix(texts.embeds, images.embeds)
    torch.testing.assert_close(similarity, expected[f"sims_t2i_hflip{flip:d}"], rtol=0, atol=1e-5)
    measured = retrieval_metrics(similarity, *IDS)
    assert measured == pytest.approx(EVALUATION["runs"][f"sims_only_hflip{flip:d}"], abs=1e-4)

    top_indices = top_k(similarity, EVALUATION["k_test"])
    match_scores = rerank(model, texts, images, top_indices, batch_size=16)
    names = ("itm_match_logit_all_pairs", "itm_match_logit_all_pairs_flipped_images")[: 1 + flip]
    for scores, name in zip(match_scores, names, strict=True):
        torch.testing.assert_close(scores, expected[name].gather(1, top_indices), rtol=0, atol=1e-4)
    for method, world_size in (("single", 1), ("published", 2), ("published", 4)):
        fused = fuse_scores(similarity, top_indices, match_scores, method, world_size)
        name = f"hflip{flip:d}_world{world_size}"
        torch.testing.assert_close(fused, expected[f"score_t2i_{name}"], rtol=0, atol=1e-5)
        assert retrieval_metrics(fused, *IDS) == pytest.approx(EVALUATION["runs"][name]["metrics"], abs=1e-4)
