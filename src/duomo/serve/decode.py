"""From the bytes of a body to a typed request: what is malformed, mistyped or unknown is said precisely.

Unknown fields are no error (clients send fields of other servers) but they are named in the answer's
`X-Ignored-Fields` header, at the top level and one level below. A field that looks like a thinking switch
and is not one is an error all the same: silently ignoring it is what people complain about.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any, TypeVar

import msgspec

from duomo.serve.problems import Problem, invalid

T = TypeVar("T", bound=msgspec.Struct)

_WHERE = re.compile(r" - at `\$\.?(.*)`$")
_MISSING = re.compile(r"Object missing required field `(.+)`")
_THINKING = re.compile(r"think|reason", re.IGNORECASE)


def decode(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """The request and the names of fields that have no meaning here."""
    try:
        raw = msgspec.json.decode(body)
    except RecursionError as error:
        raise invalid("the body is nested too deeply", code="invalid_json") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise invalid(f"the body is not JSON in UTF-8: {_said(error)}", code="invalid_json") from error
    if not isinstance(raw, dict):
        raise invalid(f"the body must be a JSON object, not {_name_of(raw)}", code="invalid_json")
    try:
        request = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise _problem_of(str(error)) from error
    except RecursionError as error:
        raise invalid("the body is nested too deeply", code="invalid_json") from error
    unknown = unknown_fields(raw, kind)
    for name in unknown:
        if _THINKING.search(name.rsplit(".", 1)[-1]):
            raise invalid(
                f"{name} is no thinking switch; thinking, enable_thinking, reasoning_effort, "
                "chat_template_kwargs.enable_thinking and thinking_budget are",
                param=name,
                code="unknown_thinking_field",
            )
    return request, unknown


def unknown_fields(raw: dict[str, Any], kind: type[msgspec.Struct]) -> list[str]:
    """Names in `raw` that `kind` does not declare, also inside fields that are plain structs."""
    known = _known(kind)
    names = [name for name in raw if name not in known]
    for name, value in raw.items():
        inner = known.get(name)
        if inner is not None and isinstance(value, dict):
            names += [f"{name}.{below}" for below in unknown_fields(value, inner)]
    return names


@cache
def _known(kind: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct] | None]:
    """The fields of a struct, each with the struct it holds. Reading annotations takes milliseconds: once."""
    return {field.encode_name: _struct_in(field.type) for field in msgspec.structs.fields(kind)}


def ignored_header(names: list[str]) -> dict[str, str]:
    """The warning header, safe to send: only names of plain characters, at most twenty."""
    plain = [name for name in names if re.fullmatch(r"[\w.\-]{1,64}", name, re.ASCII)]
    if not names:
        return {}
    shown = ", ".join(plain[:20]) or f"{len(names)} fields with odd names"
    return {"X-Ignored-Fields": shown}


def _struct_in(annotation: Any) -> type[msgspec.Struct] | None:
    """The struct of `Struct | None`; None for unions of several and for anything else."""
    arguments = getattr(annotation, "__args__", None) or (annotation,)
    structs = [a for a in arguments if isinstance(a, type) and issubclass(a, msgspec.Struct)]
    return structs[0] if len(structs) == 1 else None


def _problem_of(message: str) -> Problem:
    where = _WHERE.search(message)
    param = where.group(1) if where else None
    text = _WHERE.sub("", message)
    missing = _MISSING.match(text)
    if missing:
        param = f"{param}.{missing.group(1)}" if param else missing.group(1)
        return invalid(f"{param} is missing", param=param, code="missing_required_parameter")
    return invalid(f"{param or 'the body'}: {text[0].lower() + text[1:]}", param=param)


def _said(error: Exception) -> str:
    return "bytes that are no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)


def _name_of(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
