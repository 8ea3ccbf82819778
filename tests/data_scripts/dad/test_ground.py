import json

import pytest
import torch
from transformers import (
    AutoProcessor,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
)

from data_scripts.dad.detectors import PersonDetector, PhraseBoxes, PhraseDetector, find_token_spans
from data_scripts.dad.ground import choose_regions
from data_scripts.dad.language.noun_phrases import find_noun_phrases
from data_scripts.dad.sections import GroundSection
from data_scripts.dad.stage_folders import image_path
from data_scripts.dad.tiny.make_readers import SPECIAL_IDS, make_tokenizer
from data_scripts.prepare_sda import main as prepare_sda
from tests.helpers.dad import load_config
from tests.helpers.dad_readers import (
    draw_person,
    files_of,
    finish_earlier,
    make_sources,
    run,
    run_forked,
    run_jobs,
    write_config,
    write_generated,
    write_stage,
)
from tests.helpers.sources import read_set


MAN, SHIRT, SHOES = [0.5, 0.5, 0.6, 0.9], [0.5, 0.35, 0.5, 0.3], [0.5, 0.9, 0.4, 0.1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("ground"), ("grounding", "detector", "clip"))


def found(boxes: list, scores: list) -> PhraseBoxes:
    scores = torch.tensor(scores)
    return PhraseBoxes(torch.tensor(boxes), scores, scores.amax(dim=1))


def choose(caption: str, boxes: list, scores: list, **settings) -> dict[str, list[float]]:
    regions = choose_regions(find_noun_phrases(caption), found(boxes, scores), GroundSection(**settings))
    return {region.phrase: region.box for region in regions}


def test_token_spans():
    #        a  black shirt .  red shoes .
    offsets = [(0, 0), (0, 1), (2, 7), (8, 13), (13, 14), (15, 18), (19, 24), (24, 25), (0, 0)]
    assert find_token_spans(["a black shirt", "red shoes"], offsets) == [[1, 2, 3], [5, 6]]
    with pytest.raises(ValueError, match="'red shoes' has no token"):
        find_token_spans(["a black shirt", "red shoes"], offsets[:4])


def test_each_phrase_takes_its_best_box_above_both_thresholds():
    scores = [[0.9, 0.1, 0.0], [0.2, 0.8, 0.1], [0.1, 0.3, 0.34]]
    assert choose("a man in a black shirt and red shoes", [MAN, SHIRT, SHOES], scores) == {
        "a man": MAN,
        "a black shirt": SHIRT,
    }
    lower = choose(
        "a man in a black shirt and red shoes", [MAN, SHIRT, SHOES], scores, text_threshold=0.3, box_threshold=0.3
    )
    assert lower["red shoes"] == SHOES
    only_box = choose("a man in a black shirt and red shoes", [MAN, SHIRT, SHOES], scores, text_threshold=0.3)
    assert "red shoes" not in only_box  # 0.34 is the box's best score of all


def test_of_two_phrases_in_one_box_the_more_specific_garment_keeps_it():
    boxes, scores = [SHIRT, [0.5, 0.35, 0.5, 0.31]], [[0.9, 0.6], [0.85, 0.5]]
    assert choose("an outfit, a black jacket", boxes, scores) == {"a black jacket": SHIRT}
    assert choose("a jacket, a black jacket", boxes, scores) == {"a black jacket": SHIRT}
    with_other = choose("an outfit, a black jacket", [SHIRT, MAN], [[0.9, 0.6], [0.5, 0.1]])
    assert with_other == {"an outfit": MAN, "a black jacket": SHIRT}  # its next best


def test_the_person_is_never_dropped():
    assert choose("a man in a long coat", [MAN], [[0.5, 0.9]]) == {"a man": MAN, "a long coat": MAN}
    assert choose("a man next to a woman", [MAN], [[0.5, 0.9]]) == {"a man": MAN}


def test_small_boxes_and_weaker_overlapping_ones_are_left_out():
    thin = [0.5, 0.5, 0.01, 0.5]
    assert choose("a hat", [thin], [[0.9]]) == {}
    assert choose("a hat", [thin], [[0.9]], min_box_side=0.005) == {"a hat": thin}
    moved = [0.52, 0.35, 0.5, 0.3]
    # Either is the other's twin: the one that a phrase likes less is suppressed, and the phrase behind goes without.
    assert choose("a shirt, a t-shirt", [SHIRT, moved], [[0.9, 0.8], [0.8, 0.9]]) == {"a shirt": SHIRT}
    assert choose("a hat", [MAN, SHIRT], [[0.4], [0.6]]) == {"a hat": SHIRT}


def test_scores_are_those_of_the_tokens_in_the_logits(root):
    """The same from the model's own output, phrase by phrase, by hand."""
    detector = PhraseDetector(str(root / "readers/grounding"), "ground.model")
    phrases = [["A man", "a black shirt"], ["red shoes"]]
    images = [draw_person(0), draw_person(1)]
    results = detector(images, phrases)
    processor = AutoProcessor.from_pretrained(root / "readers/grounding")
    model = GroundingDinoForObjectDetection.from_pretrained(root / "readers/grounding").eval()
    texts = ["a man. a black shirt.", "red shoes."]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert set(SPECIAL_IDS.values()) == set(model.model.special_tokens.tolist())
    words = [processor.tokenizer.convert_ids_to_tokens(ids) for ids in inputs["input_ids"].tolist()]
    assert words[0] == ["[CLS]", "a", "man", ".", "a", "black", "shirt", ".", "[SEP]"]
    probabilities = logits.sigmoid()
    expected = torch.stack([probabilities[0, :, 1:3].amax(1), probabilities[0, :, 4:7].amax(1)], dim=1)
    torch.testing.assert_close(results[0].scores, expected)
    torch.testing.assert_close(results[0].best, probabilities[0].amax(dim=1))
    last = 1 + len(processor.tokenizer.tokenize("red shoes"))
    torch.testing.assert_close(results[1].scores[:, 0], probabilities[1, :, 1:last].amax(dim=1))
    assert results[0].scores.std() > 0.001


def test_owl_models_score_texts_and_see_a_square(tmp_path):
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    text = layers | {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "pad_token_id": 0}
    text |= {"bos_token_id": 101, "eos_token_id": 102}
    config = Owlv2Config(
        vision_config=layers | {"image_size": 32, "patch_size": 16}, text_config=text, projection_dim=16
    )
    Owlv2ForObjectDetection(config).save_pretrained(tmp_path)
    tokenizer.model_max_length = 8
    processor = Owlv2Processor(Owlv2ImageProcessor(size={"height": 32, "width": 32}), tokenizer)
    processor.save_pretrained(tmp_path)
    detector = PhraseDetector(str(tmp_path), "ground.model")
    phrases = [["a man", "a black shirt"], ["red shoes"]]
    results = detector([draw_person(0), draw_person(1)], phrases)
    assert [result.scores.shape for result in results] == [(4, 2), (4, 1)]
    inputs = processor(images=[draw_person(0)], text=[phrases[0]], return_tensors="pt", padding="max_length")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    torch.testing.assert_close(results[0].scores, outputs.logits.sigmoid()[0], atol=1e-5, rtol=1e-4)
    official = processor.post_process_grounded_object_detection(outputs, threshold=0.0, target_sizes=[(64, 32)])[0]
    edges = official["boxes"] / torch.tensor([32, 64, 32, 64])
    centre, size = results[0].boxes.split(2, dim=1)
    torch.testing.assert_close(
        torch.cat([centre - size / 2, centre + size / 2], dim=1), edges.clamp(0, 1), atol=1e-4, rtol=1e-4
    )


def test_person_detectors_of_both_kinds(root):
    images = [draw_person(0), draw_person(1)]
    for name in ("detector", "grounding"):
        persons = PersonDetector(str(root / "readers" / name))(images)
        assert len(persons) == 2
        for score, cx, cy, width, height in (row for own in persons for row in own):
            assert 0.1 <= score <= 1 and cx - width / 2 + 1e-3 >= 0 and cy + height / 2 <= 1.001


CAPTIONS = [
    "a man in a red shirt",
    "a woman with black hair and blue jeans",
    "",
    "standing",
    "a person wearing a coat and shoes",
]


def prepare(root, name, number=13, first=4995, **ground):
    """Finished stages before grounding, prompts on both sides of a shard's border."""
    path = write_config(root, name, ground=ground)
    config = load_config(str(path))
    generated = write_generated(config, {first + row: draw_person(row) for row in range(number)})
    work = root / name
    write_stage(config, "filter", work / "filter/kept.jsonl", generated)
    rows = []
    for place, row in enumerate(generated):
        caption = CAPTIONS[place % len(CAPTIONS)]
        rows.append(
            {"file_path": row["file_path"], "caption": caption, "raw_caption": caption, "prompt_id": row["prompt_id"]}
        )
    write_stage(config, "caption", work / "captions/captions.jsonl", rows)
    return path, rows


def test_annotations_are_read_by_prepare_sda(root):
    path, captions = prepare(root, "sda")
    run(path, "ground")
    folder = root / "sda" / "sda"
    assert sorted(file.name for file in folder.iterdir()) == ["sda_0_5000.json", "sda_5000_10000.json"]
    rows = [row for file in sorted(folder.iterdir()) for row in json.loads(file.read_text())]
    with_caption = [row for row in captions if row["caption"]]
    assert [(row["image"], row["caption"], row["image_id"]) for row in rows] == [
        (image_path(row["prompt_id"]), row["caption"], row["prompt_id"]) for row in with_caption
    ]
    assert rows[0].keys() == {"image", "caption", "image_id", "boxes", "logits", "phrases"}
    assert rows[0]["phrases"] == ["a man", "a red shirt"] and rows[2]["boxes"] == []
    prepare_sda(["--annotations", str(folder), "--images", str(root / "sda/images"), "--output", str(root / "arrow")])
    prepared = read_set(root / "arrow")["train"]
    assert [row["caption"] for row in prepared] == [row["caption"] for row in with_caption]
    assert len(prepared[0]["boxes"]) == 2
    manifest = json.loads((root / "sda/grounding/manifest.json").read_text())
    boxes = sum(len(row["boxes"]) for row in rows)
    assert manifest["finished"] == {"images": len(rows), "boxes": boxes, "without_caption": len(captions) - len(rows)}


def test_killed_jobs_apart_and_two_processes_give_the_same_files(root):
    results = {}
    for name in ("whole", "killed", "jobs", "two"):
        path, _ = prepare(root, name)
        if name == "whole":
            run(path, "ground")
        elif name == "jobs":
            run_jobs(path, "ground")
        elif name == "killed":
            assert run_forked(path, "ground", kill_after=1) == [-9]
            assert not (root / name / "sda").exists()
            assert run_forked(path, "ground") == [0]
        else:
            assert run_forked(path, "ground", num_processes=2) == [0, 0]
        results[name] = files_of(root / name / "sda"), files_of(root / name / "grounding")
    assert len(results["whole"][0]) == 2
    assert all(result == results["whole"] for result in results.values())


def test_high_thresholds_leave_images_without_boxes(root):
    path, _ = prepare(root, "strict", number=3, box_threshold=1.0)
    run(path, "ground")
    (file,) = (root / "strict/sda").iterdir()
    assert file.name == "sda_0_5000.json" and all(row["boxes"] == [] for row in json.loads(file.read_text()))


def test_what_cannot_ground_is_refused(root):
    for model, message in (
        (None, r"`ground\.model` must be"),
        (str(root / "readers/clip"), r"ground\.model.*clip.*cannot be loaded"),
    ):
        path = write_config(root, "refused", ground={"model": model})
        config = load_config(str(path))
        if not (root / "refused/captions").exists():
            finish_earlier(config, "train", "augment", "generate", "filter")
            write_stage(config, "caption", root / "refused/captions/captions.jsonl", [])
        with pytest.raises(ValueError, match=message):
            run(path, "ground")
