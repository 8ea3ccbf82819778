"""Score every generated image and keep those of one person that look like the target dataset.

    python -m data_scripts.dad.filter --config recipes/dad/cuhk.yaml

writes scores, thresholds, kept and dropped images, and a report with a contact sheet to `WORK/filter`. Cheap checks run first;
models, if any are given, check the remaining images. The paper drops 10.63% of its images with unpublished thresholds;
nothing here is tuned to that number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image

from data_scripts.dad.command import run_stage
from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.detectors import PersonDetector
from data_scripts.dad.filter_rules import (
    CALIBRATED,
    CHECKS,
    Decision,
    calibrate,
    cheap_reasons,
    decide,
    describe_limits,
)
from data_scripts.dad.image_checks import load_image, measure_image, perceptual_hash
from data_scripts.dad.json_files import read_json, to_lines, write_json
from data_scripts.dad.reading import DTYPES, choose_rows, open_generated, read_batches
from data_scripts.dad.sections import FilterSection
from data_scripts.dad.stage_folders import Stage, begin_stage, device_of, read_stage_rows
from data_scripts.dad.target_set import load_target, read_target
from data_scripts.dad.text_scores import TextScorer
from mra.common.cards import markdown_table
from mra.common.drawing import CONTACT_SHEET, Tile, TileRow, draw_sheet, save_picture
from mra.common.files import write_whole
from mra.common.sharding import cut_batches


PUBLISHED_SHARE = "10.63%"
_SHEET_PICTURES = 6  # per reason


def run(config: FactoryConfig) -> None:
    """Score the remaining images; decide and report when all are scored."""
    section = config.filter
    stage = begin_stage(config, "filter")
    if stage.is_finished:
        return
    scorer = _Scorer(section, stage)
    thresholds = _calibrate(config, stage, scorer)
    rows = read_stage_rows(stage.work.generated)

    def score(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return scorer.score_batch(batch, thresholds)

    if read_batches(stage, stage.work.scores, rows, section.batch_size, score):
        scores = read_stage_rows(stage.work.scores)
        decision = decide(scores, thresholds, section)
        if stage.state.is_main_process:
            _write_decision(stage, rows, scores, thresholds, decision, section)
        stage.state.wait_for_everyone()
        if not decision.kept():
            raise ValueError(
                f"none of {len(rows):,} images passed; {stage.folder / 'report.md'} says why; set wider limits "
                f"(`filter.min_…`) and remove {stage.folder}, or generate better images."
            )
        stage.finish(images=len(rows), kept=len(decision.kept()))


class _Scorer:
    """Scorer of images with all checks."""

    def __init__(self, section: FilterSection, stage: Stage) -> None:
        self.section = section
        self.images = stage.work.images
        options = {"dtype": DTYPES[section.dtype], "device": device_of(stage.state)}
        self._find_persons = PersonDetector(section.person_model, **options) if section.person_model else None
        self._score_texts = TextScorer(section.score_model, **options) if section.score_model else None

    def persons(self, images: list) -> Sequence[list | None]:
        """Return the people in each image, or None without a model."""
        return self._find_persons(images) if self._find_persons and images else [None] * len(images)

    def text_scores(self, images: list, texts: list[str]) -> Sequence[float | None]:
        """Score how well each text matches its image, or None without a model."""
        return self._score_texts(images, texts) if self._score_texts and images else [None] * len(images)

    def score_batch(self, batch: list[dict[str, Any]], thresholds: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of scores.jsonl for rows of generated.jsonl."""
        rows, pictures = [], []
        for row in batch:
            scores = {"prompt_id": row["prompt_id"], "file_path": row["file_path"], "decodes": True}
            scores |= {"persons": None, "text_score": None}
            try:
                picture = load_image(self.images / row["file_path"])
            except OSError:
                open_generated(
                    self.images, row
                )  # raises for a missing or unreadable file, which is not a damaged image
                raise
            except ValueError:
                rows.append(scores | {"decodes": False})
                continue
            scores |= {**measure_image(picture), "hash": perceptual_hash(picture)}
            rows.append(scores)
            if not cheap_reasons(scores, thresholds, self.section):
                pictures.append((scores, picture, row["prompt"]))
        images, texts = [picture for _, picture, _ in pictures], [text for _, _, text in pictures]
        results = zip(pictures, self.persons(images), self.text_scores(images, texts), strict=True)
        for (scores, _, _), persons, text_score in results:
            scores |= {"persons": persons, "text_score": text_score}
        return rows


def _calibrate(config: FactoryConfig, stage: Stage, scorer: _Scorer) -> dict[str, Any]:
    """Return the thresholds, from the target's training images on the first run, later from thresholds.json."""
    section, path = config.filter, stage.work.thresholds
    if stage.state.is_main_process and not path.exists():
        dataset = load_target(config.common.dataset)
        places = choose_rows(len(dataset), section.calibration_images, config.common.seed, "calibration")
        write_json(path, calibrate(_measure_target(dataset.select(places), scorer, section), section))
    stage.state.wait_for_everyone()
    return read_json(path)


def _measure_target(dataset: Dataset, scorer: _Scorer, section: FilterSection) -> list[dict[str, Any]]:
    rows = []
    for batch in cut_batches(len(dataset), section.batch_size):
        examples = [read_target(dataset, place) for place in batch]
        pictures = [example["image"] for example in examples]
        texts = [example["captions"][0] for example in examples]
        for picture, score in zip(pictures, scorer.text_scores(pictures, texts), strict=True):
            rows.append(measure_image(picture) | {"text_score": score})
    return rows


# Decision


def _write_decision(
    stage: Stage,
    rows: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    thresholds: dict[str, Any],
    decision: Decision,
    section: FilterSection,
) -> None:
    dropped = [
        {
            "prompt_id": scores[place]["prompt_id"],
            "file_path": scores[place]["file_path"],
            "reasons": reasons,
            "looks_like": scores[decision.look_alikes[place]]["prompt_id"] if place in decision.look_alikes else None,
        }
        for place, reasons in enumerate(decision.reasons)
        if reasons
    ]
    summary = summarise(decision, scores, thresholds, section)
    sheet = _draw_dropped(stage, rows, scores, decision, section)
    write_whole(stage.folder / "dropped.jsonl", to_lines(dropped))
    write_json(stage.folder / "report.json", summary)
    write_whole(stage.folder / "report.md", describe(summary, has_sheet=sheet is not None))
    if sheet is not None:
        save_picture(sheet, stage.folder / "dropped.jpg")
    write_whole(stage.work.kept, to_lines(rows[place] for place in decision.kept()))


def summarise(
    decision: Decision, scores: list[dict], thresholds: dict[str, Any], section: FilterSection
) -> dict[str, Any]:
    """Return the filter's counts for `report.json`."""
    limits = describe_limits(thresholds, section)
    first, any_of = decision.count(first=True), decision.count(first=False)
    with_persons = sum(row["persons"] is not None for row in scores)
    with_text = sum(row["text_score"] is not None for row in scores)
    looked_at = {"person": with_persons, "text score": with_text}
    looked_at["near-duplicate"] = len(decision.kept()) + any_of["near-duplicate"]
    checks = {}
    for check in CHECKS:
        decoded = len(scores) if check == "does not decode" else sum(row["decodes"] for row in scores)
        checks[check] = {
            "limit": limits.get(check),
            "looked_at": looked_at.get(check, decoded),
            "first_reason": first[check],
            "any_reason": any_of[check],
        }
    return {
        "images": len(scores),
        "kept": len(decision.kept()),
        "target_images": thresholds["target_images"],
        "checks": checks,
    }


def describe(summary: dict[str, Any], has_sheet: bool = True) -> str:
    """Return the report in Markdown."""
    images, kept = summary["images"], summary["kept"]
    share = f"{kept / images:.2%}" if images else "none"
    lines = [
        "# What was kept",
        "",
        f"{kept:,} of {images:,} images were kept ({share}); {images - kept:,} were dropped. The paper dropped "
        f"{PUBLISHED_SHARE} of its images, with unpublished thresholds.",
        "",
        f"Limits come from {summary['target_images']:,} images of the target dataset unless the configuration sets them. "
        "Models check only images that passed all earlier checks.",
        "",
    ]
    rows = [
        [check, counts["limit"] or "", *(f"{counts[name]:,}" for name in ("looked_at", "first_reason", "any_reason"))]
        for check, counts in summary["checks"].items()
    ]
    lines.append(markdown_table(["check", "limit", "looked at", "first reason", "any reason"], rows, text_columns=2))
    return "\n".join([*lines, "", *(["![Dropped images by reason](dropped.jpg)", ""] if has_sheet else [])])


def _draw_dropped(
    stage: Stage,
    rows: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    decision: Decision,
    section: FilterSection,
) -> Image.Image | None:
    sheet: list[TileRow] = []
    for check in CHECKS:
        places = [place for place, reasons in enumerate(decision.reasons) if reasons[:1] == [check]]
        if places and check != "does not decode":
            chosen = np.linspace(0, len(places) - 1, min(_SHEET_PICTURES, len(places))).astype(int)
            tiles = [
                Tile(
                    open_generated(stage.work.images, rows[places[number]]),
                    _label(check, places[number], scores, decision, section),
                )
                for number in chosen
            ]
            sheet.append(TileRow(tiles, f"{check}: {len(places):,}"))
    return draw_sheet(sheet, CONTACT_SHEET, "Dropped images, by first reason") if sheet else None


def _label(check: str, place: int, scores: list[dict], decision: Decision, section: FilterSection) -> str:
    """Return the prompt's number and the score for which an image was dropped."""
    row = scores[place]
    if check in CALIBRATED:
        why = f"{row[CALIBRATED[check][0]]:.4g}"
    elif check == "near-duplicate":
        why = f"like {scores[decision.look_alikes[place]]['prompt_id']}"
    elif check == "person":
        heights = [height for score, _, _, _, height in row["persons"] if score >= section.person_threshold]
        why = f"{heights[0]:.0%} high" if len(heights) == 1 else f"{len(heights)} found"
    else:
        why = f"{row['width']} x {row['height']}"
    return f"{row['prompt_id']}: {why}"


def main(argv: list[str] | None = None) -> None:
    """Run this stage alone."""
    run_stage("data_scripts.dad.filter", run, __doc__, ("filter",), argv)


if __name__ == "__main__":
    main()
