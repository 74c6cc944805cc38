"""English prose that packages carry, fetched by package name, never committed: to calibrate and to judge.

`handbook` is the Debian Administrator's Handbook with the fortunes between its chapters; `foldoc` the Free
On-line Dictionary of Computing. They share a field and not a sentence. Debian packages are downloaded with
`apt-get download` and unpacked into the cache folder, not installed.
"""

from __future__ import annotations

import gzip
import html
import re
import subprocess
from pathlib import Path

from duomo.errors import ConfigError

CACHE = Path.home() / ".cache" / "duomo" / "corpora"


def read_corpus(name: str) -> str:
    """The text of `handbook` or `foldoc`."""
    if name == "handbook":
        return _interleave(_handbook(), _fortunes())
    if name == "foldoc":
        return _foldoc()
    raise ConfigError(f"no corpus {name!r}; there are handbook and foldoc")


def _unpack(package: str) -> Path:
    folder = CACHE / package
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", "-q", package], cwd=CACHE, check=True, capture_output=True)
        (archive,) = CACHE.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, folder], check=True, capture_output=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"the corpus package {package} could not be fetched with apt-get: {error}"
        ) from error
    archive.unlink()
    return folder


def _handbook() -> list[str]:
    pages = sorted((_unpack("debian-handbook") / "usr/share/doc/debian-handbook/html/en-US").glob("*.html"))
    paragraphs: list[str] = []
    for page in pages:
        for raw in re.findall(
            r'<(?:p|div class="para")[^>]*>(.*?)</(?:p|div)>', page.read_text("utf-8"), re.S
        ):
            text = " ".join(html.unescape(re.sub(r"<[^>]*>", "", raw)).split())
            if len(text) > 200:
                paragraphs.append(text)
    return list(dict.fromkeys(paragraphs))


def _fortunes() -> list[str]:
    folder = _unpack("fortunes") / "usr/share/games/fortunes"
    texts: list[str] = []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.suffix):
        texts += [" ".join(t.split()) for t in path.read_text("utf-8", "replace").split("\n%\n")]
    return [text for text in texts if len(text) > 200]


def _foldoc() -> str:
    raw = gzip.decompress((_unpack("dict-foldoc") / "usr/share/dictd/foldoc.dict.dz").read_bytes())
    text = re.sub(r"[{}]", "", raw.decode("utf-8", "replace"))
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    return "\n\n".join(p for p in paragraphs if len(p) > 200 and "http" not in p)


def _interleave(first: list[str], second: list[str]) -> str:
    return "\n\n".join(text for pair in zip(first, second, strict=False) for text in pair)
