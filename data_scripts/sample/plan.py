"""Plan of the sample set: its images and their captions, before drawing."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

from data_scripts.sample.captions import Caption, write_caption, write_two_captions
from data_scripts.sample.people import CAMERAS, VIEWS, Person, Scene, draw_identities, draw_person, draw_scene
from mra.common.arguments import option


PEDES_FOLDER = "CUHK-PEDES"


@dataclass(frozen=True)
class SampleConfig:
    """Sizes and seed of a sample set."""

    theme_name: ClassVar[str] = "sample set"

    sda_pairs: int = option(10000, "image-caption pairs of the pretraining domain")
    sda_shard_size: int = option(5000, "prompts per shard of the pretraining domain")
    train_ids: int = option(2500, "people in the training split")
    val_ids: int = option(200, "people in the validation split")
    test_ids: int = option(200, "people in the test split")
    images_per_id: int = option(4, "images per person, plus or minus one, each with two captions")
    twin_share: float = option(
        0.15, "share of people who differ from another one of their split in only one attribute"
    )
    seed: int = option(0, "seed of the drawing")

    def __post_init__(self) -> None:
        for name in ("sda_pairs", "train_ids", "val_ids", "test_ids", "seed"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"`{name}` must be 0 or more, got {value}")
        if self.sda_pairs + self.train_ids + self.val_ids + self.test_ids == 0:
            raise ValueError("the sample set would be empty: give `sda_pairs` or one of the `*_ids` a value above 0")
        if self.sda_shard_size < 1:
            raise ValueError(f"`sda_shard_size` must be 1 or more, got {self.sda_shard_size}")
        if not 2 <= self.images_per_id <= len(CAMERAS) - 1:
            raise ValueError(f"`images_per_id` must lie in 2..{len(CAMERAS) - 1}, got {self.images_per_id}")
        if not 0 <= self.twin_share < 1:
            raise ValueError(f"`twin_share` must lie in 0..1 (1 excluded), got {self.twin_share}")


@dataclass
class PlannedPicture:
    """One planned image: person, scene, captions, and path below `images/`."""

    path: str
    person: Person
    scene: Scene
    captions: list[Caption]
    image_id: int
    split: str
    parts: dict[str, tuple[float, ...]] = field(default_factory=dict)


def plan_sda(config: SampleConfig) -> list[PlannedPicture]:
    """Plan the pretraining domain: one person, view and caption for each prompt, with one or sometimes two images."""
    crops: list[PlannedPicture] = []
    prompt = 0
    while len(crops) < config.sda_pairs:
        name = f"{config.seed}/sda/{prompt}"
        rng = random.Random(name)
        person = draw_person(rng)
        view = rng.choice(VIEWS)
        first = draw_scene(rng, person, view=view, camera=None, seed=f"{name}/0")
        caption = write_caption(person, first, rng, "prompt")
        folder = shard_name(prompt, config.sda_shard_size, "c")
        crops.append(PlannedPicture(f"SDA/{folder}/{prompt}_0.jpg", person, first, [caption], prompt, "sda"))
        if rng.random() < 0.08 and len(crops) < config.sda_pairs and first.shoes_visible:
            second = draw_scene(rng, person, view=view, camera=None, seed=f"{name}/1")
            crops.append(PlannedPicture(f"SDA/{folder}/{prompt}_1.jpg", person, second, [caption], prompt, "sda"))
        prompt += 1
    return crops


def plan_pedes(config: SampleConfig) -> list[PlannedPicture]:
    """Plan the target domain: identities numbered from 1 over train, val and test, each in several cameras."""
    crops: list[PlannedPicture] = []
    identity = 0
    for split, number in (("train", config.train_ids), ("val", config.val_ids), ("test", config.test_ids)):
        people = draw_identities(random.Random(f"{config.seed}/{split}"), number, config.twin_share)
        for person in people:
            identity += 1
            name = f"{config.seed}/pedes/{split}/{identity}"
            rng = random.Random(name)
            count = config.images_per_id + rng.choice((-1, 0, 0, 0, 1)) if config.images_per_id > 2 else 2
            cameras = rng.sample(CAMERAS, count)
            start = rng.randrange(len(VIEWS))
            for index, camera in enumerate(cameras):
                view = VIEWS[(start + index) % len(VIEWS)]
                scene = draw_scene(rng, person, view=view, camera=camera, seed=f"{name}/{index}")
                captions = write_two_captions(person, scene, rng)
                extension = rng.choices(("jpg", "png", "bmp"), (88, 8, 4))[0]
                path = f"{PEDES_FOLDER}/imgs/{camera}/{identity:05d}_{index}.{extension}"
                crops.append(PlannedPicture(path, person, scene, captions, identity, split))
    return crops


def shard_name(prompt: int, size: int, prefix: str) -> str:
    """Return the name of a prompt's shard, for example `sda_0_5000`."""
    start = prompt // size * size
    return f"{prefix}_{start}_{start + size}"
