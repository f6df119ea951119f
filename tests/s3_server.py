"""An S3 server on the loopback address, whose puts and gets can be made to fail."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Fault = Callable[[str, str], bool]  # method, path -> whether the connection breaks half-way


class Server:
    """The server; `fault` decides of each request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, path: False
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._http = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def _answer(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self.fault(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        return self._moto(environ, start_response)

    @contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join(10)


@contextmanager
def s3_server() -> Iterator[Server]:
    """Run a server with an empty bucket named `bucket`, for which the environment is set."""
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with Server().running() as server, pytest.MonkeyPatch.context() as patch:
        values = {
            "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        }  # fmt: skip
        for name, value in values.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        try:
            yield server
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
