"""mra/retrieval/export.py and onnx_encoder.py: an export against PyTorch, what it refuses, whole or nothing."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from transformers import AutoTokenizer

from modeling_mra import MRAForImageTextRetrieval
from mra.cli import main
from mra.common.digests import DIGESTS_FILE
from mra.common.loading import load_model
from mra.common.weight_files import weights_digest
from mra.gallery import Gallery
from mra.retrieval import RetrievalChoice, export
from mra.retrieval.encoders import TorchEncoder
from mra.retrieval.export import ImageEncoder, check_graph, make_graphs, write_graph
from mra.retrieval.onnx_encoder import DESCRIPTION, FILES, CaptionTokenizer, OnnxEncoder
from processing_mra import CAPTION_STYLES, MRAImageProcessor, MRAProcessor
from tests.helpers.galleries import write_pictures
from tests.helpers.tiny import tiny_config, tiny_model, tiny_processor
from tests.retrieval.test_retrieval_choice import CHOICE


TOKENIZER = Path(__file__).resolve().parents[2] / "data_scripts" / "sample" / "tokenizer"
TEXTS = ["a woman in a red coat", "shoes", "a man with a black backpack and a pair of long blue jeans, walking"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model and its export."""
    root = tmp_path_factory.mktemp("export")
    model = root / "model"
    tiny_model(cls=MRAForImageTextRetrieval, scale=0.3).save_pretrained(model)
    tiny_processor().save_pretrained(model)
    replace(CHOICE, model=str(model)).save(model)  # as copied from an output folder, which names its model
    main(["export", "--model", str(model)])
    return model, model / "onnx"


@pytest.fixture(scope="module")
def encoders(folders):
    return TorchEncoder(str(folders[0])), OnnxEncoder(folders[1])


def make_images(count):
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (80, 40, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_folder_is_whole(folders):
    model, output = folders
    assert {DESCRIPTION, "config.json", "tokenizer.json", *FILES.values()} <= {path.name for path in output.iterdir()}
    assert [path.name for path in model.iterdir() if path.name.startswith(".")] == []
    description = json.loads((output / DESCRIPTION).read_text())
    assert description["name"] == str(model)
    assert set(description["differences"]) == set(FILES)
    assert all(0 < difference < 1e-4 for difference in description["differences"].values())


def test_the_choice_goes_with_the_export(folders, encoders):
    digests = [weights_digest(folder) for folder in folders]
    assert [RetrievalChoice.load(str(folder)).weights for folder in folders] == digests and digests[0] != digests[1]
    assert [encoder.match_weight for encoder in encoders] == [CHOICE.match_weight] * 2


def test_a_newer_choice_of_the_model_counts(folders, tmp_path):
    """An export beside its model follows the model's choice, and keeps the copy when it is moved."""
    model = tmp_path / "model"
    shutil.copytree(folders[0], model)
    replace(CHOICE, match_weight=0.05).save(model)
    assert OnnxEncoder(model / "onnx").match_weight == TorchEncoder(str(model)).match_weight == 0.05
    (model / "onnx").rename(tmp_path / "onnx")
    assert OnnxEncoder(tmp_path / "onnx").match_weight == CHOICE.match_weight


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
    np.testing.assert_allclose(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=0)
    assert found.hidden_states.shape == (count, *onnx_encoder.token_shape)


def test_texts_are_encoded_as_in_pytorch(encoders):
    expected, found = (encoder.encode_texts(TEXTS) for encoder in encoders)
    np.testing.assert_allclose(found.embeds, expected.embeds, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=0)
    assert found.lengths.tolist() == expected.lengths.tolist()


def test_pairs_are_matched_as_in_pytorch(encoders):
    torch_encoder, onnx_encoder = encoders
    texts, tokens = (
        torch_encoder.encode_texts(TEXTS),
        torch_encoder.encode_images(make_images(35)).hidden_states.numpy(),
    )
    expected = torch_encoder.match(texts, tokens)
    assert expected.std() > 0.05  # something to tell apart
    np.testing.assert_allclose(onnx_encoder.match(texts, tokens), expected, atol=1e-4, rtol=0)


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
    with pytest.raises(SystemExit, match=r"mra export: --output is missing: model user/model is not a local folder"):
        main(["export", "--model", "user/model"])
    for texts, message in (
        (["red", " "], "caption 1 must be a text"),
        (["\udcff"], "caption 0 must be valid Unicode"),
    ):
        for encoder in encoders:
            with pytest.raises(ValueError, match=message):
                encoder.encode_texts(texts)
    with pytest.raises(ValueError, match="images is empty"):
        encoders[1].encode_images([])


# ---------------------------------------------------------------- without PyTorch

ODD = [
    "\u00e9t\u00e9, \u0130stanbul \ufb01ne stra\u00dfe",
    "\u7ea2\u8272 coat \ud55c\uae00",
    "caf\u0065\u0301 \u1e9e\u01c5",
    "\x00\x1f\ufffd red",
    "\u200bhat\u00a0coat\u3000red",
    "[CLS] [SEP][PAD] [MASK]",
    "\U0001f600 \U00020000 red",
    "don't  -- A.B.C. 12,5% ##red ##",
    "\t red\r\ncoat ",
    "x" * 300,
    "a " * 80,
    "...",
]


def make_captions(count):
    pick = random.Random(0)
    words = [*" ".join(TEXTS).split(), *ODD, *(chr(pick.randrange(1, 0xD800)) * 2 for _ in range(200))]
    joined = [
        pick.choice(["", " ", ", ", "\n", "-"]).join(pick.choices(words, k=pick.randint(1, 30))) for _ in range(count)
    ]
    return [text for text in [*ODD, *joined] if text.strip()]


@pytest.mark.parametrize("style", CAPTION_STYLES)
def test_tokens_are_those_of_the_processor(style, tmp_path):
    processor = MRAProcessor(MRAImageProcessor(), AutoTokenizer.from_pretrained(TOKENIZER), 48, style)
    processor.save_pretrained(tmp_path)
    tokenizer = CaptionTokenizer(tmp_path, style, 48, processor.tokenizer.pad_token)
    captions = [text for text in make_captions(500) if text.strip()]
    expected, (ids, mask) = processor(text=captions), tokenizer(captions)
    assert np.array_equal(ids, expected["input_ids"]) and np.array_equal(mask, expected["attention_mask"])
    assert len(np.unique(ids, axis=0)) > 250


@pytest.fixture(scope="module")
def place(folders, tmp_path_factory):
    """A gallery built with the model beside its export."""
    folder = tmp_path_factory.mktemp("gallery")
    write_pictures(folder / "people", 6)
    with Gallery(folder / "g.db", str(folders[0]), device="cpu") as gallery:
        gallery.build(folder / "people")
    return folder / "g.db"


SEARCH = """
import sys
from mra.cli import main

main(sys.argv[1:])
print(sorted({"torch", "transformers", "timm", "datasets"} & set(sys.modules)))
"""


def test_a_search_by_text_imports_neither_pytorch_nor_transformers(place, tmp_path):
    arguments = [
        "search",
        TEXTS[0],
        "--gallery",
        str(place),
        "--json",
        "--phrase",
        "shoes",
        "--save",
        str(tmp_path / "a.png"),
    ]
    run = subprocess.run([sys.executable, "-c", SEARCH, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found, imported = map(json.loads, run.stdout.replace("'", '"').splitlines()[-2:])
    assert imported == [] and found["backend"] == "onnx" and found["reranked"] == 6
    with Gallery(place, device="cpu") as gallery:
        expected = gallery.search(TEXTS[0])
        phrases = gallery.match(["shoes"], [hit.key for hit in expected.hits])[0]
    assert expected.backend == "torch" and expected.match_weight == found["match_weight"]
    assert [hit["key"] for hit in found["hits"]] == [hit.key for hit in expected.hits]
    for hit, ours, phrase in zip(expected.hits, found["hits"], phrases, strict=True):
        assert ours["score"] == pytest.approx(hit.score, abs=1e-4)
        assert ours["similarity"] == pytest.approx(hit.similarity, abs=1e-5)
        assert ours["phrases"]["shoes"] == pytest.approx(phrase, abs=1e-4)


IMPORT = """
import importlib, pkgutil, sys
import mra.gallery

for module in pkgutil.iter_modules(mra.gallery.__path__, "mra.gallery."):
    if module.name not in ("mra.gallery.calibration", "mra.gallery.index_verbs"):  # evaluation, and data sets to index
        importlib.import_module(module.name)
print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


def test_the_gallery_is_imported_without_pytorch():
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_auto_uses_an_export_of_the_same_model_and_settings(place, folders, tmp_path, monkeypatch):
    def backend(**options):
        with Gallery(place, **{"backend": "auto", "device": "cpu"} | options) as gallery:
            return gallery.encoder.backend

    assert backend() == backend(model=str(folders[0])) == backend(backend="onnx", model=str(folders[1])) == "onnx"
    assert backend(backend="torch") == backend(dtype="bfloat16") == "torch"
    other = tmp_path / "model"
    shutil.copytree(folders[0], other)
    (other / "onnx" / DIGESTS_FILE).unlink()
    description = json.loads((other / "onnx" / DESCRIPTION).read_text())
    (other / "onnx" / DESCRIPTION).write_text(json.dumps(description | {"fingerprint": "0" * 32}))
    assert backend(model=str(other)) == "torch"
    with pytest.raises(ValueError, match=r"was built with .* \(fingerprint .*, not with"):
        backend(backend="onnx", model=str(other))
    (other / "onnx" / DESCRIPTION).write_text(json.dumps({"fingerprint": description["fingerprint"]}))
    with pytest.raises(ValueError, match=r"onnx.json lacks name, .*captions, as if an earlier version had written it"):
        backend(model=str(other))
    shutil.rmtree(other / "onnx")
    assert backend(model=str(other)) == "torch"
    with pytest.raises(
        ValueError,
        match=r"has no ONNX export \(onnx\.json is neither in it nor in its folder onnx\): make one with `mra export --model",
    ):
        backend(backend="onnx", model=str(other))
    monkeypatch.setattr("mra.gallery.state._GPU_DRIVERS", (tmp_path,))  # a GPU that `device` None may mean
    assert [backend(device=None), backend(device="cpu")] == ["torch", "onnx"]
    with pytest.raises(ValueError, match="backend must be one of auto, torch, onnx, got 'gpu'"):
        backend(backend="gpu")


def test_a_search_by_image_is_that_of_pytorch(place, folders):
    image = make_images(1)[0]
    with Gallery(place, device="cpu") as plain, Gallery(place, device="cpu", backend="auto") as gallery:
        found, expected = gallery.search("a coat", image=image), plain.search("a coat", image=image)
    assert found.backend == "onnx" and [hit.key for hit in found.hits] == [hit.key for hit in expected.hits]
    assert [hit.score for hit in found.hits] == pytest.approx([hit.score for hit in expected.hits], abs=1e-4)
