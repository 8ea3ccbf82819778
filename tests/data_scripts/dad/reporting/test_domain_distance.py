import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image, ImageFilter
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from data_scripts.dad.reporting.domain_distance import (
    ColourEdgeFeatures,
    ImageModelFeatures,
    compare_statistics,
    load_extractor,
    measure_distance,
)


def draw(seed: int, tint=(0, 0, 0), blur: float = 0.0) -> Image.Image:
    """A grainy backdrop with a box whose colour depends on the seed."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 160, (48, 24, 3)) + np.array(tint)
    pixels[12:40, 6:18] = rng.integers(0, 255, 3)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(blur)) if blur else image


def draw_set(first: int, number: int = 24, **look) -> list[Image.Image]:
    return [draw(seed, **look) for seed in range(first, first + number)]


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """The distance as its definition has it."""
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    gap = first.mean(axis=0) - second.mean(axis=0)
    return float(gap @ gap + np.trace(covariances[0] + covariances[1] - 2 * root))


@pytest.mark.filterwarnings("ignore")
def test_fid_is_the_frechet_distance_of_the_features():
    generated, target = draw_set(0, 120), draw_set(500, 110, tint=(40, 0, 0))
    extractor = ColourEdgeFeatures()
    features = [extractor.extract(pictures).double().numpy() for pictures in (generated, target)]
    expected = frechet(*features)
    assert measure_distance(generated, target).fid == pytest.approx(expected, rel=1e-3)
    assert expected > 0.05


def test_what_looks_less_like_the_target_is_further_away():
    target = draw_set(0)
    same = measure_distance(draw_set(100), target)
    tinted = measure_distance(draw_set(100, tint=(70, 0, 0)), target)
    blurred = measure_distance(draw_set(100, blur=2), target)
    assert same.fid < tinted.fid and same.fid < blurred.fid
    assert abs(same.kid) < 0.1 * min(tinted.kid, blurred.kid)
    assert tinted.statistics["colour"].distance > 2 * same.statistics["colour"].distance
    assert blurred.statistics["sharpness"].distance > 5 * same.statistics["sharpness"].distance
    assert blurred.statistics["sharpness"].generated < blurred.statistics["sharpness"].target
    assert (same.num_generated, same.num_target, same.num_features) == (24, 24, 80)


def test_same_pictures_are_at_no_distance():
    pictures = draw_set(0)
    distance = measure_distance(pictures, pictures)
    assert distance.fid == pytest.approx(0, abs=1e-4) and distance.kid < 1e-3
    assert all(statistic.distance == 0 for statistic in distance.statistics.values())


def test_result_depends_on_neither_batch_size_nor_random_state():
    generated, target = draw_set(0, 9), draw_set(50, 7, tint=(30, 0, 0))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = measure_distance(generated, target, batch_size=2)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    second = measure_distance(generated, target, batch_size=100)
    assert first.fid == pytest.approx(second.fid, abs=1e-5) and first.kid == pytest.approx(second.kid, abs=1e-6)


def test_pictures_may_be_rows_and_paths(tmp_path):
    pictures = draw_set(0, 4)
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1])
    distance = measure_distance([{"image": picture} for picture in pictures], paths)
    assert distance.fid == pytest.approx(0, abs=1e-4)


def test_wasserstein_distance_in_standard_deviations():
    rows = [{"brightness": value, "contrast": 1, "colour": 1, "sharpness": 1, "detail": 1} for value in (10, 20)]
    shifted = [{**row, "brightness": row["brightness"] + 15} for row in rows]
    result = compare_statistics(shifted, rows)
    assert (result["brightness"].generated, result["brightness"].target) == (30, 15)
    assert result["brightness"].distance == pytest.approx(3)  # 15 over a standard deviation of 5
    assert result["contrast"].distance == 0


def test_features_of_hand_drawn_pictures():
    left = Image.new("RGB", (20, 40))
    left.paste((255, 0, 0), (0, 0, 10, 40))
    mean, spread, edges = ColourEdgeFeatures().extract([left]).reshape(10, 4, 2).split((3, 3, 4))
    assert mean[0, :, 0].min() > 0.95 and mean[0, :, 1].max() < 0.05 and mean[1:].max() < 0.02
    assert spread[1:].max() < 0.05
    assert edges[0].sum() > 5 * edges[1].sum()  # an upright edge, none that lies


def test_too_few_pictures():
    with pytest.raises(ValueError, match="`generated` must hold at least 2 images"):
        measure_distance(draw_set(0, 1), draw_set(0, 3))


def test_image_model_as_extractor(tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(vision_config=vision, text_config=text | {"vocab_size": 20}, projection_dim=12)
    ).eval()
    model.save_pretrained(tmp_path)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    extractor = load_extractor(str(tmp_path))
    assert extractor.size == (32, 32) and extractor.num_features == 12
    square = draw(3).resize((32, 32))
    expected = model.get_image_features(**processor(images=square, return_tensors="pt")).pooler_output
    torch.testing.assert_close(extractor.extract([square]), expected.detach())
    distance = measure_distance(draw_set(0, 6), draw_set(50, 6, tint=(60, 0, 0)), extractor)
    assert distance.num_features == 12 and str(tmp_path) in distance.extractor


def test_extractor_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"report\.feature_extractor.*nowhere.* cannot be loaded"):
        ImageModelFeatures(str(tmp_path / "nowhere"))
