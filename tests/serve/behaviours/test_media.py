"""Behaviours E: media of every kind over the wire, to a real (tiny, random) model with real decoders.

Where a picture is a disguise of another (16 bits, a palette, turned by EXIF), the answer must be the other's,
token for token: a decoder that read it wrongly would show.
"""

import base64
import io
import struct
import threading
import zlib
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np
import pytest
from PIL import Image

from duomo.processing import media as fetching
from tests.serve.conftest import picture, picture_url, see
from tests.serve.test_bad_input import assert_envelope


def data_url(data, mime="image/png"):
    return f"data:{mime};base64," + base64.b64encode(data).decode()


def saved(picture_, kind="PNG", **options):
    out = io.BytesIO()
    picture_.save(out, kind, **options)
    return out.getvalue()


def pixels(width=70, height=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def post(real, body):
    return real.client.post("/v1/chat/completions", json=body)


def tokens(real, url):
    """The answer with its log-probabilities, in which every pixel shows."""
    got = post(real, see(url, logprobs=True))
    assert got.status_code == 200, got.text
    assert got.json()["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    return [(entry["token"], entry["logprob"]) for entry in got.json()["choices"][0]["logprobs"]["content"]]


def refused(real, url, status=None):
    return assert_envelope(post(real, see(url)), status)


def video_url(data, mime="video/mp4"):
    return {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "video_url", "video_url": {"url": data_url(data, mime)}}],
            }
        ],
        "temperature": 0,
        "max_tokens": 4,
        "ignore_eos": True,
    }


# ---- what is broken or no picture ----


@pytest.mark.parametrize("url", ["data:image/png;base64,@@@@", "data:image/png;base64,A", "data:image/png"])
def test_E1_malformed_base64(real, url):
    refused(real, url, 400)


def test_E2_a_wrong_type_is_refused_whatever_the_bytes_are(real):
    refused(real, data_url(picture(), "text/html"), 415)
    refused(real, data_url(b"<html>hello</html>", "image/png"), 415)


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        where = self.path
        if where == "/a.png":
            self.reply(200, picture(70, 60, "blue"))
        elif where == "/page":
            self.reply(200, b"<html>hello</html>")
        elif where == "/loop":
            self.reply(302, b"", Location="/loop")
        elif where.startswith("/to?"):
            self.reply(302, b"", Location=where[4:])
        elif where == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                try:
                    self.wfile.write(b"\x89")
                    self.wfile.flush()
                except OSError:
                    return
                threading.Event().wait(0.05)
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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_E3_E4_an_address_without_a_picture(real, site):
    assert "404" in refused(real, f"{site}/missing", 400)["message"]
    refused(real, f"{site}/page", 415)


def test_E5_a_jpeg_cut_off(real):
    whole = saved(Image.fromarray(pixels()), "JPEG")
    for share in (0.2, 0.6, 0.95):
        refused(real, data_url(whole[: int(len(whole) * share)], "image/jpeg"), 415)


# ---- what looks odd and is a picture ----


def test_E6_one_pixel(real):
    assert tokens(real, picture_url(width=1, height=1))


def test_E7_a_strip_of_one_by_ten_thousand_is_told_why(real):
    for size in ((1, 10_000), (10_000, 1)):
        error = refused(real, picture_url(width=size[0], height=size[1]), 415)
        assert f"{size[0]}x{size[1]}" in error["message"]


def test_E8_sixteen_bits_are_read_by_their_upper_byte(real):
    grey = pixels()[..., 0]
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    assert tokens(real, data_url(saved(deep))) == tokens(real, data_url(saved(Image.fromarray(grey))))


def test_E9_cmyk_is_read_the_right_way_round(real):
    flat = Image.new("CMYK", (70, 56), (0, 255, 255, 0))
    red = tokens(real, data_url(saved(flat, "JPEG", quality=100), "image/jpeg"))
    assert red == tokens(real, picture_url(width=70, height=56, colour="red"))
    assert red != tokens(real, picture_url(width=70, height=56, colour="cyan"))


def test_E10_a_palette_is_its_colours(real):
    paletted = Image.fromarray(pixels()).quantize(64)
    plain = paletted.convert("RGB")
    assert tokens(real, data_url(saved(paletted))) == tokens(real, data_url(saved(plain)))


def test_E11_what_is_transparent_lies_on_white(real):
    clear = np.dstack([pixels(), np.full((56, 70), 128, dtype=np.uint8)])
    clear[:20, :, 3] = 0
    picture_ = Image.fromarray(clear, "RGBA")
    white = Image.alpha_composite(Image.new("RGBA", picture_.size, "white"), picture_).convert("RGB")
    assert tokens(real, data_url(saved(picture_))) == tokens(real, data_url(saved(white)))


def test_E12_exif_turns_the_picture(real):
    upright = Image.fromarray(pixels())
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    turned = saved(lying, "PNG", exif=exif)
    assert tokens(real, data_url(turned)) == tokens(real, data_url(saved(upright)))
    assert tokens(real, data_url(saved(lying))) != tokens(real, data_url(turned))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_E13_an_animation_is_its_first_frame(real, kind):
    frames = [Image.fromarray(pixels(seed=seed)).quantize(64).convert("RGB") for seed in range(3)]
    options = {"lossless": True} if kind == "WEBP" else {}
    moving = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    still = Image.open(io.BytesIO(moving)).convert("RGB")
    assert tokens(real, data_url(moving, f"image/{kind.lower()}")) == tokens(real, data_url(saved(still)))


def test_detail_and_pixels_of_a_request_bound_what_a_picture_costs(real):
    url = picture_url(width=900, height=900)

    def image_tokens(source, **fields):
        content = [{"type": "image_url", "image_url": {"url": url, **source}}]
        body = {"messages": [{"role": "user", "content": content}], **fields}
        return real.client.post("/v1/chat/completions/input_tokens", json=body).json()["image_tokens"]

    whole = image_tokens({})
    assert image_tokens({"detail": "high"}) == image_tokens({"detail": "auto"}) == whole == 32 * 32
    assert image_tokens({"detail": "low"}) <= 512 * 512 // 28**2 < whole
    assert image_tokens({"max_pixels": 28 * 28 * 16}) <= 16
    assert image_tokens({}, mm_processor_kwargs={"image_max_pixels": 28 * 28 * 9}) <= 9
    assert image_tokens({"max_pixels": 28 * 28 * 16}, mm_processor_kwargs={"max_pixels": 28 * 28 * 4}) > 4


# ---- what is dangerous ----


def test_E14_E17_formats_that_are_not_on_the_list(real):
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    refused(real, data_url(svg, "image/svg+xml"), 415)
    refused(real, data_url(saved(Image.fromarray(pixels()), "TIFF"), "image/tiff"), 415)
    refused(real, data_url(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64), "image/jp2"), 415)
    refused(real, data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n", "image/png"), 415)


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_E15_a_bomb_of_900_million_pixels_is_judged_by_its_header(real):
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", packed)
    error = refused(real, data_url(bomb), 413)
    assert error["code"] == "media_too_large" and "pixels" in error["message"]


def test_E16_bombs_in_the_notes_of_a_png_unfold_nowhere(real):
    plain = saved(Image.fromarray(pixels()))
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    for note in (png_chunk(b"zTXt", b"Comment\0\0" + packed), png_chunk(b"iCCP", b"icc\0\0" + packed)):
        bomb = plain[:33] + note + plain[33:]
        got = post(real, see(data_url(bomb)))
        assert got.status_code in (200, 413, 415), got.text
    assert tokens(real, data_url(plain))  # and the next picture is read


def test_E18_a_hundred_pictures_are_too_many(real):
    part = {"type": "image_url", "image_url": {"url": picture_url()}}
    body = {"messages": [{"role": "user", "content": [part] * 100}]}
    assert assert_envelope(post(real, body), 400)["code"] == "too_many_media"


def test_E19_all_media_of_a_request_share_a_budget(start):
    server = start(media_total_mb=0.05)
    part = {"type": "image_url", "image_url": {"url": data_url(saved(Image.fromarray(pixels(100, 100))))}}
    ask = lambda n: post(server, {"messages": [{"role": "user", "content": [part] * n}]})  # noqa: E731
    assert ask(1).status_code == 200
    assert assert_envelope(ask(3), 413)["code"] == "media_too_large"


def test_E20_E21_a_site_that_drips_or_goes_in_circles(start, site):
    server = start(allow_private_media=True, media_timeout_s=0.3)
    assert "0.3 s" in refused(server, f"{site}/slow", 400)["message"]
    assert refused(server, f"{site}/loop", 400)["code"] == "media_fetch_refused"


PRIVATE = [
    "http://127.0.0.1:1/x.png", "http://169.254.169.254/latest/meta-data", "http://[::1]/x.png",
    "http://0x7f000001/x.png", "http://2130706433/x.png", "http://localhost/x.png", "http://10.0.0.1/x.png",
    "http://[::ffff:127.0.0.1]/x.png", "http://0.0.0.0/x.png", "file:///etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("target", PRIVATE)
def test_E22_a_redirect_to_a_private_address_is_refused_like_the_address(start, site, target, monkeypatch):
    server = start()
    refused(server, target, 400)
    host, port = site[7:].split(":")
    resolve = fetching.resolve

    async def public_at_first(name, number, rules):
        if name == "site.example":  # its address is public, as far as anybody can see
            return fetching.ipaddress.ip_address(host)
        return await resolve(name, number, rules)

    monkeypatch.setattr(fetching, "resolve", public_at_first)
    error = refused(server, f"http://site.example:{port}/to?{target}", 400)
    assert error["code"] == "media_fetch_refused"


def test_E23_a_name_that_resolves_to_a_private_address_is_refused(start, monkeypatch):
    server = start()
    lookup = server.loop.getaddrinfo

    async def rebound(host, port, **more):
        return await lookup("127.0.0.1" if host == "rebound.example" else host, port, **more)

    monkeypatch.setattr(server.loop, "getaddrinfo", rebound)
    assert refused(server, "http://rebound.example/x.png", 400)["code"] == "media_fetch_refused"


def test_E24_files_outside_the_folder_and_through_dots_and_links(real, tmp_path):
    (tmp_path / "secret.png").write_bytes(picture())
    (real.files / "link.png").unlink(missing_ok=True)
    (real.files / "link.png").symlink_to(tmp_path / "secret.png")
    for url in (
        f"file://{tmp_path}/secret.png", f"file://{real.files}/../secret.png",
        f"file://{real.files}/%2e%2e/secret.png", f"file://{real.files}/link.png", "file://host/a.png",
        f"file://{real.files}/none.png", f"file://{real.files}", "file:///etc/passwd",
    ):  # fmt: skip
        error = refused(real, url)
        assert str(real.files) not in error["message"] and "etc" not in error["message"]
    assert tokens(real, f"file://{real.files}/a.png")


# ---- videos ----


def film(frames, rates=None, size=(56, 56), kind="mp4", codec="mpeg4"):
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        at = 0
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(pixels(*size, seed=index), format="rgb24")
            frame.pts, frame.time_base = at, stream.codec_context.time_base
            at += rates[index % len(rates)] if rates else 10
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def test_E25_E29_videos_without_a_frame_or_without_a_picture_in_them(real):
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44_100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), "fltp", "mono")
        silence.sample_rate = 44_100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    whole = film(6)
    for data in (sound.getvalue(), whole[:40], b"\0\0\0\x18ftypisom" + bytes(64)):
        assert_envelope(post(real, video_url(data)), 415)


def test_E26_a_video_of_one_frame_is_read(real):
    got = post(real, video_url(film(1)))
    assert got.status_code == 200, got.text
    assert got.json()["usage"]["prompt_tokens_details"]["video_tokens"] > 0


def test_E27_an_hour_is_sampled_within_its_bounds(real):
    hour = film(360, rates=[1000])  # a frame every ten seconds
    body = video_url(hour)
    body["mm_processor_kwargs"] = {"video_max_frames": 16, "video_min_frames": 4, "video_max_pixels": 3136}
    got = post(real, body)
    assert got.status_code == 200, got.text
    assert 0 < got.json()["usage"]["prompt_tokens_details"]["video_tokens"] <= 8 * 4
    assert assert_envelope(post(real, body | {"mm_processor_kwargs": {"video_max_frames": 100_000}}), 415)


def test_E28_frames_that_come_unevenly_are_read(real):
    body = video_url(film(12, rates=[3, 40, 11]))
    body["mm_processor_kwargs"] = {"video_max_frames": 8, "video_min_frames": 2, "video_max_pixels": 3136}
    got = post(real, body)
    assert got.status_code == 200, got.text
    assert got.json()["usage"]["prompt_tokens_details"]["video_tokens"] > 0
