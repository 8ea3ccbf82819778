import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, BlipForConditionalGeneration

from data_scripts.dad.caption import run as run_caption
from data_scripts.dad.captioners import Captioner, clean_style
from tests.helpers.dad import load_config
from tests.helpers.dad_readers import (
    draw_person,
    files_of,
    make_sources,
    run,
    run_forked,
    run_jobs,
    write_config,
    write_generated,
    write_stage,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("caption"), ("blip", "chat", "florence", "grounding"))


PROMPTS = {"blip": "a photo of", "chat": "Describe the image in English", "florence": "<DETAILED_CAPTION>"}


@pytest.mark.parametrize("name", PROMPTS)
def test_every_kind_describes_pictures(root, name):
    captioner = Captioner(str(root / "readers" / name), PROMPTS[name], max_new_tokens=6)
    assert captioner.kind == {"blip": "plain", "chat": "chat", "florence": "task"}[name]
    images = [draw_person(seed) for seed in range(3)]
    texts = captioner(images)
    assert texts == [captioner([image])[0] for image in images]  # neighbours and padding change nothing
    assert all(text and text == " ".join(text.split()) for text in texts)
    for text in texts:
        assert not {"[CLS]", "[SEP]", "[PAD]", "<image>", "user", "assistant"} & set(text.split())


def test_prompt_is_not_part_of_the_caption(root):
    folder = str(root / "readers/blip")
    image = draw_person(0)
    prompted = Captioner(folder, "a photo of", max_new_tokens=5)([image])[0]
    model, processor = (
        BlipForConditionalGeneration.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    inputs = processor(images=image, text="a photo of", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    whole = processor.decode(output[0], skip_special_tokens=True)
    assert whole.startswith("a photo of ") and whole == f"a photo of {prompted}"
    assert Captioner(folder, None, max_new_tokens=5)([image])[0] != prompted


def test_words_that_the_tokenizer_parts_are_whole(root):
    """BERT's tokenizer, which BLIP has, gives "t - shirt"; a phrase behind it would be cut into "a t"."""
    captioner = Captioner(str(root / "readers/blip"), None)
    answer = captioner.processor.tokenizer("a man in a red t-shirt and a knee-length skirt", return_tensors="pt")
    captioner.model.generate = lambda **inputs: answer["input_ids"]
    assert captioner([draw_person(0)]) == ["a man in a red t-shirt and a knee-length skirt"]
    captioner.parts_hyphens = False
    assert captioner([draw_person(0)]) == ["a man in a red t - shirt and a knee - length skirt"]


def test_beams_and_length_are_used(root):
    folder = str(root / "readers/blip")
    images = [draw_person(seed) for seed in range(4)]
    short = Captioner(folder, None, max_new_tokens=2)(images)
    long = Captioner(folder, None, max_new_tokens=12)(images)
    beams = Captioner(folder, None, max_new_tokens=12, num_beams=4)(images)
    assert all(len(a) < len(b) for a, b in zip(short, long, strict=True)) and beams != long


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [
        ("chat", None, r"caption\.prompt: .*chat model"),
        (
            "florence",
            "Describe the image",
            r"caption\.prompt: .*<CAPTION>, <DETAILED_CAPTION>.*got 'Describe the image'",
        ),
        ("florence", "<OD>", r"caption\.prompt: .*got '<OD>'"),
        ("grounding", "a", r"caption\.model: .*grounding' cannot be loaded"),
        ("nowhere", "a", r"caption\.model: .*nowhere' cannot be loaded"),
    ],
)
def test_wrong_models_and_prompts_are_refused(root, name, prompt, message):
    with pytest.raises(ValueError, match=message):
        Captioner(str(root / "readers" / name), prompt)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man in a Black T-shirt. He walks.", "a man in a black t-shirt"),
        ("The image shows a woman!\nShe smiles", "the image shows a woman"),
        ("Assistant: A boy, approx. 1.5 m tall, runs.", "a boy, approx. 1.5 m tall, runs"),
        ("a girl in a red coat. she carries a bag.", "a girl in a red coat"),
        ('  "a  girl" ', "a girl"),
        ("...", ""),
        ("", ""),
    ],
)
def test_clean_style(text, expected):
    assert clean_style(text) == expected


def prepare(root, name, number=10, **caption):
    path = write_config(root, name, caption=caption)
    config = load_config(str(path))
    generated = write_generated(config, {number: draw_person(number) for number in range(number)})
    write_stage(config, "filter", root / name / "filter/kept.jsonl", generated[1:])
    return path


def test_rows_of_what_was_kept(root):
    path = prepare(root, "rows", clean_style=True)
    run(path, "caption")
    rows = [json.loads(line) for line in (root / "rows/captions/captions.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == list(range(1, 10))
    assert all(row["caption"] == clean_style(row["raw_caption"]) for row in rows)
    assert rows[0].keys() == {"file_path", "caption", "raw_caption", "prompt_id"}
    with Image.open(root / "rows/images" / rows[0]["file_path"]) as image:
        texts = Captioner(str(root / "readers/blip"), None, max_new_tokens=6)([image.convert("RGB")])
    assert rows[0]["raw_caption"] == texts[0]
    run(path, "caption")  # finished: nothing to do
    assert json.loads((root / "rows/captions/manifest.json").read_text())["finished"] == {"captions": 9, "empty": 0}


def test_killed_jobs_apart_and_two_processes_give_the_same_file(root):
    results = {}
    for name in ("whole", "killed", "jobs", "two"):
        path = prepare(root, name)
        if name == "whole":
            run(path, "caption")
        elif name == "jobs":
            run_jobs(path, "caption")
        elif name == "killed":
            assert run_forked(path, "caption", kill_after=1) == [-9]
            assert run_forked(path, "caption", num_processes=2) == [0, 0]
        else:
            assert run_forked(path, "caption", num_processes=2) == [0, 0]
        results[name] = files_of(root / name / "captions")
    assert all(result == results["whole"] for result in results.values())
    assert list(results["whole"]) == ["captions.jsonl"]


def test_no_model():
    with pytest.raises(ValueError, match=r"`caption\.model` must be a captioner's folder or Hub id, got None"):
        run_caption(load_config(None, ["--common.work_dir=nowhere", "--common.dataset=nowhere"]))
