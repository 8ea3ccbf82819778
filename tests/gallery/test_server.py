"""The commands on a gallery that lies on a real Milvus server: token, several clients at a time, removal."""

import json

import pytest

from mra.cli import main
from mra.gallery import Gallery
from mra.gallery.milvus import MilvusStore
from tests.helpers.galleries import encoder_of, save_tiny_model, write_pictures


pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_life_of_a_gallery_on_a_server(milvus_server, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MILVUS_TOKEN", milvus_server.token)
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = write_pictures(tmp_path / "people", 6)
    place = ["--gallery", milvus_server.uri, "--collection", "life"]

    def run(*words):
        capsys.readouterr()
        main([*map(str, words), *place])
        return capsys.readouterr().out

    build = ("build", "--images", tmp_path / "people", "--model", model, "--device", "cpu")
    assert "6 added" in run("index", *build)
    assert "6 unchanged" in run("index", *build)
    ask = ("a red coat", "--json", "--device", "cpu", "--top", 9)
    first = json.loads(run("search", *ask))
    with Gallery(":memory:", encoder=encoder_of(model)) as exact:
        exact.build(tmp_path / "people")
        assert [hit["key"] for hit in first["hits"]] == [hit.key for hit in exact.search("a red coat").hits]
    with Gallery(milvus_server.uri, token=milvus_server.token, collection="life", device="cpu") as other:
        assert len(other) == 6  # one client more at the same time
        assert "removed 1 images" in run("index", "remove", "--keys", keys[0])
        assert len(other) == 5 and keys[0] not in {hit.key for hit in other.search("a red coat", rerank=0).hits}
    assert "5 images, 0 problems" in run("index", "verify")
    assert json.loads(run("index", "stats", "--json"))["images"] == 5
    assert list((tmp_path / ".cache" / "mra_retrieval").rglob("*.safetensors"))


@pytest.mark.parametrize("token", [None, "root:wrong"])
def test_a_wrong_token_is_refused_and_not_repeated(milvus_server, token):
    with pytest.raises(ValueError, match=r"gallery http://.* cannot be opened .*: check address, token") as caught:
        MilvusStore(milvus_server.uri, "people", token)
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_every_kind_of_index_searches_and_is_remembered(milvus_server, model, tmp_path, kind):
    options = {"token": milvus_server.token, "collection": f"kind_{kind}", "files": tmp_path / "files"}
    write_pictures(tmp_path / "people", 6)
    with Gallery(milvus_server.uri, encoder=encoder_of(model), index=kind, **options) as gallery:
        gallery.build(tmp_path / "people")
        expected = [hit.key for hit in gallery.search("a red coat").hits]
    with Gallery(milvus_server.uri, encoder=encoder_of(model), **options) as gallery:
        assert [hit.key for hit in gallery.search("a red coat").hits] == expected and len(expected) == 6
        assert gallery._state.store.is_exact == (kind == "flat")
