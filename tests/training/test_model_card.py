import logging
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import ModelCard

from mra.retrieval import RetrievalChoice
from mra.training.model_card import build_card, push_folder


RECIPE = {
    "model_name_or_path": "somebody/mra-sda",
    "dataset": "somebody/CUHK",
    "learning_rate": 1e-4,
    "output_dir": "outputs/private",
    "hub_model_id": "me/mra-cuhk",
    "push_to_hub": True,
    "resume": None,
}
METRICS = {
    "similarity": {"R1": 70.123, "R5": 88.0, "R10": 93.0, "mAP": 62.5, "mINP": 50.0},
    "reranked": {"R1": 77.25, "R5": 90.0, "R10": 94.5, "mAP": 68.5, "mINP": 52.0},
}
RESULT = SimpleNamespace(
    metrics=METRICS,
    rerank_k=512,
    score_fusion="posterior",
    match_weight=0.4,
    flip=True,
    ranking="posterior 0.4, k 512",
    sample=None,
)
CHOICE = RetrievalChoice(
    rerank_k=128,
    chosen_on="validation data of somebody/CUHK",
    gallery_size=3078,
    score_fusion="posterior",
    match_weight=0.4,
    flip=True,
    tolerance=0.05,
    tried={512: {"R1": 77.25, "mAP": 68.5}},
    tried_fusions={
        "similarity": {"R1": 70.123, "mAP": 62.5},
        "published": {"R1": 76.0, "mAP": 68.0},
        "posterior 0.4": {"R1": 77.25, "mAP": 68.5},
    },
)


def test_card_carries_data_recipe_and_metrics():
    text = build_card(RECIPE, 12, RESULT, "somebody/CUHK", CHOICE, "mAP by similarity alone")
    card = ModelCard(text)
    data = card.data
    assert (data.license, data.license_name, data.base_model) == ("other", "research-only", "somebody/mra-sda")
    results = {(result.metric_type, result.metric_name): result for result in data.eval_results}
    best = results["r1", "R@1 (after re-ranking)"]
    assert (best.metric_value, best.dataset_name, best.dataset_split) == (77.25, "CUHK", "validation")
    assert len(results) == 10 and data.model_name == "mra-cuhk"
    assert best.metric_args == {"flip": True, "rerank_k": 512, "score_fusion": "posterior", "match_weight": 0.4}
    row = "| after re-ranking (posterior 0.4, k 512) | 77.25 | 90.00 | 94.50 | 68.50 | 52.00 |"
    assert "Selected as the best of the validated epochs by mAP by similarity alone." in text
    assert row in text and "after epoch 12" in text and "Warning" not in text
    assert "uses the score fusion posterior 0.4, chosen among 2 fusions; measured at k 512" in text
    assert "| published | 76.00 | 68.00 | |" in text and "| posterior 0.4 | 77.25 | 68.50 | chosen |" in text
    assert "`--rerank_k auto` uses 128: rerank_k 128 loses at most 0.05 points of R@1 and mAP against 512" in text
    for needed in ('"me/mra-cuhk", trust_remote_code=True', "## Search", "## Intended use", "## Licence", "research"):
        assert needed in text, needed
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["learning_rate"] == 1e-4
    assert not {"output_dir", "push_to_hub", "resume"} & recipe.keys()


def test_card_of_averaged_weights():
    words = "exponential moving averages of those of training, of which each optimizer step\nkeeps a share of 0.999"
    recipe = RECIPE | {"ema_decay": 0.999}
    assert words in build_card(recipe, 12, RESULT, "somebody/CUHK", CHOICE, is_averaged=True)
    assert "moving averages" not in build_card(recipe, 12, RESULT, "somebody/CUHK", CHOICE)


def test_card_of_figures_of_a_sample():
    sampled = SimpleNamespace(**vars(RESULT) | {"sample": "500 captions drawn by seed 1"})
    text = build_card(RECIPE, 12, sampled, "somebody/CUHK", CHOICE)
    assert "data of `somebody/CUHK`, with 500 captions drawn by seed 1 as queries to all images, in percent" in text
    assert all(entry.metric_args["queries"] == sampled.sample for entry in ModelCard(text).data.eval_results)


def test_card_warns_of_reranking_below_similarity():
    worse = {"similarity": METRICS["reranked"], "reranked": METRICS["similarity"]}
    text = build_card(RECIPE, 12, SimpleNamespace(**vars(RESULT) | {"metrics": worse}), "somebody/CUHK", CHOICE)
    assert "Selected" not in text
    assert (
        "**Warning:** re-ranking is below similarity alone: R@1 70.12 against 77.25, mAP 62.50 against 68.50." in text
    )


def test_card_of_a_model_that_was_not_evaluated():
    text = build_card(RECIPE | {"hub_model_id": None, "model_name_or_path": None}, 1)
    card = ModelCard(text)
    assert card.data.eval_results is None and "not evaluated during training" in text and "# private" in text


def test_code_of_the_card_runs(tmp_path):
    """Loads and searches exactly as the card says, with the folder in place of the Hub id."""
    from PIL import Image

    from tests.helpers.tiny import tiny_config, tiny_model, tiny_processor

    config = tiny_config()
    tiny_model(config).save_pretrained(tmp_path)
    tiny_processor(config).save_pretrained(tmp_path)
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        Image.new("RGB", (40, 90), (80 * index, 10, 200)).save(path)
    text = build_card(RECIPE | {"hub_model_id": str(tmp_path)}, 1)
    scope = {"paths": paths}
    for block in text.split("```python\n")[1:]:
        exec(block.split("```")[0], scope)
    assert sorted(scope["ranking"].tolist()) == [0, 1, 2]


def test_a_folder_without_card_is_not_pushed(tmp_path):
    with pytest.raises((ValueError, OSError)):
        push_folder(tmp_path, None)


def test_a_push_that_fails_says_how_to_push_later(tmp_path, monkeypatch):
    class Hub:
        def create_repo(self, *args, **options):
            raise ConnectionError("no route to host")

    monkeypatch.setattr("mra.training.model_card.HfApi", Hub)
    (tmp_path / "README.md").write_text(build_card(RECIPE, 3, RESULT, "somebody/CUHK"))
    with pytest.raises(
        ValueError, match=rf"is complete but was not pushed .*no route.*hf upload me/mra-cuhk {tmp_path}"
    ):
        push_folder(tmp_path, SimpleNamespace(hub_model_id="me/mra-cuhk", hub_private=True))


def test_push_creates_the_repository_and_uploads_the_whole_folder(tmp_path, monkeypatch):
    calls = {}

    class Hub:
        def create_repo(self, repo_id, **options):
            calls["create"] = repo_id, options
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, **options):
            calls["upload"] = options
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr("mra.training.model_card.HfApi", Hub)
    monkeypatch.setattr("mra.training.model_card.logger", logging.getLogger("test"))
    (tmp_path / "README.md").write_text(build_card(RECIPE, 3, RESULT, "somebody/CUHK"))
    address = push_folder(tmp_path, SimpleNamespace(hub_model_id="me/mra-cuhk", hub_private=True))
    assert address == "https://hub/commit/1"
    assert calls["create"] == ("me/mra-cuhk", {"private": True, "exist_ok": True})
    assert calls["upload"]["repo_id"] == "me/mra-cuhk" and calls["upload"]["folder_path"] == str(tmp_path)
