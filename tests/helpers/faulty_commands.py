"""The commands that meet faults, on tiny models and sets, and what each gives when nothing disturbs it."""

import fcntl
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config

from data_scripts.dad.tiny.make_readers import make_readers
from modeling_mra import MRAForPreTraining
from tests.helpers import dad, faults, runs
from tests.helpers.faulty_readers import READERS
from tests.helpers.galleries import draw_picture, write_pictures
from tests.helpers.sources import draw, write_sda
from tests.helpers.tiny import tiny_model, tiny_processor


COLOURS = ("red", "green", "blue", "white", "black", "yellow")


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        arguments: module and command line; `{world}` is the folder of the sources, and the working folder takes the output.
        outputs: what it writes, relative to the working folder; exists once it ended well.
        before: command whose output it starts from.
        left_out: names of files whose content differs between two runs.
        again: options that the next run gets besides.
        is_gallery: whether the output is compared as a gallery.
        resumes: whether what an interrupted run wrote is kept for the next one.
        is_slow: whether it takes so long that it meets one fault of each kind only.
    """

    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    before: str | None = None
    left_out: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    is_gallery: bool = False
    resumes: bool = False
    is_slow: bool = False


def _mra(*arguments: str) -> tuple[str, ...]:
    return ("mra.cli", *arguments)


_PLACE = ("--gallery", "people.db")
_TRAIN = ("environment.json", "recipe.yaml", "manifest.json")
COMMANDS = {
    "make_sample": Command(
        (
            "data_scripts.make_sample", "--output", "out", "--sda_pairs", "12", "--train_ids", "4", "--val_ids", "1",
            "--test_ids", "1", "--num_proc", "1", "--overwrite",
        ),
        ("out",),
    ),
    "prepare_sda": Command(
        _mra("prepare", "sda", "--annotations", "{world}/raw/sda", "--images", "{world}/raw/images/SDA", "--output", "out",
             "--overwrite", "--no_size_check"),
        ("out",),
    ),
    "prepare_pedes": Command(
        _mra("prepare", "pedes", "--dataset", "csv", "--annotations", "{world}/raw/people.csv", "--images",
             "{world}/raw/people", "--output", "out", "--overwrite", "--num_proc", "2"),
        ("out",),
    ),
    **{
        f"train_{stage}": Command(
            (f"train_{stage}", "--config", f"{{world}}/{stage}.yaml", "--output_dir", "out"),
            ("out/best", "out/final"),
            left_out=_TRAIN,
            again=("--resume", "latest"),
            resumes=True,
        )
        for stage in ("pretrain", "finetune")
    },
    "evaluate": Command(
        _mra("evaluate", "--model", "{world}/model", "--dataset", "{world}/split", "--output_dir", "out", "--rerank_k", "6",
             "--score_fusion", "published", "--num_workers", "0", "--save_scores", "--num_queries_in_picture", "2"),
        ("out",),
    ),
    "evaluate_auto": Command(
        _mra("evaluate", "--model", "model", "--dataset", "{world}/split", "--output_dir", "out", "--rerank_k", "auto",
             "--num_workers", "0"),
        ("out",),
        before="model",
    ),
    "export": Command(
        _mra("export", "--model", "{world}/model", "--output", "out", "--overwrite"), ("out",), left_out=("mra.json",),
        is_slow=True,
    ),
    "convert_back": Command(
        _mra("convert", "--to_published", "--checkpoint", "{world}/model", "--output", "out.pth", "--overwrite"),
        ("out.pth",),
    ),
    "convert": Command(
        _mra("convert", "--checkpoint", "{world}/released.pth", "--tokenizer", "{world}/model", "--output", "out",
             "--overwrite"),
        ("out",),
    ),
    "index_build": Command(
        _mra("index", "build", *_PLACE, "--model", "{world}/model", "--images", "{world}/people", "--device", "cpu",
             "--batch_size", "4", "--copy_images"),
        ("people.db",),
        is_gallery=True,
        resumes=True,
    ),
    "index_remove": Command(
        _mra("index", "remove", *_PLACE, "--keys", "cam_0/000.jpg", "cam_1/001.png", "cam_2/002.bmp"),
        ("people.db",),
        before="index_build",
        is_gallery=True,
        resumes=True,
    ),
    "index_calibrate": Command(
        _mra("index", "calibrate", *_PLACE, "--dataset", "{world}/split", "--rerank", "4", "--device", "cpu"),
        ("people.db",),
        before="index_build",
        is_gallery=True,
        resumes=True,
    ),
    "factory": Command(
        ("data_scripts.dad.run", "--config", "{world}/factory.yaml", "--common.work_dir", "out"),
        ("out",),
        left_out=("manifest.json", "environment.json", "recipe.yaml", "index.html", "index.md"),
        resumes=True,
        is_slow=True,
    ),
}  # fmt: skip


def cases(*values: object, for_slow: object) -> list[tuple[str, object]]:
    """Return parameters of a test: each command with each value, a slow one with `for_slow` only."""
    return [
        (name, value)
        for name, command in COMMANDS.items()
        for value in values
        if value == for_slow or not command.is_slow
    ]


class World:
    """Sources of the commands, and the results of undisturbed runs, which all processes of pytest-xdist share."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        os.environ["HF_DATASETS_CACHE"] = str(root / "cache")  # of the processes
        datasets.config.HF_DATASETS_CACHE = root / "cache"
        self.place = root / "world"
        self._once("sources", lambda: write_sources(self.place))

    def _once(self, name: str, make: Callable[[], object]) -> Any:
        """What `make` gives in the first process that asks for the name; the others wait for it."""
        made = self.root / f"{name}.pickle"
        with open(self.root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                made.write_bytes(pickle.dumps(make()))
        return pickle.loads(made.read_bytes())

    def arguments(self, name: str, *more: str) -> list[str]:
        """The command line of a command."""
        return [*(word.replace("{world}", str(self.place)) for word in COMMANDS[name].arguments), *more]

    def begin(self, name: str, folder: Path) -> None:
        """Put what a command starts from into its working folder."""
        folder.mkdir(exist_ok=True)
        self.needs(name)
        before = COMMANDS[name].before
        if before == "model":
            shutil.copytree(self.place / "model", folder / "model")
        elif before is not None:
            shutil.copytree(self.undisturbed(before)[0], folder, dirs_exist_ok=True)

    def needs(self, name: str) -> None:
        """Make what another command has to write first."""
        if name == "train_finetune":
            start = self.undisturbed("train_pretrain")[0] / "out" / "final"
            self._once("start", lambda: shutil.copytree(start, self.place / "start"))
        if name == "convert":
            released = self.undisturbed("convert_back")[0] / "out.pth"
            self._once("released", lambda: shutil.copy2(released, self.place / "released.pth"))

    def run(self, name: str, folder: Path, *more: str, **options) -> faults.Outcome:
        """Run a command in a working folder."""
        return faults.run(self.arguments(name, *more), folder, **options)

    def undisturbed(self, name: str) -> tuple[Path, faults.Outcome, object]:
        """Folder, outcome and result of a run that nothing disturbs."""
        return self._once(f"undisturbed-{name}", lambda: self._run_undisturbed(name))

    def _run_undisturbed(self, name: str) -> tuple[Path, faults.Outcome, object]:
        folder = self.root / f"undisturbed-{name}"
        self.begin(name, folder)
        outcome = self.run(name, folder)
        assert outcome.code == 0, outcome.shown
        assert not faults.unfinished(folder), faults.unfinished(folder)
        return folder, outcome, self.result(name, folder)

    # ---------------------------------------------------------------- reading

    def begin_reading(self, name: str, folder: Path) -> None:
        """Put what a reader reads into its working folder."""
        reader = READERS[name]
        shutil.copytree(self.undisturbed(reader.made_by)[0] / reader.folder, folder / reader.folder)

    def files_read(self, name: str) -> list[str]:
        """Return the files that a reader may read, relative to their folder, one of each kind."""
        reader = READERS[name]
        folder = self.undisturbed(reader.made_by)[0] / reader.folder
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        kinds = {
            re.sub(r"\d[\da-f]+|[\da-f]{2,}", "*", file): file for file in files if re.fullmatch(reader.pattern, file)
        }
        return list(kinds.values())

    def read(self, name: str, folder: Path) -> faults.Outcome:
        """Run a reader."""
        arguments = [word.replace("{world}", str(self.place)) for word in READERS[name].arguments]
        return faults.run(arguments, folder)

    def undamaged(self, name: str) -> object:
        """What a reader gives if nothing is damaged."""
        return self._once(f"undamaged-{name}", lambda: self._read_undamaged(name))

    def _read_undamaged(self, name: str) -> object:
        folder = self.root / f"undamaged-{name}"
        self.begin_reading(name, folder)
        outcome = self.read(name, folder)
        assert outcome.code == 0, outcome.shown
        return READERS[name].result(folder, outcome.shown)

    # ---------------------------------------------------------------- comparing

    def result(self, name: str, folder: Path) -> object:
        """What a command gave, to be compared."""
        command = COMMANDS[name]
        if command.is_gallery:
            with faults.copied(folder) as copy:  # reading may write
                return faults.read_gallery(copy / command.outputs[0])
        left_out = (*command.left_out, "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "sampler.bin")
        return faults.read_tree(folder, left_out)


def write_sources(root: Path) -> None:
    """Annotations, pictures, sets, models and recipes."""
    write_sda(root / "raw")
    rows = ["path,caption,identity,split"]
    for number in range(12):
        draw(root / "raw" / "people" / f"{number}.jpg", number)
        rows.append(f"{number}.jpg,a person in {COLOURS[number % 6]},{number // 2},{('train', 'test')[number // 8]}")
    (root / "raw" / "people.csv").write_text("\n".join(rows) + "\n")
    write_pictures(root / "people", 12)

    tiny_model(cls=MRAForPreTraining, scale=0.3).save_pretrained(root / "model")
    tiny_processor().save_pretrained(root / "model")
    (root / "split").mkdir()
    for split in ("test", "validation"):
        make_split(first=50 if split == "test" else 0).to_parquet(root / "split" / f"{split}-00000-of-00001.parquet")

    runs.write_sets(root)
    for stage in ("pretrain", "finetune"):
        runs.write_recipe(root, stage, num_train_epochs=1, save_steps=2).rename(root / f"{stage}.yaml")

    (root / "factory").mkdir()
    dad.write_sources(root / "factory")
    make_readers(root / "factory" / "readers", ("blip", "grounding"))
    dad.write_config(root / "factory", "work", **_FACTORY).rename(root / "factory.yaml")
    text = (root / "factory.yaml").read_text().replace("READERS", str(root / "factory" / "readers"))
    (root / "factory.yaml").write_text(text)


_LOOSE = {"min_width": 8, "min_height": 8, "min_contrast": 0, "min_colour": 0, "min_sharpness": 0, "min_detail": 0}
_FACTORY = {
    "train": {"max_train_steps": 2, "save_steps": 1, "validation_steps": None, "validation_images": 0},
    "augment": {"prompts_per_caption": 2, "max_captions": 3},
    "generate": {"num_images": 6, "num_inference_steps": 1, "batch_size": 2},
    "filter": _LOOSE | {"max_detail": 100_000},
    "caption": {"prompt": None, "max_new_tokens": 4, "model": "READERS/blip", "batch_size": 2},
    "ground": {"box_threshold": 0.0, "text_threshold": 0.0, "model": "READERS/grounding", "batch_size": 2},
    "report": {"images": 4},
}


def make_split(first: int = 0, count: int = 12) -> datasets.Dataset:
    """A labelled split of drawn people, two pictures each."""
    features = {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("int64"),
    }
    rows = {
        "image": [draw_picture(first + number) for number in range(count)],
        "captions": [
            [f"a {COLOURS[number // 2 % 6]} coat and {COLOURS[number % 6]} shoes"] for number in range(count)
        ],
        "image_id": [first + number // 2 for number in range(count)],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))
