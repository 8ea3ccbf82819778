"""mra/retrieval/export.py and onnx_encoder.py: an export against PyTorch, what it refuses, whole or nothing."""

import json
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from modeling_mra import MRAForImageTextRetrieval
from mra.cli import main
from mra.common.loading import load_model
from mra.common.weight_files import weights_digest
from mra.retrieval import RetrievalChoice, export
from mra.retrieval.encoders import TorchEncoder
from mra.retrieval.export import ImageEncoder, check_graph, make_graphs, write_graph
from mra.retrieval.onnx_encoder import DESCRIPTION, FILES, OnnxEncoder
from tests.helpers.tiny import tiny_config, tiny_model, tiny_processor
from tests.retrieval.test_retrieval_choice import CHOICE


TEXTS = ["a woman in a red coat", "shoes", "a man with a black backpack and a pair of long blue jeans, walking"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model and its export."""
    root = tmp_path_factory.mktemp("export")
    model = root / "model"
    tiny_model(cls=MRAForImageTextRetrieval, scale=0.3).save_pretrained(model)
    tiny_processor().save_pretrained(model)
    replace(CHOICE, model=str(model)).save(model)  # as copied from an output folder, which names its model
    main(["export", "--model", str(model), "--output", str(root / "onnx")])
    return model, root / "onnx"


@pytest.fixture(scope="module")
def encoders(folders):
    return TorchEncoder(str(folders[0])), OnnxEncoder(folders[1])


def make_images(count):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (80, 40, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_folder_is_whole(folders):
    model, output = folders
    assert {DESCRIPTION, "config.json", "tokenizer.json", *FILES.values()} <= {path.name for path in output.iterdir()}
    assert sorted(path.name for path in output.parent.iterdir()) == ["model", "onnx"]
    description = json.loads((output / DESCRIPTION).read_text())
    assert description["name"] == str(model)
    assert set(description["differences"]) == set(FILES)
    assert all(0 < difference < 1e-4 for difference in description["differences"].values())


def test_the_choice_goes_with_the_export(folders, encoders):
    digests = [weights_digest(folder) for folder in folders]
    assert [RetrievalChoice.load(str(folder)).weights for folder in folders] == digests and digests[0] != digests[1]
    assert [encoder.match_weight for encoder in encoders] == [CHOICE.match_weight] * 2


def test_the_inputs_are_named_and_dynamic(folders):
    session = onnxruntime.InferenceSession(str(folders[1] / FILES["matcher"]), providers=["CPUExecutionProvider"])
    assert {value.name: value.shape for value in session.get_inputs()} == {
        "text_hidden_states": ["texts", "length", 32],
        "attention_mask": ["texts", "length"],
        "image_hidden_states": ["images", 3, 64],
        "text_index": ["pairs"],
        "image_index": ["pairs"],
    }


@pytest.mark.parametrize("count", [1, 3, 7])
def test_images_are_encoded_as_in_pytorch(encoders, count):
    torch_encoder, onnx_encoder = encoders
    onnx_encoder.batch_size = 4
    expected, found = torch_encoder.encode_images(make_images(count)), onnx_encoder.encode_images(make_images(count))
    torch.testing.assert_close(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=0)
    assert found.hidden_states.shape == (count, *onnx_encoder.token_shape)
    assert found.rows.tolist() == list(range(count)) and sum(map(len, found.batches)) == count


def test_texts_are_encoded_as_in_pytorch(encoders):
    expected, found = (encoder.encode_texts(TEXTS) for encoder in encoders)
    torch.testing.assert_close(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=0)
    assert found.lengths.tolist() == expected.lengths.tolist()


def test_pairs_are_matched_as_in_pytorch(encoders):
    torch_encoder, onnx_encoder = encoders
    texts, tokens = torch_encoder.encode_texts(TEXTS), torch_encoder.encode_images(make_images(35)).hidden_states
    expected = torch_encoder.match(texts, tokens)
    assert expected.std() > 0.05  # something to tell apart
    torch.testing.assert_close(onnx_encoder.match(texts, tokens), expected, atol=1e-4, rtol=0)


def test_both_encoders_describe_the_same_model(encoders):
    for name in ("fingerprint", "embedding_dim", "token_shape", "temperature", "name"):
        assert getattr(encoders[0], name) == getattr(encoders[1], name), name


@pytest.mark.slow
def test_a_linear_projection_and_another_opset(tmp_path):
    """The image encoder alone, which takes a third of the time."""
    model = tiny_model(tiny_config(projection_type="linear"), cls=MRAForImageTextRetrieval)
    model.set_attn_implementation("eager")
    graph = next(make_graphs(model.mra))
    assert write_graph(graph, model.mra, tmp_path, 21) == 21
    assert 0 < check_graph(graph, model.mra, tmp_path / FILES["image_encoder"]) < 1e-4


@pytest.mark.parametrize(("shift", "shown"), [(0.002, "0.002"), (float("nan"), "nan")])
def test_a_graph_that_differs_is_refused(folders, shift, shown):
    class Shifted(ImageEncoder):
        def forward(self, pixel_values):
            states, embeds = super().forward(pixel_values)
            return states, embeds + shift

    model = load_model(str(folders[0])).mra
    graph = replace(next(make_graphs(model)), module=Shifted(model))
    with pytest.raises(ValueError, match=rf"image_encoder: embeds differs from PyTorch by {shown} with sizes \(1,\)"):
        check_graph(graph, model, folders[1] / FILES["image_encoder"])


def test_a_refused_export_leaves_nothing(folders, tmp_path, monkeypatch):
    def refuse(graph, model, path):
        assert path.read_text() == "graph"
        raise ValueError("it differs")

    monkeypatch.setattr(
        export, "write_graph", lambda graph, _, folder, __: (folder / FILES[graph.name]).write_text("graph")
    )
    monkeypatch.setattr(export, "check_graph", refuse)
    with pytest.raises(SystemExit, match=r"mra export: it differs"):
        main(["export", "--model", str(folders[0]), "--output", str(tmp_path / "onnx")])
    assert list(tmp_path.iterdir()) == []


def test_only_an_earlier_export_is_replaced(folders, tmp_path):
    model, output = folders
    with pytest.raises(SystemExit, match=f"--output {output} exists: pass --overwrite"):
        main(["export", "--model", str(model), "--output", str(output)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(SystemExit, match="is not an earlier export, so it is not replaced"):
        main(["export", "--model", str(model), "--output", str(tmp_path / "mine"), "--overwrite"])
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "file"]


def test_a_folder_that_is_no_export_is_named(folders, encoders):
    with pytest.raises(ValueError, match=r"is not an ONNX export, it lacks onnx.json, image_encoder.onnx"):
        OnnxEncoder(folders[0])
    nowhere = folders[0].parent / "nowhere"
    with pytest.raises(SystemExit, match=rf"mra export: model {nowhere} is neither a folder"):
        main(["export", "--model", str(nowhere), "--output", str(folders[0].parent / "other")])
    with pytest.raises(ValueError, match="caption 1 must be a text"):
        encoders[1].encode_texts(["red", " "])
    with pytest.raises(ValueError, match="images is empty"):
        encoders[1].encode_images([])
