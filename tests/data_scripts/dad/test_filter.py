import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_scripts.dad import filter as filter_stage
from data_scripts.dad.filter_rules import calibrate, cheap_reasons, decide
from data_scripts.dad.sections import FilterSection
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
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("filter"), ("detector", "clip"))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored(prompt_id: int, look: str | None = None, **changes) -> dict:
    """A row of scores.jsonl that passes everything; `look` tells hashes apart."""
    rng = np.random.default_rng(prompt_id if look is None else sum(map(ord, look)) + 10_000)
    row = {"prompt_id": prompt_id, "file_path": f"{prompt_id}.jpg", "decodes": True, "width": 100, "height": 200}
    row |= {"contrast": 50.0, "colour": 500.0, "sharpness": 300.0, "detail": 2000, "persons": None, "text_score": None}
    return row | {"hash": rng.integers(0, 256, 128, dtype=np.uint8).tobytes().hex()} | changes


TARGET = [
    {"contrast": v, "colour": 10 * v, "sharpness": v, "detail": 40 * v, "text_score": v / 100} for v in range(101)
]


def test_thresholds_are_quantiles_of_the_target():
    thresholds = calibrate(TARGET, FilterSection(quantile=0.05))
    limits = {check: (limit["side"], limit["value"]) for check, limit in thresholds["limits"].items()}
    assert limits == {
        "flat": ("at least", 5),
        "greyscale": ("at least", 50),
        "blurred": ("at least", 5),
        "little detail": ("at least", 200),
        "much detail": ("at most", 3800),
        "text score": ("at least", 0.05),
    }
    assert thresholds["target_images"] == 101 and thresholds["target_quantiles"]["contrast"]["0.5"] == 50


def test_given_limits_overrule_the_quantiles_and_no_model_sets_none():
    target = [{**row, "text_score": None} for row in TARGET]
    limits = calibrate(target, FilterSection(min_contrast=33))["limits"]
    assert limits["flat"]["value"] == 33 and limits["flat"]["source"] == "filter.min_contrast"
    assert "text score" not in limits
    assert calibrate(target, FilterSection(min_score=0.2))["limits"]["text score"]["value"] == 0.2


def test_first_and_any_reason():
    section = FilterSection(quantile=0.05)
    thresholds = calibrate(TARGET, section)
    rows = [
        scored(0),
        scored(1, decodes=False),
        scored(2, height=20, contrast=1.0),
        scored(3, contrast=4.9, colour=49.0, sharpness=4.9),
        scored(4, contrast=5.0, colour=50.0, sharpness=5.0, detail=200),  # right at the limits
        scored(5, detail=3801),
        scored(6, text_score=0.04, persons=[]),
    ]
    decision = decide(rows, thresholds, section)
    assert decision.reasons == [
        [],
        ["does not decode"],
        ["too small", "flat"],
        ["flat", "greyscale", "blurred"],
        [],
        ["much detail"],
        ["person", "text score"],
    ]
    assert decision.kept() == [0, 4]
    assert decision.count(first=True)["flat"] == 1 and decision.count(first=False)["flat"] == 2


@pytest.mark.parametrize(
    ("persons", "kept"),
    [
        ([[0.9, 0.5, 0.5, 0.4, 0.8]], True),
        ([[0.9, 0.5, 0.5, 0.4, 0.8], [0.4, 0.1, 0.5, 0.1, 0.2]], True),  # the second is no sure person
        ([[0.9, 0.5, 0.5, 0.4, 0.8], [0.6, 0.1, 0.5, 0.1, 0.2]], False),
        ([[0.9, 0.5, 0.5, 0.4, 0.3]], False),  # too small
        ([], False),
        (None, True),  # nobody looked
    ],
)
def test_exactly_one_person_that_is_large_enough(persons, kept):
    section = FilterSection(min_person_height=0.5, person_threshold=0.5)
    decision = decide([scored(0, persons=persons)], calibrate(TARGET, section), section)
    assert (decision.reasons == [[]]) == kept


def test_of_near_duplicates_the_first_that_passes_is_kept():
    section = FilterSection()
    rows = [scored(0, "a", contrast=0.0), scored(1, "a"), scored(2, "b"), scored(3, "a"), scored(4, "a")]
    decision = decide(rows, calibrate(TARGET, section), section)
    assert decision.kept() == [1, 2]
    assert decision.look_alikes == {3: 1, 4: 1}


LIMITS = {"min_contrast": 5, "min_colour": 50, "min_sharpness": 50, "min_detail": 0, "max_detail": 100_000}


def pictures() -> dict[int, Image.Image | bytes]:
    """Good pictures, and by prompt: 3 cut off, 4 flat, 5 grey, 6 blurred, 7 small, 8 and 11 as 2."""
    images: dict = {number: draw_person(number) for number in range(14)}
    buffer = io.BytesIO()
    images[3].save(buffer, "JPEG")
    images[3] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
    images[4] = Image.new("RGB", (32, 64), (90, 120, 60))
    images[5] = images[5].convert("L").convert("RGB")
    images[6] = images[6].filter(ImageFilter.GaussianBlur(3))
    images[7] = images[7].resize((12, 24))
    images[8] = images[11] = images[2]
    return images


def test_stage_on_drawn_pictures(root):
    path = write_config(root, "drawn", filter=LIMITS)
    config = load_config(str(path))
    generated = write_generated(config, pictures())
    run(path, "filter")
    folder = root / "drawn" / "filter"
    reasons = {row["prompt_id"]: row["reasons"] for row in rows_of(folder / "dropped.jsonl")}
    assert {number: own[0] for number, own in reasons.items()} == {
        3: "does not decode",
        4: "flat",
        5: "greyscale",
        6: "blurred",
        7: "too small",
        8: "near-duplicate",
        11: "near-duplicate",
    }
    assert rows_of(folder / "kept.jsonl") == [row for row in generated if row["prompt_id"] not in reasons]
    scores = rows_of(folder / "scores.jsonl")
    assert [row["prompt_id"] for row in scores] == list(range(14)) and {"hash", "sharpness"} <= scores[0].keys()
    report = json.loads((folder / "report.json").read_text())
    assert (report["images"], report["kept"], report["target_images"]) == (14, 7, 24)
    assert report["checks"]["flat"]["first_reason"] == 1
    counts = {"looked_at": 9, "first_reason": 2, "any_reason": 2}
    assert report["checks"]["near-duplicate"] == {"limit": "more than 12 of 256 bits from all that are kept"} | counts
    text = (folder / "report.md").read_text()
    assert "7 of 14 images were kept (50.00%)" in text and "10.63%" in text and "(dropped.jpg)" in text
    with Image.open(folder / "dropped.jpg") as sheet:
        assert sheet.height > 6 * 256


def test_models_score_what_passed_the_cheap_checks(root):
    models = {"person_model": str(root / "readers/detector"), "score_model": str(root / "readers/clip")}
    path = write_config(root, "models", filter=models | LIMITS | {"quantile": 0.1, "person_threshold": 0.0})
    write_generated(load_config(str(path)), pictures())
    run(path, "filter")
    folder = root / "models" / "filter"
    scores = rows_of(folder / "scores.jsonl")
    thresholds = json.loads((folder / "thresholds.json").read_text())
    section = load_config(str(path)).filter
    for row in scores:
        passed = not cheap_reasons(row, thresholds, section)
        assert (row["persons"] is not None) == (row["text_score"] is not None) == passed
    assert thresholds["limits"]["text score"]["source"] == "quantile 0.1 of the target"
    texts = [row["text_score"] for row in scores if row["text_score"] is not None]
    assert len(texts) == 9 and len(set(texts)) > 5 and all(-1 <= score <= 1 for score in texts)


def test_killed_jobs_apart_and_two_processes_give_the_same_files(root):
    results = {}
    for name in ("whole", "killed", "jobs", "two"):
        path = write_config(root, name, filter={"score_model": str(root / "readers/clip")} | LIMITS)
        write_generated(load_config(str(path)), pictures())
        if name == "whole":
            run(path, "filter")
        elif name == "jobs":
            run_jobs(path, "filter")
        elif name == "killed":
            assert run_forked(path, "filter", kill_after=2) == [-9]
            assert not (root / name / "filter" / "kept.jsonl").exists()
            assert run_forked(path, "filter") == [0]
        else:
            assert run_forked(path, "filter", num_processes=2) == [0, 0]
        results[name] = files_of(root / name / "filter")
    assert results["whole"].keys() >= {"scores.jsonl", "thresholds.json", "kept.jsonl", "dropped.jsonl", "dropped.jpg"}
    assert 0 < len(rows_of(root / "whole" / "filter" / "kept.jsonl")) < 14
    assert all(result == results["whole"] for result in results.values())


def test_wrong_models_are_refused(root):
    for name, message in (
        ("clip", r"filter\.person_model.*clip.*cannot be loaded"),
        ("nowhere", r"filter\.person_model"),
    ):
        path = write_config(root, f"wrong_{name}", filter={"person_model": str(root / "readers" / name)})
        write_generated(load_config(str(path)), {0: draw_person(0)})
        with pytest.raises(ValueError, match=message):
            run(path, "filter")
    path = write_config(root, "wrong_score", filter={"score_model": str(root / "readers" / "detector")})
    write_generated(load_config(str(path)), {0: draw_person(0)})
    with pytest.raises(ValueError, match=r"filter\.score_model.*detector"):
        run(path, "filter")


def test_missing_file_is_an_error_not_a_broken_picture(root):
    path = write_config(root, "missing")
    write_generated(load_config(str(path)), {0: draw_person(0), 1: draw_person(1)})
    (root / "missing/images/c_0_5000/1.jpg").unlink()
    with pytest.raises(ValueError, match=r"c_0_5000/1\.jpg cannot be read"):
        run(path, "filter")


def test_a_filter_that_keeps_nothing_says_so_and_can_be_changed(root):
    path = write_config(root, "nothing", filter=LIMITS | {"min_sharpness": 1e9})
    write_generated(load_config(str(path)), {0: draw_person(0)})
    with pytest.raises(ValueError, match=r"none of 1 images passed; .*report\.md says why"):
        run(path, "filter")
    folder = root / "nothing" / "filter"
    assert (
        "| blurred | sharpness at least 1,000,000,000 (filter.min_sharpness) | 1 | 1 | 1 |"
        in (folder / "report.md").read_text()
    )
    shutil.rmtree(folder)
    run(write_config(root, "nothing", filter=LIMITS), "filter")
    assert len(rows_of(folder / "kept.jsonl")) == 1


def test_dropped_images_are_labelled_with_their_score():
    section = FilterSection(person_model="detr")
    crowd, low = [[0.9, 0.5, 0.5, 0.4, 0.8]] * 2, [[0.9, 0.5, 0.5, 0.2, 0.3], [0.2, 0.5, 0.5, 0.2, 0.3]]
    rows = [scored(0, "a"), scored(1, "a"), scored(2, colour=1.25), scored(3, height=20), scored(4, persons=crowd)]
    rows.append(scored(5, persons=low))
    decision = decide(rows, calibrate(TARGET, section), section)
    labels = [filter_stage._label(decision.reasons[row][0], row, rows, decision, section) for row in range(1, 6)]
    assert labels == ["1: like 0", "2: 1.25", "3: 100 x 20", "4: 2 found", "5: 30% high"]


def test_description_counts_every_check_and_names_its_limit():
    section = FilterSection(person_model="detr", min_height=100)
    thresholds = calibrate(TARGET, section)
    rows = [scored(0), scored(1, contrast=0.0, colour=0.0)]
    text = filter_stage.describe(filter_stage.summarise(decide(rows, thresholds, section), rows, thresholds, section))
    assert "| flat | contrast at least 1 (quantile 0.01 of the target) | 2 | 1 | 1 |" in text
    assert "| greyscale | colour at least 10 (quantile 0.01 of the target) | 2 | 0 | 1 |" in text
    assert "| much detail | detail at most 3,960 (quantile 0.99 of the target) | 2 | 0 | 0 |" in text
    assert "| too small | at least 64 x 100 pixels | 2 | 0 | 0 |" in text
    assert "| person | one of score 0.5 or more, 50% of the height or more | 0 | 0 | 0 |" in text
    assert "| text score | not checked: no filter.score_model | 0 | 0 | 0 |" in text
