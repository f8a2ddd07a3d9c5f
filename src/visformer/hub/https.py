"""The part of HTTP that a download needs: one GET, from a position on, with every failure as one of two.

`Dropped` may go well at another attempt (a lost connection, a silent or busy server), `Refused` will not (404, a wrong
certificate, a redirect to plain http). Addresses are https; plain http is for this machine itself.
"""

from __future__ import annotations

import ipaddress
import re
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse, InvalidURL
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from visformer.errors import UsageError

TIMEOUT_S = 30.0  # of silence
_BUSY = {408, 425, 429, 500, 502, 503, 504}


class Dropped(Exception):  # noqa: N818 (it says what happened)
    """This attempt failed, and another may not. `retry_after_s` is what the server asks to wait, in seconds."""

    def __init__(self, reason: str, retry_after_s: float = 0.0):
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Refused(Exception):  # noqa: N818
    """No attempt can succeed, for the reason that it states."""


@dataclass
class Response:
    """The file from position `start` on; `total` is the size of all of it in bytes, None where the server is silent."""

    raw: HTTPResponse | None
    start: int
    total: int | None
    validator: str | None = None  # names this version of the file: a strong ETag, or the date of its last change
    unsatisfiable: bool = False  # nothing comes: the file ends at or before the position that was asked for

    def chunks(self, size: int) -> Iterator[bytes]:
        """What comes, in pieces of at most `size` bytes, as soon as they are there."""
        left = None if self.total is None else self.total - self.start
        while self.raw is not None and (left is None or left > 0):
            try:
                data = self.raw.read1(size if left is None else min(size, left))
            except (OSError, HTTPException) as error:
                raise _problem(error, connected=True) from error
            if not data:
                return
            left = None if left is None else left - len(data)
            yield data


@contextmanager
def open_url(url: str, start: int = 0, validator: str | None = None) -> Iterator[Response]:
    """GET `url`, from byte `start` on if the file is still the version that `validator` names, else all of it."""
    headers = {"User-Agent": "visformer", "Accept-Encoding": "identity"}
    if start and validator:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    request = Request(quote(url, safe="%/:=&?~+!$,;'@()*[]"), headers=headers)
    try:
        raw = _opener(url).open(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        with error:
            yield _without_body(error)
        return
    except (URLError, OSError, HTTPException) as error:
        raise _problem(error, connected=False) from error
    with closing(raw):
        yield _response(raw)


def check_url(url: str) -> SplitResult:
    """The parts of `url`. Raises `UsageError` for one that is not https, or that carries a password."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{url}: not an address ({error})") from error
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"{redacted(url)}: a user name or password in the address is not taken; leave it out")
    if not host or not _is_safe(parts):
        raise UsageError(f"{redacted(url)}: only https:// addresses are taken, so that nobody on the way can change it")
    return parts


def redacted(url: str) -> str:
    """`url` for messages: without user name, query and fragment, any of which may be a secret."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _is_safe(parts: SplitResult) -> bool:
    return parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(parts.hostname))


def _is_loopback(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


class _Redirects(HTTPRedirectHandler):
    """Follows redirects that stay on https."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str):
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        if after.scheme != "https" and not (before.scheme == "http" and _is_safe(after)):
            raise Refused(f"it redirects to {redacted(newurl)}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(url: str) -> OpenerDirector:
    proxies = [ProxyHandler({})] if _is_loopback(urlsplit(url).hostname) else []  # else those of the environment
    return build_opener(_Redirects(), *proxies)


def _response(raw: HTTPResponse) -> Response:
    headers = raw.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(f"the server sends it packed ({headers['Content-Encoding']})")
    if headers.get_content_type() == "text/html":
        raise Refused("the server sends a web page in its place")
    if raw.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
        if not match:
            raise Refused("the server does not say which part of the file it sends")
        start, total = int(match[1]), int(match[2]) + 1 if match[3] == "*" else int(match[3])
    elif raw.status == 200:
        length = headers.get("Content-Length", "")
        start, total = 0, int(length) if length.isdigit() else None
    else:
        raise Refused(f"the server says {raw.status} {raw.reason}")
    return Response(raw, start, total, _validator(headers))


def _validator(headers: HTTPMessage) -> str | None:
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified")  # W/"..." is no promise of equal bytes


def _without_body(error: HTTPError) -> Response:
    if error.code == 416:
        match = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        return Response(None, 0, int(match[1]) if match else None, unsatisfiable=True)
    says = f"the server says {error.code} {str(error.reason).splitlines()[0] if error.reason else ''}".rstrip()
    if error.code in _BUSY:
        after = error.headers.get("Retry-After", "")
        raise Dropped(says, float(after) if after.isdigit() else 0.0)
    raise Refused(says)


def _problem(error: Exception, *, connected: bool) -> Dropped | Refused:
    """What a failure of the connection means."""
    reason = error.reason if isinstance(error, URLError) else error
    if isinstance(reason, TimeoutError):
        return Dropped(f"no answer within {TIMEOUT_S:g} s")
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Refused(f"the server's certificate is not trusted ({reason.verify_message})")
    if isinstance(reason, InvalidURL):
        return Refused(f"not an address ({reason})")
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    lost = connected or isinstance(reason, (ConnectionResetError, BrokenPipeError, HTTPException))
    return Dropped(f"the connection was lost ({text})") if lost else Refused(f"no connection ({text})")
