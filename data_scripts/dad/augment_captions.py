"""Make prompts from the captions of the target dataset: each caption, and changed copies of it.

    python -m data_scripts.dad.augment_captions --config recipes/dad/cuhk.yaml

`attributes` changes a person's attributes by the rules of `vocabulary/attributes.yaml`. `eda` is easy data augmentation, one
of four word operations at the given strength; it needs WordNet. The prompts of a caption depend only on the seed and the
caption's number, and every change is stored with its prompt.
"""

import logging
import random
from collections.abc import Iterator

from tqdm.auto import tqdm

from data_scripts.dad.command import run_stage
from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.json_files import to_lines
from data_scripts.dad.language.attribute_edits import AttributeEditor
from data_scripts.dad.language.word_list import load_vocabulary
from data_scripts.dad.sections import AugmentSection
from data_scripts.dad.stage_folders import begin_stage
from data_scripts.dad.target_set import load_target
from mra.common.files import write_whole
from mra.training.augmentation import CaptionAugmenter
from mra.training.order import key_to_seed


logger = logging.getLogger(__name__)

_ATTEMPTS = 5  # per prompt, to find a new one for the caption


class PromptMaker:
    """Generator of prompts from captions.

    Args:
        section: mode, number and strength of the changes.
        seed: seed of every choice.

    Raises:
        ValueError: if `eda` needs WordNet and it is not installed.
    """

    def __init__(self, section: AugmentSection, seed: int) -> None:
        self.section, self.seed = section, seed
        if section.mode == "attributes":
            self.editor = AttributeEditor(load_vocabulary())
        else:
            strength = section.strength
            try:
                self.augmenter = CaptionAugmenter(
                    1.0, tuple(section.eda_operations), strength, strength, strength, strength
                )
            except ValueError as error:
                raise ValueError(
                    f"--augment.mode eda: {error} (here `augment.eda_operations`), or use `--augment.mode attributes`, which "
                    "works without WordNet"
                ) from None

    def __call__(self, caption: str, number: int) -> list[tuple[str, list[dict]]]:
        """Return the distinct prompts of a caption with their changes, the unchanged caption first.

        Args:
            caption: the caption as stored in the dataset.
            number: number of the caption; with the seed it decides every choice.

        Returns:
            The requested number of prompts, or fewer if the caption does not allow so many.
        """
        caption = " ".join(caption.split())
        rng = random.Random(key_to_seed("prompts", self.seed, number))
        made = {caption: []}
        for _ in range(_ATTEMPTS * (self.section.prompts_per_caption - 1)):
            if len(made) == self.section.prompts_per_caption:
                break
            prompt, edits = self._change(caption, rng)
            if prompt and edits:
                made.setdefault(prompt, edits)
        return list(made.items())

    def _change(self, caption: str, rng: random.Random) -> tuple[str, list[dict]]:
        if self.section.mode == "attributes":
            return self.editor.edit(caption, self.section.strength, rng)
        prompt = self.augmenter(caption, rng)
        return prompt, [{"operation": "eda", "attribute": "words", "before": caption, "after": prompt}]


def make_rows(captions: list[list[str]], persons: list[int], maker: PromptMaker, most: int | None) -> Iterator[dict]:
    """Return the rows of `prompts.jsonl`.

    Args:
        captions: the captions of each row of the train split.
        persons: `image_id` of each row.
        maker: makes the prompts.
        most: most captions to use; None for all.
    """
    pairs = [(row, text) for row, texts in enumerate(captions) for text in texts][:most]
    prompt_id = 0
    for number, (row, caption) in enumerate(tqdm(pairs, desc="prompts", unit="caption")):
        for prompt, edits in maker(caption, number):
            yield {
                "prompt_id": prompt_id,
                "prompt": prompt,
                "source_caption": caption,
                "source_image_id": persons[row],
                "source_row": row,
                "edits": edits,
            }
            prompt_id += 1


def run(config: FactoryConfig) -> None:
    """Write the configured prompts, unless they exist."""
    stage = begin_stage(config, "augment", splits=False)
    if stage.is_finished:
        return
    counts = {}
    if stage.state.is_main_process:
        table = load_target(config.common.dataset)
        maker = PromptMaker(config.augment, config.common.seed)
        rows = list(make_rows(list(table["captions"]), list(table["image_id"]), maker, config.augment.max_captions))
        if not rows:
            raise ValueError(f"`common.dataset` {config.common.dataset!r} has no captions to make prompts from")
        write_whole(stage.work.prompts, to_lines(rows))
        unchanged = sum(not row["edits"] for row in rows)
        counts = {"prompts": len(rows), "captions": unchanged}
        logger.info(f"{len(rows):,} prompts from {unchanged:,} captions in {stage.work.prompts}")
    stage.finish(**counts)


def main(argv: list[str] | None = None) -> None:
    """Run this stage alone."""
    run_stage("data_scripts.dad.augment_captions", run, __doc__, ("augment",), argv)


if __name__ == "__main__":
    main()
