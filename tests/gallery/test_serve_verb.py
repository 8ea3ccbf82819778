"""`mra serve`: the same answers as `mra search --json`, refusals that name what is wrong, and an end on request."""

import http.client
import json
import os
import signal
import socket
import threading
import time
from urllib.parse import quote, urlencode

import pytest

from mra.cli import main
from mra.gallery import Gallery
from mra.gallery.search_verb import to_json
from mra.gallery.serve_verb import SearchServer
from mra.gallery.types import MAX_TEXT
from tests.helpers.galleries import encoder_of, write_pictures


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    keys = write_pictures(folder / "people", 6)
    with Gallery(folder / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(folder / "people", [{"path": key, "camera": f"c{n % 2}"} for n, key in enumerate(keys)])
    return folder / "g.db"


@pytest.fixture(scope="module")
def server(place, model):
    with (
        SearchServer(0) as server,
        Gallery(place, encoder=encoder_of(model)) as gallery,
        server.serving(gallery),
    ):
        yield server


def ask(server, target, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request(method, target, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer, json.loads(content) if content else None


def search(server, **values):
    return ask(server, f"/search?{urlencode(values)}")


def test_answers_are_those_of_the_command(server):
    asked = {"text": "a red coat & hät", "top": 3, "rerank": 4, "where": 'camera == "c0"'}
    answer, found = search(server, **asked)
    assert answer.status == 200 and answer.headers["Content-Type"] == "application/json; charset=utf-8"
    gallery = server.gallery
    expected = gallery.search(asked["text"], top=3, rerank=4, where=asked["where"])
    assert found["query"] == asked["text"] and found["reranked"] == 3 and found["backend"] == "torch"
    assert [(hit["key"], hit["score"]) for hit in found["hits"]] == [(hit.key, hit.score) for hit in expected.hits]
    assert found.keys() == json.loads(to_json("", expected, [], [])).keys()
    assert ask(server, "/health")[1] == {"status": "ok"}


def test_searches_at_the_same_time_are_all_answered(server):
    found = {}

    def run(number):
        found[number] = search(server, text=f"a coat {number}")[1]["query"]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {number: f"a coat {number}" for number in range(8)}


@pytest.mark.parametrize(
    "query, message",
    [
        ("", "text must have at least one word"),
        ("text=%20", "text must have at least one word"),
        (f"text={'x' * (MAX_TEXT + 1)}", "text must have at most 1,000 characters, got 1,001"),
        ("text=x&top=0", "top must be a whole number of at least 1, got '0'"),
        ("text=x&top=1e9", "top must be a whole number of at least 1, got '1e9'"),
        ("text=x&rerank=-1", "rerank must be a whole number of at least 0, got '-1'"),
        (f"text=x&rerank={'9' * 5000}", "rerank must be a whole number"),
        ("text=x&top=%D9%A3", "top must be a whole number"),
        ("text=x&where=hat%20%3D%3D%201", "where: 'hat' is not a field of this gallery"),
        (f"text=x&where={'x' * 4001}", "where is 4001 characters long"),
        ("text=x&image=%2Fetc%2Fpasswd", "parameter 'image' is unknown: expected text, top, rerank, where"),
        ("text=x&text=y", "a parameter is given twice"),
        ("text=%FF", "the query cannot be read"),
        ("text", "the query cannot be read"),
    ],
)
def test_wrong_parameters_are_named(server, query, message):
    answer, found = ask(server, f"/search?{query}")
    assert answer.status == 400 and found["error"].startswith(message)


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1:1"},
        {"Host": "localhost.evil.example:{port}"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
@pytest.mark.parametrize("target", ["/search?text=x", "/health"])
def test_other_hosts_and_origins_are_refused(server, headers, target):
    answer, found = ask(server, target, **{name: value.format(port=server.port) for name, value in headers.items()})
    assert answer.status == 403 and set(found) == {"error"}
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_own_names_are_accepted(server):
    for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1", f"127.0.0.1:{server.port}"):
        assert ask(server, "/health", Host=host)[0].status == 200
    origin = f"http://localhost:{server.port}"
    assert ask(server, "/health", Origin=origin, Sec_Fetch_Site="same-origin")[0].status == 200


def test_two_hosts_or_none_are_refused(server):
    for hosts in ("", f"Host: localhost\r\nHost: 127.0.0.1:{server.port}\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(f"GET /health HTTP/1.0\r\n{hosts}\r\n".encode())
            assert b" 403 " in connection.recv(100)


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_only_get_is_allowed(server, method):
    answer, found = ask(server, "/search?text=x", method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")
    assert found is None if method == "HEAD" else "expected GET" in found["error"]


@pytest.mark.parametrize("target", ["/", "/search/", "/etc/passwd", "/../../etc/passwd", "http://evil.example/x"])
def test_there_are_no_files(server, target):
    answer, found = ask(server, target, Host=f"localhost:{server.port}")
    assert answer.status == 404 and found == {"error": "expected /search?text=... or /health"}


def test_what_is_not_http_is_refused_as_json(server):
    for request in (b"hello\r\n\r\n", b"FOO / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(request)
            received = b""
            while part := connection.recv(4096):
                received += part
        assert b'{"error": ' in received and b"Traceback" not in received


def test_an_error_of_the_gallery_is_answered_and_the_server_goes_on(server, monkeypatch, caplog):
    def fail(*arguments, **options):
        raise ValueError("gallery g.db cannot be read")

    monkeypatch.setattr(server.gallery, "search", fail)
    answer, found = search(server, text="x")
    assert answer.status == 500 and found == {"error": "gallery g.db cannot be read"}
    monkeypatch.undo()
    assert search(server, text="x")[0].status == 200


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=rf"--port {server.port} cannot be used \(Address already in use\)"):
        SearchServer(server.port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_on_request(place, model, monkeypatch, capsys, number):
    monkeypatch.setattr("mra.gallery.state.GalleryState._load_encoder", lambda state, name: encoder_of(model))
    found = []

    def ask_and_stop():
        deadline, printed = time.monotonic() + 60, ""
        while "/search" not in printed and time.monotonic() < deadline:
            time.sleep(0.05)
            printed += capsys.readouterr().out
        port = int(printed.rpartition("127.0.0.1:")[2].partition("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", f"/search?text={quote('a red coat')}")
        found.append(json.loads(connection.getresponse().read()))
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    thread = threading.Thread(target=ask_and_stop)
    thread.start()
    main(["serve", "--gallery", str(place), "--port", "0"])
    thread.join()
    assert len(found[0]["hits"]) == 6 and signal.getsignal(number) == handler
    with Gallery(place) as gallery:  # it is free again
        assert len(gallery) == 6
