"""Fetching is tested against a real server on loopback, with names resolved as the test says."""

import asyncio
import base64
import ipaddress
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from duomo.errors import FetchRefused, MediaError, MediaTooLarge, UnsupportedMedia
from duomo.processing import media
from duomo.processing.media import FetchRules, fetch, is_public

PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
OPEN = FetchRules(allow_private=True, timeout_s=2)


def get(url, kind="image", rules=OPEN):
    return asyncio.run(fetch(url, kind, rules))


def data_url(data=PNG, mime="image/png"):
    return f"data:{mime};base64," + base64.b64encode(data).decode()


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path
        self.server.hosts.append(self.headers["Host"])
        if path == "/ok.png":
            self.reply(200, PNG)
        elif path == "/page":
            self.reply(200, b"<html>hello</html>")
        elif path == "/loop":
            self.reply(302, b"", Location="/loop")
        elif path.startswith("/to/"):
            self.reply(302, b"", Location=path[4:])
        elif path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                try:
                    self.wfile.write(b"\x89")
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.1)
        elif path == "/long":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG * 2000)
        else:
            self.reply(404, b"")

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.hosts = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def at(site, path):
    return f"http://127.0.0.1:{site.server_port}{path}"


def test_the_same_bytes_by_data_http_and_file(site, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    rules = FetchRules(allow_private=True, file_root=tmp_path)
    assert get(data_url()) == get(at(site, "/ok.png")) == get(f"file://{tmp_path}/a.png", rules=rules) == PNG


@pytest.mark.parametrize(
    "url, error",
    [
        ("data:image/png;base64,@@@@", MediaError),
        ("data:image/png;base64", MediaError),
        (data_url(mime="text/html"), UnsupportedMedia),
        (data_url(b"<svg/>", "image/svg+xml"), UnsupportedMedia),
        (data_url(b"II*\0", "image/tiff"), UnsupportedMedia),
        (data_url(b"\0\0\0\x0cjP  \r\n\x87\n", "image/jp2"), UnsupportedMedia),
        (data_url(b""), UnsupportedMedia),
        (data_url(b"\0\0\0\x18ftypmp42", "image/png"), UnsupportedMedia),
        ("ftp://example.com/a.png", FetchRefused),
        ("", FetchRefused),
        ("picture.png", FetchRefused),
        ("file:///etc/passwd", FetchRefused),
        ("http://user:pass@example.com/a.png", FetchRefused),
        ("http://", FetchRefused),
    ],
)
def test_addresses_that_are_refused(url, error):
    with pytest.raises(error) as wrong:
        get(url, rules=FetchRules())
    assert "\n" not in wrong.value.message and "/etc" not in wrong.value.message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "0x7f000001", "2130706433", "0177.0.0.1", "127.1", "0.0.0.0",
        "169.254.169.254", "10.0.0.1", "192.168.1.1", "172.16.0.1", "100.64.0.1", "[fd00::1]", "[fe80::1]",
        "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "[ff02::1]", "[::]",
    ],
)  # fmt: skip
def test_private_addresses_in_every_spelling_are_refused(host):
    with pytest.raises(FetchRefused):
        get(f"http://{host}:9/a.png", rules=FetchRules(timeout_s=2))


def test_public_addresses_are_public():
    for text in ("8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ipaddress.ip_address(text)), text


def test_a_name_that_resolves_to_a_private_address_is_refused(monkeypatch):
    async def rows(self, host, port, **_):
        return [(2, 1, 6, "", ("8.8.8.8", port)), (2, 1, 6, "", ("10.0.0.7", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rows)
    with pytest.raises(FetchRefused):
        get("http://innocent.example/a.png", rules=FetchRules())


def test_the_vetted_address_is_the_one_connected_to(site, monkeypatch):
    """The name is resolved once; what is connected to is the address that was judged."""
    asked = []

    async def rows(self, host, port, **_):
        asked.append(host)
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", rows)
    monkeypatch.setattr(media, "is_public", lambda address: True)
    site.hosts.clear()
    assert get(f"http://name.example:{site.server_port}/ok.png", rules=FetchRules()) == PNG
    assert asked.count("name.example") == 1
    assert site.hosts == [f"name.example:{site.server_port}"]


def test_a_redirect_is_judged_anew(site, monkeypatch):
    judged = []

    def once(address):
        judged.append(address)
        return len(judged) == 1

    monkeypatch.setattr(media, "is_public", once)
    with pytest.raises(FetchRefused, match="private"):
        get(at(site, f"/to/http://127.0.0.1:{site.server_port}/ok.png"), rules=FetchRules())
    assert len(judged) == 2


@pytest.mark.parametrize("target", ["file:///etc/passwd", "gopher://x/", "data:image/png;base64,AAAA"])
def test_a_redirect_to_another_scheme_is_refused(site, target):
    with pytest.raises(FetchRefused):
        get(at(site, f"/to/{target}"))


def test_a_redirect_loop_ends(site):
    with pytest.raises(FetchRefused, match="redirects"):
        get(at(site, "/loop"))


def test_a_page_or_a_missing_file_is_no_picture(site):
    with pytest.raises(UnsupportedMedia):
        get(at(site, "/page"))
    with pytest.raises(MediaError, match="404"):
        get(at(site, "/missing"))


def test_a_slow_sender_is_cut_off(site):
    start = time.monotonic()
    with pytest.raises(MediaError, match="did not arrive"):
        get(at(site, "/slow"), rules=FetchRules(allow_private=True, timeout_s=0.5))
    assert time.monotonic() - start < 2


def test_too_many_bytes_are_refused_wherever_they_come_from(site, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG * 1000)
    rules = FetchRules(allow_private=True, max_bytes=1000, file_root=tmp_path)
    for url in (at(site, "/long"), data_url(PNG * 1000), f"file://{tmp_path}/a.png"):
        with pytest.raises(MediaTooLarge):
            get(url, rules=rules)


def test_file_addresses_stay_under_their_root(tmp_path):
    root = tmp_path / "open"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(PNG)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    rules = FetchRules(file_root=root)
    for path in (f"{root}/../secret.png", f"{root}/%2e%2e/secret.png", f"{root}/link.png", "/etc/passwd"):
        with pytest.raises(FetchRefused):
            get(f"file://{path}", rules=rules)
    with pytest.raises(FetchRefused):
        get("file://other.host/a.png", rules=rules)
