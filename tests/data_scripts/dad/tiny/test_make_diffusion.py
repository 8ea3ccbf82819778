"""The small Stable Diffusion: all parts, read from a folder like a real one."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from data_scripts.dad.diffusion import load_base
from data_scripts.dad.tiny.make_diffusion import build, main, make_tokenizer
from tests.helpers.dad import tree


def test_the_tokenizer_knows_the_vocabulary():
    tokenizer = make_tokenizer()
    assert tokenizer.tokenize("A woman in a turquoise hoodie") == [
        f"{word}</w>" for word in ("a", "woman", "in", "a", "turquoise", "hoodie")
    ]
    ids = tokenizer("a man", padding="max_length").input_ids
    assert len(ids) == 77 and ids[0] == tokenizer.bos_token_id and ids[3] == tokenizer.eos_token_id


def test_the_command_writes_a_pipeline(tmp_path):
    for seed in range(3):
        Image.effect_noise((20, 40), 50).convert("RGB").save(tmp_path / f"{seed}.png")
    arguments = ["--output", tmp_path / "base", "--images", tmp_path, "--channels", 8, 16, "--steps", 3]
    main([str(argument) for argument in (*arguments, "--image_size", 32, 16)])
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    assert pipeline.safety_checker is None
    base = load_base(str(tmp_path / "base"))
    assert base.latent_factor == 4 and base.latent_shape([32, 16]) == (4, 8, 4)
    assert base.vae.config.scaling_factor != 1 and base.scheduler.config.prediction_type == "sample"
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())


def test_weights_follow_from_the_seed(tmp_path):
    folders = [build(tmp_path / str(number), channels=(8, 16), seed=seed) for number, seed in enumerate((1, 1, 2))]
    assert tree(folders[0]) == tree(folders[1]) != tree(folders[2])


def test_a_folder_without_images_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no \.jpg or \.png file"):
        main(["--output", str(tmp_path / "base"), "--images", str(tmp_path)])


def test_text_changes_what_is_encoded(tmp_path):
    base = load_base(str(build(tmp_path / "base", channels=(8, 16))))
    with torch.no_grad():
        texts = [
            base.text_encoder(base.tokenizer(text, return_tensors="pt").input_ids)[1] for text in ("a man", "a woman")
        ]
    assert not texts[0].equal(texts[1])
