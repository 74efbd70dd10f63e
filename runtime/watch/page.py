"""Puts the page of a live decoder together: one HTML file with its style and its script in it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from sjepa_deploy.pages.page import style

STYLE, SCRIPTS = "dashboard.css", ("charts.js", "dashboard.js")
"""Files beside this module that go into `dashboard.html`."""


def page_text() -> str:
    """Return the page."""

    def read(name: str) -> str:
        return resources.files("sjepa_deploy.runtime.watch").joinpath(name).read_text(encoding="utf-8")

    page = read("dashboard.html")
    page = page.replace("<style></style>", f"<style>\n{style()}{read(STYLE)}</style>")
    return page.replace("<script></script>", f"<script>\n{''.join(map(read, SCRIPTS))}</script>")


def security_policy(page: str) -> str:
    """Return the Content-Security-Policy of `page`: its own style and script by their hashes, its own server, nothing else."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'" for block in blocks)

    return (
        f"default-src 'none'; style-src {hashes('style')}; script-src {hashes('script')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
