"""The stand-in of the Hub takes what the real client sends, and the real libraries load back what it keeps."""

import subprocess
import sys

import pytest

from tests.helpers.hub_server import HubServer
from tests.helpers.sources import ROOT, run_client, write_json, write_sda


@pytest.fixture
def client(hub_server, tmp_path):
    """Runs code in a client process; gives what it prints."""

    def run(code: str, name: str = "client", login: bool = True) -> str:
        return run_client(code, tmp_path / "elsewhere", env=hub_server.environment(name, login))

    return run


def prepare(server: HubServer, root, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_scripts.prepare_sda", "--annotations", str(root / "sda")]
    command += ["--images", str(root / "images"), "--output", str(root / "out"), "--push_to_hub", "user/SDA"]
    environment = server.environment("uploader", login="--no_login" not in options)
    options = [option for option in options if option != "--no_login"]
    return subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_pushed_set_loads_from_the_hub(hub_server, client, tmp_path):
    rows = write_sda(tmp_path)
    rows["sda_5000_10000.json"][0]["caption"] = ""
    write_json(tmp_path / "sda" / "sda_5000_10000.json", rows["sda_5000_10000.json"])
    first = prepare(hub_server, tmp_path, "--on_error", "skip", "--num_proc", "2")
    assert first.returncode == 0, first.stderr
    assert "pushed to http://127.0.0.1" in first.stdout
    files = hub_server.files("user/SDA", "datasets")
    shards = sorted(f"data/{path.name}" for path in (tmp_path / "out/data").iterdir())
    assert len(shards) == 2
    assert sorted(files) == [".gitattributes", "README.md", *shards, "digests.json"]  # not what was left out
    assert files[shards[0]].read_bytes() == (tmp_path / "out" / shards[0]).read_bytes()
    assert 'load_dataset("user/SDA")' in files["README.md"].read_text()

    again = prepare(hub_server, tmp_path, "--on_error", "skip", "--overwrite")  # one shard now
    assert again.returncode == 0, again.stderr
    files = hub_server.files("user/SDA", "datasets")
    (shard,) = (tmp_path / "out/data").iterdir()
    assert sorted(files) == [".gitattributes", "README.md", f"data/{shard.name}", "digests.json"]

    code = """
from datasets import load_dataset
table = load_dataset("user/SDA")["train"]
streamed = list(load_dataset("user/SDA", "caption", split="train", streaming=True))
assert [row["caption"] for row in streamed] == list(table["caption"])
assert {row["image"].size for row in table} == {(12, 24)}
print(table.column_names, list(table["image_id"]))
"""
    printed = client(code, "reader", login=False)
    assert printed.strip() == f"{['image', 'caption', 'image_id', 'boxes', 'logits', 'phrases']} {list(range(1, 9))}"


def test_a_push_that_is_not_allowed_fails_before_any_work(hub_server, tmp_path):
    write_sda(tmp_path)
    run = prepare(hub_server, tmp_path, "--no_login")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "prepare_sda: --push_to_hub user/SDA: the repository cannot be created" in run.stderr
    assert not (tmp_path / "out").exists()


def test_an_upload_that_fails_leaves_the_set_on_disk(hub_server, tmp_path, monkeypatch):
    write_sda(tmp_path)
    monkeypatch.setattr("tests.helpers.hub_server._Handler._apply", lambda *arguments: 1 / 0)  # drops the connection
    monkeypatch.setattr(hub_server._server, "handle_error", lambda *arguments: None)
    run = prepare(hub_server, tmp_path)
    assert run.returncode == 1
    assert "the upload failed: " in run.stderr and f"the complete dataset is in {tmp_path / 'out'}" in run.stderr
    assert (tmp_path / "out/README.md").is_file()
    assert "--exclude rejected.jsonl --delete 'data/*.parquet'`" in run.stderr


def test_commits_of_the_client(hub_server, client):
    code = """
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
api = HfApi()
assert api.whoami()["name"] == "user"
api.create_repo("user/model")
api.create_repo("user/model", exist_ok=True)
try:
    api.create_repo("user/model")
    raise SystemExit("a second repository of that name")
except HfHubHTTPError as error:
    assert error.response.status_code == 409
big = bytes(range(256)) * 5000
first = api.create_commit("user/model", [
    CommitOperationAdd("config.json", b'{"a": 1}'),
    CommitOperationAdd("weights/model.safetensors", big),
    CommitOperationAdd("empty.txt", b""),
], commit_message="first")
second = api.create_commit("user/model", [
    CommitOperationAdd("config.json", b'{"a": 2}'),
    CommitOperationAdd("weights/model.safetensors", big),
    CommitOperationDelete("empty.txt"),
], commit_message="second")
assert api.list_repo_files("user/model") == [".gitattributes", "config.json", "weights/model.safetensors"]
assert open(hf_hub_download("user/model", "config.json")).read() == '{"a": 2}'
assert open(hf_hub_download("user/model", "config.json", revision=first.oid)).read() == '{"a": 1}'
folder = snapshot_download("user/model")
assert open(folder + "/weights/model.safetensors", "rb").read() == big
items = api.get_paths_info("user/model", ["config.json", "weights"], expand=False)
sizes = {item.path: item.size for item in items if hasattr(item, "size")}
assert sizes == {"config.json": 8}, sizes
for call, error in [
    (lambda: hf_hub_download("user/model", "nothing"), EntryNotFoundError),
    (lambda: hf_hub_download("user/nobody", "config.json"), RepositoryNotFoundError),
]:
    try:
        call()
        raise SystemExit("found what is not there")
    except error:
        pass
api.create_repo("user/hidden", repo_type="dataset", private=True)
api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="user/hidden", repo_type="dataset")
try:
    HfApi(token=False).dataset_info("user/hidden")
    raise SystemExit("a private repository was shown")
except RepositoryNotFoundError:
    pass
print(second.oid)
"""
    oid = client(code).strip()
    repository = hub_server.repositories["models", "user/model"]
    assert repository.head == oid
    assert repository.messages == ["initial commit", "first", "second"]
    assert sum(line.startswith("PUT /lfs-upload/") for line in hub_server.requests) == 1  # kept, not sent again
    unknown = [line for line in hub_server.refused if "is not spoken here" in line]
    assert unknown == []
