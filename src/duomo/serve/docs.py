"""/docs: the OpenAPI document as a plain page. It needs no script and no other host, and says nothing more.

Endpoints come first, each with what it takes and gives; every type that is named links to its fields below.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from duomo import __version__
from duomo.serve.openapi import document

_STYLE = (Path(__file__).parent / "ui" / "docs.css").read_text(encoding="utf-8")
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_BOUNDS = (
    ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("minLength", "at least"),
    ("minItems", "at least"), ("maxLength", "at most"), ("maxItems", "at most"),
)  # fmt: skip


async def docs(request: Request) -> Response:
    """Every endpoint and every type, as a page."""
    return HTMLResponse(_page(), headers=_HEADERS)


@lru_cache(maxsize=1)
def _page() -> str:
    found = document()
    types = found["components"]["schemas"]
    parts = [
        f"<h1>duomo {__version__}</h1><p>The same as data: <a href='/openapi.json'>/openapi.json</a></p>"
    ]
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(method, path, operation, types))
    parts.append("<h1>Types</h1>")
    for name, schema in sorted(types.items()):
        parts.append(f"<h2 id='{escape(name)}'><code>{escape(name)}</code></h2>{_fields(schema)}")
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>duomo: endpoints</title>"
        "<meta name='viewport' content='width=device-width'>"
        f"<style>{_STYLE}</style><main>{''.join(parts)}</main></html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any], types: dict[str, Any]) -> str:
    given = operation["responses"]["200"]["content"]
    kinds = [
        _type(body["schema"]) if kind == "application/json" else escape(kind) for kind, body in given.items()
    ]
    out = f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}"
    out += f" Gives {' or '.join(kinds)}.</p>"
    taken = operation.get("requestBody")
    if taken is None:
        return out
    name = taken["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
    return out + _fields(types[name])


def _fields(schema: dict[str, Any]) -> str:
    """A table of a type's fields, or what the type is where it has none."""
    said = f"<p>{escape(schema['description'])}</p>" if "description" in schema else ""
    if "properties" not in schema:
        return f"{said}<p>{_type(schema)}</p>"
    needed = schema.get("required", [])
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{_type(field)}</td>"
        f"<td>{'yes' if name in needed else ''}</td></tr>"
        for name, field in schema["properties"].items()
    )
    return f"{said}<table><tr><th>field</th><th>type</th><th>needed</th></tr>{rows}</table>"


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words; types of our own are links."""
    if "anyOf" in schema:
        each = [_type(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(each))
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/", 1)[-1])
        return f"<a href='#{name}'>{name}</a>"
    if "enum" in schema:
        return " | ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if "prefixItems" in schema:
        return f"[{', '.join(map(_type, schema['prefixItems']))}]"
    kind = schema.get("type", "anything")
    words = [f"list of {_type(schema.get('items') or {})}" if kind == "array" else str(kind)]
    bounds = [f"{sign} {str(schema[key]).removesuffix('.0')}" for key, sign in _BOUNDS if key in schema]
    return " ".join([*words, *bounds])
