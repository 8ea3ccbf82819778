"""Caption every kept image, independently of its prompt.

    python -m data_scripts.dad.caption --config recipes/dad/cuhk.yaml

writes `WORK/captions/captions.jsonl`. The paper captions with BLIP-2; any `AutoModelForImageTextToText` works.
"""

from typing import Any

from data_scripts.dad.captioners import Captioner, clean_style
from data_scripts.dad.command import run_stage
from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.reading import DTYPES, open_generated, read_batches
from data_scripts.dad.stage_folders import begin_stage, device_of, read_stage_rows
from mra.common.arguments import require


def run(config: FactoryConfig) -> None:
    """Caption the images that have no caption yet."""
    section = config.caption
    require(section.model is not None, "caption.model", "a captioner's folder or Hub id", section.model)
    assert section.model is not None
    stage = begin_stage(config, "caption")
    if stage.is_finished:
        return
    rows = read_stage_rows(stage.work.kept)
    captioner = Captioner(
        section.model,
        section.prompt,
        dtype=DTYPES[section.dtype],
        device=device_of(stage.state),
        max_new_tokens=section.max_new_tokens,
        num_beams=section.num_beams,
    )

    def caption(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        texts = captioner([open_generated(stage.work.images, row) for row in batch])
        return [_make_row(row, text, section.clean_style) for row, text in zip(batch, texts, strict=True)]

    if read_batches(stage, stage.work.captions, rows, section.batch_size, caption):
        empty = sum(not row["caption"] for row in read_stage_rows(stage.work.captions))
        stage.finish(captions=len(rows) - empty, empty=empty)


def _make_row(row: dict[str, Any], text: str, clean: bool) -> dict[str, Any]:
    """Build a row of captions.jsonl; a caption without words becomes empty, and grounding skips its image."""
    caption = clean_style(text) if clean else text
    caption = caption if any(character.isalnum() for character in caption) else ""
    return {"file_path": row["file_path"], "caption": caption, "raw_caption": text, "prompt_id": row["prompt_id"]}


def main(argv: list[str] | None = None) -> None:
    """Run this stage alone."""
    run_stage("data_scripts.dad.caption", run, __doc__, ("caption",), argv)


if __name__ == "__main__":
    main()
