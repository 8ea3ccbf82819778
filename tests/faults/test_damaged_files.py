"""Every file that a command reads, damaged: the same result as before, or one sentence that names the file."""

import re
import shutil

import pytest

from tests.helpers import faults
from tests.helpers.faulty_commands import COMMANDS
from tests.helpers.faulty_readers import READERS, damage


pytestmark = pytest.mark.faults


@pytest.mark.parametrize("visible", [True, False], ids=["cut or removed", "zeroed or flipped"])
@pytest.mark.parametrize("name", READERS)
def test_damaged_file(world, tmp_path, name, visible):
    expected = world.undamaged(name)
    wrong = []
    for number, file in enumerate(world.files_read(name)):
        world.begin_reading(name, work := tmp_path / str(number))
        way = damage(work / READERS[name].folder / file, visible)
        outcome = world.read(name, work)
        if problem := find_problem(READERS[name], file, expected, work, outcome):
            wrong.append(f"{file} {way}: {problem}\n{outcome.shown}")
    assert not wrong, "\n\n".join(wrong)


def find_problem(reader, file, expected, work, outcome):
    if outcome.code < 0 or "Traceback" in outcome.shown:
        return "no sentence"
    if outcome.code == 0 and reader.result(work, outcome.shown) == expected:
        return None
    named = reader.names or re.escape(file.rpartition("/")[2])
    return None if re.search(named, outcome.shown) else f"another result (code {outcome.code}), {named} is not named"


PARTS = {
    "weights": "*.safetensors",
    "config": "config.json",
    "images": "*processor_config.json",
    "tokenizer": "token*",
}
LOADING = ("evaluate", "export", "index_build", "train_finetune")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", LOADING)
def test_model_without_a_part(world, tmp_path, name, part):
    shutil.copytree(world.place / "model", tmp_path / "model")
    for file in list((tmp_path / "model").glob(PARTS[part])):
        file.unlink()
    world.needs(name)
    arguments = [word.replace(str(world.place / "model"), "model") for word in world.arguments(name)]
    if name == "train_finetune":
        arguments += ["--model_name_or_path", "model"]
    outcome = faults.run(arguments, tmp_path)
    assert outcome.code in (1, 2) and "Traceback" not in outcome.shown, outcome.shown
    assert "model" in outcome.sentence, outcome.shown
    assert not any((tmp_path / output).exists() for output in COMMANDS[name].outputs)
