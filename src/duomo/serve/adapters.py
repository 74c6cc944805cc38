"""LoRA adapters: loaded and unloaded while serving, chosen by a request's `model`, in vLLM's wire shape.

Only from under --lora-root, after links are followed, and only where that flag was given; --lora-modules
names some to load at start. The server remembers what is loaded: an engine that was restarted gets it again.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from duomo.serve.problems import Problem, invalid
from duomo.serve.server import Server, answers, server_of

Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.\-]{1,64}$")]


class LoadRequest(Struct):
    """`load_inplace` replaces a loaded adapter of the same name."""

    lora_name: Name
    lora_path: Annotated[str, Meta(min_length=1, max_length=1024)]
    load_inplace: bool = False


class UnloadRequest(Struct):
    lora_name: Name
    lora_int_id: int | None = None


@answers
async def load(request: Request) -> Response:
    """Loads an adapter under a name, which requests then give as `model`."""
    server = server_of(request)
    backend = server.ready()
    root = _root(server)
    call, headers = await server.read(request, LoadRequest)
    if call.lora_name in (*server.names, "default"):
        raise invalid(f"{call.lora_name} is the name of the model itself", "lora_name")
    folder = await asyncio.to_thread(_under, root, call.lora_path)
    async with server.changing_adapters:
        is_loaded = call.lora_name in server.adapters
        if is_loaded and not call.load_inplace:
            said = f"{call.lora_name} is loaded; load_inplace: true replaces it"
            raise invalid(said, "lora_name", "adapter_loaded")
        if is_loaded:
            await asyncio.to_thread(backend.unload_adapter, call.lora_name)
            del server.adapters[call.lora_name]
        await asyncio.to_thread(backend.load_adapter, call.lora_name, folder)
        server.adapters[call.lora_name] = folder
    return PlainTextResponse(f"Success: LoRA adapter '{call.lora_name}' added successfully.", headers=headers)


@answers
async def unload(request: Request) -> Response:
    """Forgets an adapter. Requests that use it end first."""
    server = server_of(request)
    backend = server.ready()
    _root(server)
    call, headers = await server.read(request, UnloadRequest)
    async with server.changing_adapters:
        if call.lora_name not in server.adapters:
            raise Problem(
                404, "adapter_not_found", f"no adapter {call.lora_name} is loaded", param="lora_name"
            )
        await asyncio.to_thread(backend.unload_adapter, call.lora_name)
        del server.adapters[call.lora_name]
    told = f"Success: LoRA adapter '{call.lora_name}' removed successfully."
    return PlainTextResponse(told, headers=headers)


def _root(server: Server) -> Path:
    if not server.options.lora_root:
        said = "adapters are not loaded while serving; the server allows it with --lora-root FOLDER"
        raise Problem(403, "adapters_off", said)
    return Path(server.options.lora_root).resolve()


def _under(root: Path, path: str) -> Path:
    """The adapter's folder, if it lies under the root. What lies elsewhere is refused alike, there or not."""
    try:
        folder = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise invalid("lora_path is no path", "lora_path") from error
    if not folder.is_relative_to(root) or folder == root:
        raise invalid("the adapter lies outside the folder the server allows", "lora_path", "adapter_refused")
    try:
        is_there = (folder / "adapter_config.json").is_file()
    except OSError:  # a name that is too long, say
        is_there = False
    if not is_there:
        said = "there is no adapter (adapter_config.json) at this place under the allowed folder"
        raise Problem(404, "adapter_not_found", said, param="lora_path")
    return folder
