"""The files of the console, read once.

They are served under a path that holds a digest of them all: a browser keeps them for good, and
what it has kept of another version is never mixed in. The first page alone is asked for each time.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

PAGES = Path(__file__).parent / "pages"
INDEX = "index.html"
ICON = "icon.svg"
# Stands in the first page for the path of the other files.
ASSETS_MARK = "ASSETS"
CONTENT_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# What is smaller gains nothing.
COMPRESS_OVER_BYTES = 512
FOR_GOOD = "public, max-age=31536000, immutable"
ASK_EACH_TIME = "no-cache"


@dataclass(frozen=True, slots=True)
class _Asset:
    content: bytes
    compressed: bytes | None
    content_type: str
    etag: str


class Assets:
    """Routes of the files."""

    def __init__(self, folder: Path = PAGES) -> None:
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in CONTENT_TYPES
        }
        digest = hashlib.sha256()
        for name, content in files.items():
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        self._digest = digest.hexdigest()[:16]
        self.base = f"/assets/{self._digest}"
        index = files.pop(INDEX).replace(ASSETS_MARK.encode(), self.base.encode())
        self._index = _asset(INDEX, index)
        self._files = {name: _asset(name, content) for name, content in files.items()}

    def routes(self) -> list[web.RouteDef]:
        """The first page, and the files that it asks for."""
        return [
            web.get("/", self._get_index),
            web.get("/favicon.ico", self._get_icon),
            web.get("/assets/{digest}/{name:.+}", self._get_file),
        ]

    async def _get_index(self, request: web.Request) -> web.Response:
        return _answer(request, self._index, ASK_EACH_TIME)

    async def _get_icon(self, request: web.Request) -> web.Response:
        """Asked for by browsers that show an answer which is no page."""
        return _answer(request, self._files[ICON], ASK_EACH_TIME)

    async def _get_file(self, request: web.Request) -> web.Response:
        asset = self._files.get(request.match_info["name"])
        if asset is None or request.match_info["digest"] != self._digest:
            raise web.HTTPNotFound
        return _answer(request, asset, FOR_GOOD)


def _asset(name: str, content: bytes) -> _Asset:
    compressed = gzip.compress(content, mtime=0) if len(content) > COMPRESS_OVER_BYTES else None
    etag = hashlib.sha256(content).hexdigest()[:16]
    return _Asset(content, compressed, CONTENT_TYPES[Path(name).suffix], etag)


def _answer(request: web.Request, asset: _Asset, caching: str) -> web.Response:
    headers = {"ETag": f'"{asset.etag}"', "Cache-Control": caching, "Vary": "Accept-Encoding"}
    known = request.if_none_match or ()
    if any(each.value in (asset.etag, "*") for each in known):
        return web.Response(status=304, headers=headers)
    body = asset.content
    if asset.compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        body = asset.compressed
    return web.Response(
        body=body, headers=headers, content_type=asset.content_type, charset="utf-8"
    )
