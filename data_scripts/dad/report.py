"""Write a report on the factory's result: kept images, captions, boxes, and distance from the target dataset.

    python -m data_scripts.dad.report --config recipes/dad/cuhk.yaml

writes `WORK/report/index.html`, the same as `index.md`, contact sheets, and the numbers as `report.json`.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from data_scripts.dad.command import run_stage
from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.image_checks import load_image
from data_scripts.dad.json_files import read_json, write_json
from data_scripts.dad.language.noun_phrases import find_noun_phrases
from data_scripts.dad.reading import choose_rows, open_generated
from data_scripts.dad.reporting.domain_distance import FeatureExtractor, load_extractor, measure_distance
from data_scripts.dad.reporting.report_blocks import make_blocks
from data_scripts.dad.reporting.report_page import to_html, to_markdown
from data_scripts.dad.stage_folders import WorkFolder, device_of, process_state, read_finished, read_stage_rows
from data_scripts.dad.target_set import load_target
from mra.common.drawing import CONTACT_SHEET, Tile, TileRow, draw_sheet, save_picture
from mra.common.files import write_whole


_NEEDED = ("augment", "generate", "filter", "caption", "ground")
_MODELS = ("common.base_model", "filter.person_model", "filter.score_model", "caption.model", "ground.model")
_SHEET_PICTURES, _SHEET_ROWS = 8, 2
_SHEET_STYLE = dataclasses.replace(CONTACT_SHEET, label_lines=6)
_FREQUENT = 12  # words and phrases to show
_WORD = re.compile(r"[a-z]+(?:[-'][a-z]+)*")


def run(config: FactoryConfig) -> None:
    """Write the page; it is rewritten at every call, because stages may have changed."""
    state, work = process_state(), WorkFolder(Path(config.common.work_dir))
    manifests = {name: read_finished(work, name) for name in _NEEDED}
    if state.is_main_process:
        folder = work.folder("report")
        target = load_target(config.common.dataset)
        regions = read_stage_rows(work.regions)
        facts = {
            "note": config.report.note,
            "models": _list_models(manifests),
            "counts": _count_stages(work, manifests),
            "filter": read_json(work.folder("filter") / "report.json"),
            "captions": {
                "made": describe_captions([row["caption"] for row in regions]),
                "target": describe_captions([text for texts in target["captions"] for text in texts]),
            },
            "regions": describe_regions(regions),
            "distances": _measure_distances(
                config, work, target, load_extractor(config.report.feature_extractor, device_of(state))
            ),
        }
        figures = _draw_sheets(config, work, target, regions)
        blocks = make_blocks(facts, figures)
        write_json(folder / "report.json", facts)
        write_whole(folder / "index.md", to_markdown(blocks))
        write_whole(folder / "index.html", to_html(blocks))
        print(f"report: {folder / 'index.html'}")
    state.wait_for_everyone()


# Facts


def _list_models(manifests: dict[str, dict]) -> dict[str, str | None]:
    settings = {name: value for manifest in manifests.values() for name, value in manifest["settings"].items()}
    return {name: settings.get(name) for name in _MODELS}


def _count_stages(work: WorkFolder, manifests: dict[str, dict]) -> dict[str, int]:
    filtered, grounded = manifests["filter"]["finished"], manifests["ground"]["finished"]
    return {
        "prompts": len(read_stage_rows(work.prompts)) if work.prompts.exists() else 0,
        "images": filtered["images"],
        "kept": filtered["kept"],
        "captioned": manifests["caption"]["finished"]["captions"],
        "annotated": grounded["images"],
        "boxes": grounded["boxes"],
    }


def describe_captions(captions: Sequence[str]) -> dict[str, Any]:
    """Count words: per caption, distinct ones, the most frequent."""
    words = [_WORD.findall(caption.lower()) for caption in captions]
    lengths = [len(own) for own in words] or [0]
    counts = Counter(word for own in words for word in own)
    return {
        "captions": len(captions),
        "different_captions": len({" ".join(own) for own in words}),
        "words_per_caption": {"mean": float(np.mean(lengths)), "least": min(lengths), "most": max(lengths)},
        "different_words": len(counts),
        "frequent_words": counts.most_common(_FREQUENT),
    }


def describe_regions(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Count boxes: per image, by kind, with size and score, and the phrases without a box."""
    kinds, areas, scores = Counter(), {}, {}
    phrases = Counter(phrase.lower() for row in rows for phrase in row["phrases"])
    named = 0
    for row in rows:
        found = {phrase.text: phrase.kind for phrase in find_noun_phrases(row["caption"])}
        named += len(found)
        for phrase, box, score in zip(row["phrases"], row["boxes"], row["logits"], strict=True):
            kind = found[phrase]
            kinds[kind] += 1
            areas.setdefault(kind, []).append(box[2] * box[3])
            scores.setdefault(kind, []).append(score)
    by_kind = {
        kind: {"boxes": count, "mean_area": float(np.mean(areas[kind])), "mean_score": float(np.mean(scores[kind]))}
        for kind, count in kinds.most_common()
    }
    return {
        "images": len(rows),
        "boxes": sum(kinds.values()),
        "phrases_named": named,
        "boxes_per_image": dict(sorted(Counter(len(row["boxes"]) for row in rows).items())),
        "kinds": by_kind,
        "frequent_phrases": phrases.most_common(_FREQUENT),
    }


def _measure_distances(
    config: FactoryConfig, work: WorkFolder, target: Dataset, extractor: FeatureExtractor
) -> dict[str, dict | None]:
    """Return the distances from the target of kept and of all generated images, and between the target's halves."""
    seed, limit = config.common.seed, config.report.images
    places = choose_rows(len(target), limit, seed, "report_target")
    pictures = target.select(places)
    sets = {"kept": read_stage_rows(work.kept), "generated": read_stage_rows(work.generated)}
    scored = {row["prompt_id"] for row in read_stage_rows(work.scores) if row["decodes"]}
    distances: dict[str, dict | None] = {}
    for name, rows in sets.items():
        chosen = [rows[place] for place in choose_rows(len(rows), limit, seed, "report_generated")]
        paths = [work.images / row["file_path"] for row in chosen if row["prompt_id"] in scored]
        distances[name] = _distance(paths, pictures, extractor)
    # Rows are sorted by person: alternate rows give both halves the same cameras and places.
    halves = [pictures.select(range(first, len(pictures), 2)) for first in (0, 1)]
    distances["target halves"] = _distance(halves[0], halves[1], extractor)
    return distances


def _distance(generated: Any, target: Any, extractor: FeatureExtractor) -> dict | None:
    if min(len(generated), len(target)) < 2:
        return None
    return dataclasses.asdict(measure_distance(generated, target, extractor))


# Contact sheets


def _draw_sheets(
    config: FactoryConfig, work: WorkFolder, target: Dataset, regions: Sequence[dict]
) -> list[tuple[str, str]]:
    """Draw the sheets and return their paths relative to the page, with captions."""
    folder, seed = work.folder("report"), config.common.seed
    figures = []
    generated = read_stage_rows(work.kept)
    wanted = _SHEET_PICTURES * _SHEET_ROWS
    ours = [generated[place] for place in choose_rows(len(generated), wanted, seed, "report_sheet")]
    theirs = target.select(choose_rows(len(target), wanted, seed, "report_sheet"))
    rows = _rows("Target set", [Tile(load_image(example), example["captions"][0]) for example in map(dict, theirs)])
    rows += _rows("Generated and kept", [Tile(open_generated(work.images, row), row["prompt"]) for row in ours])
    save_picture(draw_sheet(rows, _SHEET_STYLE, "Target set and generated images"), folder / "images.jpg")
    figures.append(("images.jpg", "Pictures of the target set, and generated ones with their prompts"))
    with_boxes = [row for row in regions if row["boxes"]]
    if with_boxes:
        chosen = [with_boxes[place] for place in choose_rows(len(with_boxes), wanted, seed, "report_boxes")]
        rows = _rows("", [_tile_with_boxes(work, row) for row in chosen])
        save_picture(draw_sheet(rows, _SHEET_STYLE, "Boxes of the captions' phrases"), folder / "regions.jpg")
        figures.append(("regions.jpg", "Captions and the boxes found for their phrases"))
    if (work.folder("filter") / "dropped.jpg").exists():
        figures.append(("../filter/dropped.jpg", "Dropped images by the first reason"))
    return figures


def _rows(heading: str, tiles: Sequence[Tile]) -> list[TileRow]:
    """Break tiles into rows, the first with a heading."""
    starts = range(0, len(tiles), _SHEET_PICTURES)
    return [TileRow(tiles[start : start + _SHEET_PICTURES], "" if start else heading) for start in starts]


def _tile_with_boxes(work: WorkFolder, row: dict) -> Tile:
    image = open_generated(work.images, {"file_path": row["image"]})
    regions = zip(row["phrases"], row["boxes"], row["logits"], strict=True)
    return Tile(image, row["caption"], boxes=[(f"{score:.2f} {phrase}", box) for phrase, box, score in regions])


def main(argv: list[str] | None = None) -> None:
    """Run this stage alone."""
    run_stage("data_scripts.dad.report", run, __doc__, ("report",), argv)


if __name__ == "__main__":
    main()
