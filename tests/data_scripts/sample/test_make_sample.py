"""Tests of `data_scripts/make_sample.py` and the tokenizer that is shipped with it."""

import json
import random
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoTokenizer

from data_scripts import make_sample as module
from data_scripts.make_sample import make_sample
from data_scripts.sample.captions import MAX_WORDS, MIN_WORDS
from data_scripts.sample.people import CAMERAS, NAMED_ATTRIBUTES, VIEWS, draw_identities, draw_scene
from data_scripts.sample.plan import SampleConfig, plan_pedes, plan_sda
from data_scripts.sample.scenes import render


ROOT = Path(__file__).resolve().parents[3]
TOKENIZER = ROOT / "data_scripts" / "sample" / "tokenizer"
TINY = SampleConfig(sda_pairs=30, sda_shard_size=12, train_ids=5, val_ids=2, test_ids=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("sample") / "set"
    assert make_sample(output, TINY)
    return output


@pytest.fixture(scope="module")
def pedes():
    return plan_pedes(SampleConfig(sda_pairs=0, train_ids=600, val_ids=100))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Layouts


def test_sda_shards(folder):
    shards = sorted(path.name for path in (folder / "sda").iterdir())
    assert shards == ["sda_0_12.json", "sda_12_24.json", "sda_24_36.json"]
    rows = [row for name in shards for row in read(folder / "sda" / name)]
    assert len(rows) == TINY.sda_pairs
    assert len({row["image"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"image", "boxes", "logits", "phrases", "caption", "image_id"}
        start = row["image_id"] // 12 * 12
        assert row["image"].startswith(f"c_{start}_{start + 12}/{row['image_id']}_")
        with Image.open(folder / "images" / "SDA" / row["image"]) as image:
            assert image.format == "JPEG" and 48 <= image.width <= 80 and 110 <= image.height <= 180
        assert len(row["boxes"]) == len(row["logits"]) == len(row["phrases"])
        assert all(phrase in row["caption"] for phrase in row["phrases"])
        assert all(0.35 <= logit <= 0.9 for logit in row["logits"])
        for cx, cy, w, h in row["boxes"]:
            assert w > 0 and h > 0 and cx - w / 2 > 0 and cy - h / 2 > 0 and cx + w / 2 < 1 and cy + h / 2 < 1
            assert all(round(value, 4) == value for value in (cx, cy, w, h))


def test_pedes_official_and_processed_agree(folder):
    official = read(folder / "pedes" / "reid_raw.json")
    images = folder / "images"
    by_split = defaultdict(list)
    for row in official:
        assert set(row) == {"split", "captions", "file_path", "id", "processed_tokens"}
        assert len(row["captions"]) == len(row["processed_tokens"]) == 2
        assert row["processed_tokens"][0][:1] == row["captions"][0].lower().split()[:1]
        by_split[row["split"]].append(row)
        with Image.open(images / "CUHK-PEDES" / "imgs" / row["file_path"]) as image:
            assert image.format == {"jpg": "JPEG", "png": "PNG", "bmp": "BMP"}[row["file_path"].rsplit(".")[-1]]
            image.load()
    ids = {split: {row["id"] for row in rows} for split, rows in by_split.items()}
    assert [sorted(ids[split]) for split in ("train", "val", "test")] == [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]
    for split, rows in by_split.items():
        processed = read(folder / "finetune" / f"cuhk_{split}.json")
        assert all(set(row) == {"image", "caption", "image_id"} for row in processed)
        prefix = "CUHK-PEDES/imgs/"
        expected = [(prefix + row["file_path"], row["captions"], row["id"]) for row in rows]
        if split == "train":
            expected = [(image, text, number) for image, texts, number in expected for text in texts]
        assert [(row["image"], row["caption"], row["image_id"]) for row in processed] == expected


def test_extensions_and_sizes_vary_as_in_the_real_set(pedes):
    extensions = Counter(crop.path.rsplit(".")[-1] for crop in pedes)
    assert extensions["jpg"] > 0.8 * len(pedes) and extensions["png"] > 20 and extensions["bmp"] > 20
    assert len({crop.scene.size for crop in pedes}) > 100


# Who is drawn, and what is said


def test_identities_of_a_split_differ_and_many_in_one_attribute_only(pedes):
    people = {crop.image_id: (crop.split, crop.person.attributes) for crop in pedes}
    assert len(people) == 900 and sorted(people) == list(range(1, 901))
    for split in ("train", "val", "test"):
        told = [attributes for name, attributes in people.values() if name == split]
        assert len(set(told)) == len(told)
        twins = sum(any(differences(a, b) == 1 for b in told) for a in told)
        assert twins > 1.5 * SampleConfig().twin_share * len(told)  # a twin drawn makes two people alike


def differences(first, second):
    """Counts the attributes in which two people differ; a thing and its colour come and go as one."""
    names = {name for name, a, b in zip(NAMED_ATTRIBUTES, first, second, strict=True) if a != b}
    for thing, colour in (("bag", "bag_colour"), ("hat", "hat_colour"), ("pattern", "pattern_colour")):
        if thing in names:
            names.discard(colour)
    return len(names)


def test_cameras_and_views_are_spread_within_each_identity(pedes):
    by_identity = defaultdict(list)
    for crop in pedes:
        by_identity[crop.image_id].append(crop)
        assert f"/imgs/{crop.scene.camera}/" in crop.path
    for crops in by_identity.values():
        assert 3 <= len(crops) <= 5
        assert len({crop.scene.camera for crop in crops}) == len(crops)
        assert {crop.scene.view for crop in crops} == set(VIEWS)
    shares = Counter(crop.scene.camera for crop in pedes if crop.split == "test")
    assert set(shares) == set(CAMERAS) and min(shares.values()) > 0.7 * max(shares.values())


def test_captions_are_varied_and_tell_only_what_is_seen(pedes):
    texts = [caption.text for crop in pedes for caption in crop.captions]
    lengths = [len(text.split()) for text in texts]
    assert min(lengths) >= MIN_WORDS and max(lengths) <= MAX_WORDS
    assert len(set(texts)) > 0.95 * len(texts)
    for crop in pedes:
        first, second = crop.captions
        assert first.text != second.text
        for caption in crop.captions:
            assert len(caption.facts) >= 6
            for attribute, values in caption.facts.items():
                assert getattr(crop.person, attribute) in values
            if not crop.scene.shoes_visible:
                assert "shoes" not in caption.phrases
            if crop.scene.view != "front":
                assert caption.facts.get("pattern") != {"logo"}
            if crop.scene.view == "back":
                assert "inner_colour" not in caption.facts
            assert not any(word in caption.text for word in ("camera", "None", "  ", " ."))


def test_captions_decide_between_people_but_not_always(pedes):
    crops = [crop for crop in pedes if crop.split == "test"][:400]
    people = {crop.image_id: crop.person for crop in crops}
    shares = []
    for crop in crops:
        for caption in crop.captions:
            scores = {
                number: sum(getattr(person, name) in values for name, values in caption.facts.items())
                for number, person in people.items()
            }
            best = max(scores.values())
            tied = sum(score == best for score in scores.values())
            shares.append((scores[crop.image_id] == best) / tied)
    assert 0.85 < sum(shares) / len(shares) < 0.99


def test_sda_has_boxes_for_nearly_all_and_two_pictures_for_some():
    crops = plan_sda(SampleConfig(sda_pairs=5000))
    assert len(crops) == 5000
    pictures = Counter(crop.image_id for crop in crops)
    assert set(pictures.values()) == {1, 2}
    everything = (0.2, 0.2, 0.8, 0.8)
    for crop in crops:
        crop.parts = dict.fromkeys(("person", "upper", "lower", "shoes", "bag", "hat", "hair"), everything)
    empty = sum(not module.sda_row(crop)["boxes"] for crop in crops)
    assert 20 <= empty <= 90


def test_boxes_lie_on_what_they_name():
    config = SampleConfig(sda_pairs=0, train_ids=20, val_ids=0, test_ids=0)
    for crop in plan_pedes(config):
        image, parts = render(crop.person, crop.scene)
        assert image.size == crop.scene.size and image.mode == "RGB"
        assert {"person", "upper"} <= set(parts) <= {"person", "upper", "lower", "shoes", "bag", "hat", "hair"}
        assert ("lower" in parts) == (crop.person.lower is not None)
        assert ("hat" in parts) == (crop.person.hat is not None)
        assert ("shoes" in parts) == crop.scene.shoes_visible
        person = parts["person"]
        for left, top, right, bottom in parts.values():
            assert left >= person[0] - 0.03 and top >= person[1] - 0.03
            assert right <= person[2] + 0.03 and bottom <= person[3] + 0.03
        if "shoes" in parts:
            assert parts["upper"][1] < parts["shoes"][1] and parts["upper"][3] < parts["shoes"][3]


def test_clothes_show_in_their_colour():
    person = draw_identities(random.Random(3), 1, 0.0)[0]
    for colour, strongest in (("red", 0), ("green", 1), ("blue", 2)):
        dressed = replace(person, upper="t-shirt", upper_colour=colour, pattern="plain", inner_colour=None, bag=None)
        scene = draw_scene(random.Random(1), dressed, view="front", camera=None, seed="x")
        image, parts = render(dressed, scene)
        left, top, right, bottom = parts["upper"]
        pixel = image.getpixel(
            (round((left + right) / 2 * image.width), round((0.4 * top + 0.6 * bottom) * image.height))
        )
        assert pixel.index(max(pixel)) == strongest


# Determinism, and all or nothing


def test_same_arguments_give_the_same_bytes_with_any_number_of_processes(folder, tmp_path):
    assert make_sample(tmp_path / "two", TINY, num_proc=2)
    assert contents(tmp_path / "two") == contents(folder)
    other = SampleConfig(**{**vars(TINY), "seed": 1})
    assert plan_pedes(other)[0].captions[0].text != plan_pedes(TINY)[0].captions[0].text


def test_interrupted_run_leaves_nothing_and_the_next_one_works(tmp_path, monkeypatch):
    config = SampleConfig(sda_pairs=4, train_ids=0, val_ids=0, test_ids=0)
    stale = tmp_path / ".unfinished-0-set"
    stale.mkdir()
    (stale / "rubbish").touch()
    drawn = []

    def draw_three(*arguments):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(arguments)
        return render(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "render", draw_three)
        with pytest.raises(KeyboardInterrupt):
            make_sample(tmp_path / "set", config)
    assert list(tmp_path.iterdir()) == []
    assert make_sample(tmp_path / "set", config)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert not (tmp_path / "set" / "pedes").exists()


def test_existing_output(folder, tmp_path):
    before = contents(folder)
    assert make_sample(folder, TINY) is False
    other = SampleConfig(sda_pairs=2, train_ids=0, val_ids=0, test_ids=0)
    with pytest.raises(ValueError, match=r"was made with .*'sda_pairs': 30.*--overwrite"):
        make_sample(folder, other)
    assert contents(folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sample.json").write_text("not JSON")
    with pytest.raises(ValueError, match="is not a sample set"):
        make_sample(tmp_path / "mine", other)
    assert make_sample(tmp_path / "mine", other, overwrite=True)
    assert read(tmp_path / "mine" / "sample.json")["images"]["sda"] == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_ids": -1}, "`train_ids` must be 0 or more, got -1"),
        ({"images_per_id": 9}, r"`images_per_id` must lie in 2\.\.5, got 9"),
        ({"twin_share": 1.0}, "`twin_share` must lie in"),
        ({"sda_shard_size": 0}, "`sda_shard_size` must be 1 or more"),
        ({"sda_pairs": 0, "train_ids": 0, "val_ids": 0, "test_ids": 0}, "would be empty"),
    ],
)
def test_bad_configuration_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SampleConfig(**wrong)


def test_bad_number_of_processes_is_named(tmp_path):
    with pytest.raises(ValueError, match="`num_proc` must be 1 or more, got 0"):
        make_sample(tmp_path / "set", TINY, num_proc=0)


@pytest.mark.parametrize("start", [["-m", "data_scripts.make_sample"], ["data_scripts/make_sample.py"]])
def test_command_line(start, tmp_path):
    sizes = ["--sda_pairs", "3", "--train_ids", "2", "--val_ids", "1", "--test_ids", "1", "--num_proc", "2"]
    command = [sys.executable, *start, "--output", str(tmp_path / "set"), *sizes]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert "sda 3 images" in first.stdout
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "already holds this sample set" in again.stdout
    wrong = subprocess.run([*command, "--seed", "4"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode != 0 and "--overwrite" in wrong.stderr and "Traceback" not in wrong.stderr


# Tokenizer


def test_shipped_tokenizer_is_what_the_command_gives(tmp_path):
    size = module.train_tokenizer(tmp_path)
    assert size == len((TOKENIZER / "vocab.txt").read_text().split())
    assert (tmp_path / "vocab.txt").read_text() == (TOKENIZER / "vocab.txt").read_text()
    assert set(contents(tmp_path)) == set(contents(TOKENIZER))


def test_shipped_tokenizer_knows_the_captions(pedes):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    assert tokenizer.is_fast
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.model_max_length) == (0, 4, 512)
    texts = [caption.text for crop in pedes if crop.split == "test" for caption in crop.captions]
    encoded = tokenizer(texts)["input_ids"]
    assert not any(tokenizer.unk_token_id in ids for ids in encoded)
    assert max(map(len, encoded)) <= 56
    assert tokenizer.decode(encoded[0], skip_special_tokens=True).replace(" ", "") == texts[0].lower().replace(" ", "")
    unseen = tokenizer("A Wizard's umbrella, 27 zebras & quartz; attire")["input_ids"]
    assert tokenizer.unk_token_id not in unseen
    assert tokenizer.tokenize("BACKPACK") == ["backpack"]
