"""Find the box of every noun phrase of the captions, and write annotations like those of SDA.

    python -m data_scripts.dad.ground --config recipes/dad/cuhk.yaml

writes `WORK/sda/sda_<start>_<stop>.json`, which `mra prepare sda` reads with `--images WORK/images`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.ops import box_convert, box_iou, nms

from data_scripts.dad.command import run_stage
from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.detectors import PhraseBoxes, PhraseDetector
from data_scripts.dad.language.noun_phrases import NounPhrase, find_noun_phrases, specificity
from data_scripts.dad.reading import DTYPES, open_generated, read_batches
from data_scripts.dad.sections import GroundSection
from data_scripts.dad.stage_folders import Stage, begin_stage, device_of, read_stage_rows, shard_name
from mra.common.arguments import require
from mra.common.files import write_whole


@dataclass(frozen=True)
class Region:
    """A phrase with its box (cx, cy, w, h in 0..1) and score."""

    phrase: str
    box: list[float]
    score: float


def run(config: FactoryConfig) -> None:
    """Ground the remaining images, and write the annotations when all are grounded."""
    section = config.ground
    require(section.model is not None, "ground.model", "a zero-shot detector's folder or Hub id", section.model)
    assert section.model is not None
    stage = begin_stage(config, "ground")
    if stage.is_finished:
        return
    captioned = read_stage_rows(stage.work.captions)
    rows = [row for row in captioned if row["caption"]]
    detector = PhraseDetector(section.model, "ground.model", DTYPES[section.dtype], device_of(stage.state))
    if not rows:
        raise ValueError(
            f"none of {len(captioned):,} images has a caption ({stage.work.captions}): name another `caption.model` or "
            f"`caption.prompt`, and remove {stage.work.captions.parent}"
        )

    def ground(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return _ground_batch(stage, detector, batch, section)

    if read_batches(stage, stage.work.regions, rows, section.batch_size, ground):
        regions = read_stage_rows(stage.work.regions)
        if stage.state.is_main_process:
            write_annotations(stage, regions)
        boxes = sum(len(row["boxes"]) for row in regions)
        stage.finish(images=len(rows), boxes=boxes, without_caption=len(captioned) - len(rows))


def write_annotations(stage: Stage, rows: Sequence[dict[str, Any]]) -> None:
    """Write annotations as SDA's JSON lists, one file per 5,000 prompts, replacing earlier ones."""
    stage.work.annotations.mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[dict]] = {}
    for row in rows:
        annotation = {key: value for key, value in row.items() if key != "prompt_id"}
        shards.setdefault(f"{shard_name(row['prompt_id'], 'sda')}.json", []).append(annotation)
    for path in stage.work.annotations.glob("sda_*.json"):
        if path.name not in shards:
            path.unlink()
    for name, annotations in shards.items():
        lines = ",\n".join(json.dumps(annotation, ensure_ascii=False) for annotation in annotations)
        write_whole(stage.work.annotations / name, f"[\n{lines}\n]\n")


def _ground_batch(stage: Stage, detector: PhraseDetector, batch: list[dict], section: GroundSection) -> list[dict]:
    phrases = [find_noun_phrases(row["caption"]) for row in batch]
    asked = [place for place, own in enumerate(phrases) if own]
    images = [open_generated(stage.work.images, batch[place]) for place in asked]
    texts = [[phrase.text for phrase in phrases[place]] for place in asked]
    found = dict(zip(asked, detector(images, texts) if asked else [], strict=True))
    rows = []
    for place, row in enumerate(batch):
        regions = choose_regions(phrases[place], found[place], section) if place in found else []
        rows.append(
            {
                "image": row["file_path"],
                "caption": row["caption"],
                "image_id": row["prompt_id"],
                "boxes": [region.box for region in regions],
                "logits": [region.score for region in regions],
                "phrases": [region.phrase for region in regions],
                "prompt_id": row["prompt_id"],
            }
        )
    return rows


def choose_regions(phrases: Sequence[NounPhrase], found: PhraseBoxes, section: GroundSection) -> list[Region]:
    """Assign at most one box to each phrase.

    Candidates of a phrase are the boxes above both thresholds and the smallest side, without the weaker of two that overlap.
    The person gets its best candidate, which other phrases may share. The other phrases, the more specific garments first, get
    their best candidate that no earlier phrase has; if all are taken, the phrase gets no box.

    Args:
        phrases: phrases of a caption.
        found: boxes and scores, a column for each phrase.
        section: thresholds.

    Returns:
        Regions in the order of the phrases.
    """
    candidates = [_candidates(found, column, section) for column in range(len(phrases))]
    person = next(
        (column for column, each in enumerate(phrases) if each.kind == "person" and candidates[column]), None
    )
    order = sorted(
        (column for column in range(len(phrases)) if column != person and candidates[column]),
        key=lambda column: (specificity(phrases[column]), found.scores[candidates[column][0], column].item()),
        reverse=True,
    )
    corners = box_convert(found.boxes, "cxcywh", "xyxy")
    chosen, taken = ({}, []) if person is None else ({person: candidates[person][0]}, [])
    for column in order:
        # Other people may not share the first person's box; garments may, for example a long coat.
        rivals = [*taken, *([chosen[person]] if phrases[column].kind == "person" and person is not None else [])]
        free = [box for box in candidates[column] if not _overlaps(corners, box, rivals, section.duplicate_threshold)]
        if free:
            chosen[column] = free[0]
            taken.append(free[0])
    return [
        Region(
            phrases[column].text,
            [round(value, 4) for value in found.boxes[box].tolist()],
            round(found.scores[box, column].item(), 4),
        )
        for column, box in sorted(chosen.items())
    ]


def _candidates(found: PhraseBoxes, column: int, section: GroundSection) -> list[int]:
    """Return the candidate boxes of a phrase, best first."""
    scores = found.scores[:, column]
    passes = (found.best >= section.box_threshold) & (scores >= section.text_threshold)
    passes &= found.boxes[:, 2:].amin(dim=1) >= max(section.min_box_side, 0.001)  # so that rounded boxes have an area
    places = passes.nonzero()[:, 0]
    kept = nms(box_convert(found.boxes[places], "cxcywh", "xyxy"), scores[places], section.nms_threshold)
    return places[kept].tolist()


def _overlaps(corners: torch.Tensor, box: int, others: list[int], threshold: float) -> bool:
    return bool(others) and bool((box_iou(corners[[box]], corners[others]) >= threshold).any())


def main(argv: list[str] | None = None) -> None:
    """Run this stage alone."""
    run_stage("data_scripts.dad.ground", run, __doc__, ("ground",), argv)


if __name__ == "__main__":
    main()
