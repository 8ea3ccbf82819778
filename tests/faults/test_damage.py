"""Every file of a model folder, a prepared set and a checkpoint, damaged: the same result, or a sentence that names it."""

import shutil

import pytest

from tests.helpers import faults


pytestmark = pytest.mark.faults
MODEL = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
# A change inside the values of plain weights cannot be noticed without a checksum, which `from_pretrained` does not keep:
# an evaluation of such a folder gives other figures. `retrieval.json` is tied to a digest of the weights, checkpoints and
# their manifests too.
UNNOTICED = {("model.safetensors", "flipped"), ("model.safetensors", "zeroed")}
# A changed letter in a file of settings may leave it valid: another word of the vocabulary, another name of a class.
UNNOTICED |= {(name, damage) for name in MODEL if name.endswith(".json") for damage in ("flipped", "zeroed")}


@pytest.mark.parametrize("damage", faults.DAMAGES)
@pytest.mark.parametrize("file", MODEL)
def test_model_folder(world, tmp_path, file, damage):
    if (file, damage) in UNNOTICED:
        pytest.skip("nobody can notice it without a checksum of the folder")
    if not (world.place / "model" / file).exists():
        pytest.skip("not a file of this version")
    shutil.copytree(world.place / "model", tmp_path / "model")
    faults.DAMAGES[damage](tmp_path / "model" / file)
    arguments = [word.replace(str(world.place / "model"), "model") for word in world.arguments("evaluate")]
    check(world, "evaluate", tmp_path, faults.run(arguments, tmp_path), file, "model")


@pytest.mark.parametrize("damage", faults.DAMAGES)
def test_shard_of_a_set(world, tmp_path, damage):
    shutil.copytree(world.place / "split", tmp_path / "split")
    file = "test-00000-of-00001.parquet"
    faults.DAMAGES[damage](tmp_path / "split" / file)
    arguments = [word.replace(str(world.place / "split"), "split") for word in world.arguments("evaluate")]
    check(world, "evaluate", tmp_path, faults.run(arguments, tmp_path), file, "split")


def check(world, name, folder, outcome, file, place):
    """The same result as before, or one sentence that names the file or its folder."""
    assert "Traceback" not in outcome.shown and outcome.code >= 0, outcome.shown
    if outcome.code == 0:
        found, expected = faults.read_tree(folder / "out"), faults.read_tree(world.undisturbed(name)[0] / "out")
        for result in (found, expected):
            result["metrics.json"] = {key: result["metrics.json"][key] for key in ("similarity", "reranked", "counts")}
        assert found == expected, outcome.shown
    else:
        assert file in outcome.sentence or place in outcome.sentence, outcome.shown
