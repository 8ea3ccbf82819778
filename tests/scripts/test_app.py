"""app.py: its API as a program uses it, and files that nobody may fetch."""

import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from mra.web import server
from mra.web.arguments import PageArguments
from tests.helpers.app import ROOT, make_gallery, running_page


gradio_client = pytest.importorskip("gradio_client", reason="the web page is tested by make test-app")
Client, handle_file, AppError = gradio_client.Client, gradio_client.handle_file, gradio_client.exceptions.AppError
gradio = pytest.importorskip("gradio")

pytestmark = pytest.mark.app


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def url(root):
    gallery = make_gallery(root)
    (root / "secret.jpg").write_bytes((root / "people" / "cam_0" / "000.jpg").read_bytes())
    with running_page(gallery, root / "page.log", "--images", str(root / "people"), "--max_upload_mb", "1") as url:
        yield url


@pytest.fixture(scope="module")
def client(url, root):
    client = Client(url, download_files=str(root / "downloads"), verbose=False)
    yield client
    client.close()


def ask(client, text="a red coat", image=None, cameras=(), where="", rerank=True, top=5):
    return client.predict(text, image, list(cameras), "", "", where, 0.5, rerank, top, api_name="/search")


def fetch(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_program_searches_and_explains(client):
    found = ask(client)
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4, 5] and found["threshold"] == 0.5
    assert all(0 < hit["score"] < 1 and "path" not in hit for hit in found["hits"])
    only = ask(client, cameras=["cam_1"], where='key != "cam_1/001.png"')["hits"]
    assert {hit["camera"] for hit in only} == {"cam_1"} and len(only) == 2
    key = found["hits"][0]["key"]
    picture = client.predict("a red coat", key, api_name="/explain")
    assert Image.open(picture).width > 300
    scores = client.predict("red coat, hat", key, api_name="/score_phrases")
    assert list(scores) == ["red coat", "hat"] and all(0 < score < 1 for score in scores.values())


def test_a_program_searches_by_an_image(client, root):
    image = handle_file(root / "people" / "cam_2" / "002.bmp")
    assert ask(client, text="", image=image)["hits"][0]["key"] == "cam_2/002.bmp"
    assert ask(client, image=image)["hits"][0]["score"] is not None


def test_a_program_is_told_what_is_wrong(client):
    with pytest.raises(AppError, match="description and image are empty"):
        ask(client, text="")
    with pytest.raises(AppError, match="is not a field of this gallery"):
        ask(client, where='password == "x"')
    with pytest.raises(AppError, match="no image of the gallery has the key"):
        client.predict("a red coat", "../../secret.jpg", api_name="/explain")


def test_only_the_three_endpoints_are_public(client):
    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/search", "/explain", "/score_phrases"}
    assert client.view_api(return_format="dict")["unnamed_endpoints"] == {}


@pytest.mark.parametrize("prefix", ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/gradio_api/"])
def test_no_file_is_served(url, root, prefix):
    """Not even those of the gallery: the page holds its pictures itself."""
    secret = root / "secret.jpg"
    wanted = [secret, root / "people" / "cam_0" / "000.jpg", root / "model" / "config.json", ROOT / "app.py"]
    wanted += [
        "/etc/passwd",
        "app.py",
        "setup.cfg",
        "../secret.jpg",
        "%2e%2e/%2e%2e/etc/passwd",
        root / "gallery.db" / "LOCK",
    ]
    wanted += [root / "people" / ".." / "secret.jpg", f"file://{secret}", "~/.bashrc"]
    for path in wanted:
        status, content = fetch(url + prefix + urllib.parse.quote(str(path), safe="/%:"))
        assert status in (400, 403, 404, 405) and len(content) < 500, (prefix, path, status)


def call(url, endpoint, *values) -> str:
    """What an endpoint answers to whoever writes the request himself: gradio_client would upload a file that is named."""
    address, headers = f"{url}/gradio_api/call/{endpoint}", {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps({"data": values}).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{address}/{event}", timeout=60) as answer:
        return answer.read().decode()


def test_a_picture_on_this_machine_cannot_be_passed_for_an_upload(root, url):
    """A request may claim that any path is an upload of its own."""
    options = ([], "", "", "", 0.5, True, 5)
    assert "event: complete" in call(url, "search", "a red coat", None, *options)
    for name in ("secret.jpg", "people/cam_0/000.jpg"):
        forged = {"path": str(root / name), "meta": {"_type": "gradio.FileData"}}
        answer = call(url, "search", "", forged, *options)
        assert "event: error" in answer and "hits" not in answer
        assert (root / name).is_file()


def test_the_page_comes_without_anything_from_outside(url):
    status, page = fetch(url)
    assert status == 200 and b"Search your own people" in page
    assert b"fonts.googleapis" not in page and b"cdnjs" not in page
    assert '"analytics_enabled":false' in fetch(url + "/config")[1].decode().replace(" ", "")


def test_large_uploads_are_refused(url, root):
    (root / "large.png").write_bytes(bytes(1_200_000))
    boundary = "x" * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="large.png"\r\n\r\n'
    body = head.encode() + (root / "large.png").read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(
        url + "/gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == 413


def test_it_listens_on_this_machine_alone(url):
    port = urllib.parse.urlsplit(url).port
    outside = [info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    for address in {address for address in outside if not address.startswith("127.")}:
        with socket.socket() as tried:
            tried.settimeout(2)
            assert tried.connect_ex((address, port)) != 0


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, [], "127.0.0.1"),
        ({"GRADIO_SERVER_NAME": "0.0.0.0"}, [], "127.0.0.1"),  # must be said to this page
        ({}, ["--host", "0.0.0.0"], "0.0.0.0"),
        ({"SPACE_ID": "user/space"}, [], "0.0.0.0"),
    ],
)
def test_the_address_must_be_asked_for(root, url, monkeypatch, environment, arguments, expected):
    monkeypatch.delenv("SPACE_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launched = {}
    monkeypatch.setattr(gradio.Blocks, "launch", lambda self, **options: launched.update(options))
    monkeypatch.setitem(os.environ, "GRADIO_TEMP_DIR", "")
    server.main(["--gallery", str(root / "empty.db"), *arguments])
    assert launched["server_name"] == expected
    assert launched["allowed_paths"] == [] and not launched["share"] and not launched["run_history"]
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_nothing_of_an_upload_is_left_when_the_page_stops(root):
    gallery, scratch = root / "empty.db", root / "scratch"
    scratch.mkdir()
    with running_page(gallery, root / "stopped.log", env={"TMPDIR": str(scratch)}) as url:
        client = Client(url, verbose=False)
        with pytest.raises(AppError, match="gallery is empty"):
            ask(client, text="", image=handle_file(root / "secret.jpg"))
        client.close()
        assert list(scratch.rglob("secret.jpg"))
    assert not list(scratch.rglob("secret.jpg"))


def test_what_is_wrong_is_told_without_a_traceback(root, monkeypatch):
    monkeypatch.setitem(os.environ, "GRADIO_TEMP_DIR", "")
    monkeypatch.delenv("MRA_GALLERY", raising=False)
    with pytest.raises(SystemExit):
        server.main([])
    with pytest.raises(SystemExit, match=r"app.py: model .* is neither a folder"):
        server.main(["--gallery", str(root / "other.db"), "--model", str(root / "nowhere")])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"app.py: port {port} is in use: pass a different --port"):
            server.main(["--gallery", str(root / "other.db"), "--port", port])
    monkeypatch.setenv("MRA_GALLERY", "x.db")
    assert PageArguments().gallery == "x.db"
