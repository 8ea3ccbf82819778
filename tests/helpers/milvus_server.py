"""A standalone Milvus server that asks for a password, for the tests that need a real one (make test-server)."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """Address and token of a running server."""

    uri: str
    token: str = "root:Milvus"  # what Milvus itself sets up


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Starts the server of the package `milvus`, which cannot be told to listen on this machine alone, hence the password."""
    from milvus import MilvusServer

    server = MilvusServer()
    server.set_base_dir(str(folder))
    server.config.set("authorization_enabled", True)
    try:
        server.start()  # returns when it is healthy
        yield Server(f"http://127.0.0.1:{server.listen_port}")
    finally:
        server.stop()
