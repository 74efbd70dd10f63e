"""A stand-in for the endpoint of the Hugging Face Hub, on loopback: repositories are folders of this machine."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISIONS = {"main": "a" * 40, "v1": "b" * 40}
"""Commits of the names of revisions."""


class Handler(BaseHTTPRequestHandler):
    """Answers as hub-docs describes ``resolve``: the commit and an ETag in headers, 404 with an error code."""

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, *, head: bool):
        self.server.asked.append(self.path)
        parts = self.path.strip("/").split("/")
        if len(parts) != 5 or parts[2] != "resolve":
            return self.fail("EntryNotFound")
        org, name, _, revision, file = parts
        commit = REVISIONS.get(revision, revision)
        if f"{org}/{name}" not in self.server.repositories:
            return self.fail("RepoNotFound")
        commits = self.server.repositories[f"{org}/{name}"]
        if commit not in commits:
            return self.fail("RevisionNotFound")
        path = commits[commit] / file
        if not path.is_file():
            return self.fail("EntryNotFound", commit)
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not head:
            self.wfile.write(content)
        return None

    def fail(self, code: str, commit: str = ""):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@contextmanager
def served(repositories: dict[str, dict[str, Path]]) -> Iterator[tuple[str, list[str]]]:
    """Serve repositories, each with a folder for each commit. Gives the endpoint, and the paths that were asked for."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories, server.asked = repositories, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
