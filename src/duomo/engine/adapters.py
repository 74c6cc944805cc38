"""Adapters of a running engine: loaded by name, chosen per request, let go when nobody needs them.

A request keeps the very adapter it began with: a name stands for an identity, the name and a hash of the
files. Prefixes are cached by identity, so a name that is loaded again with other weights shares nothing with
the old ones. `use` puts an adapter's modules into the model for one pass; outside of it the model is plain.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from torch import nn

from duomo.checkpoints.adapters import SETTINGS, WEIGHTS, read_adapter
from duomo.errors import ConfigError
from duomo.model.decoder import Decoder
from duomo.model.ernie import Ernie
from duomo.model.lowrank import adapted


@dataclass(frozen=True, slots=True)
class _Loaded:
    places: tuple[tuple[nn.Module, str, nn.Module], ...]  # holder, name in it, what stands there meanwhile
    touches_vision: bool


class Adapters:
    """Of one model; None for a script, which takes none. Every call but `use` may come from any thread."""

    def __init__(self, model: Ernie | None = None) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._identity: dict[str, str] = {}  # by name: what a new request gets
        self._loaded: dict[str, _Loaded] = {}  # by identity: what is still in use, too
        self._users: Counter[str] = Counter()

    def names(self) -> list[str]:
        with self._lock:
            return list(self._identity)

    def load(self, name: str, folder: Path) -> None:
        """Reads an adapter in PEFT's files. ConfigError for a name in use, CheckpointError for bad files."""
        if self._model is None:
            raise ConfigError("this model takes no adapters")
        self._check_free(name)
        adapter = read_adapter(folder, self._model.config, self._model.decoder.norm.weight.dtype)
        places: list[tuple[nn.Module, str, nn.Module]] = [
            (self._model, "decoder", _layer_by_layer(self._model.decoder))
        ]
        for path, module in adapted(self._model, adapter).items():
            parent, _, leaf = path.rpartition(".")
            places.append((self._model.get_submodule(parent), leaf, module.eval()))
        identity = f"{name}:{_hash(folder)}"
        with self._lock:
            self._refuse_taken(name)
            self._loaded[identity] = _Loaded(tuple(places), adapter.touches_vision)
            self._identity[name] = identity

    def unload(self, name: str) -> None:
        """No new request may choose it; those under way keep it. ConfigError if there is none."""
        with self._lock:
            identity = self._identity.pop(self._known(name))
            self._drop_unused(identity)

    def check(self, name: str) -> None:
        """ConfigError for a name that no request may choose; "" is the plain model."""
        with self._lock:
            if name:
                self._known(name)

    def acquire(self, name: str) -> str:
        """The identity a new request computes with, until it is released."""
        if not name:
            return ""
        with self._lock:
            identity = self._identity[self._known(name)]
            self._users[identity] += 1
            return identity

    def release(self, identity: str) -> None:
        if identity:
            with self._lock:
                self._users[identity] -= 1
                self._drop_unused(identity)

    def touches_vision(self, identity: str) -> bool:
        return bool(identity) and self._loaded[identity].touches_vision

    @contextmanager
    def use(self, identity: str) -> Iterator[None]:
        """The model computes with this adapter inside. Of the engine's thread alone."""
        if not identity:
            yield
            return
        places = self._loaded[identity].places
        kept = [holder._modules[leaf] for holder, leaf, _ in places]
        try:
            for holder, leaf, module in places:
                holder._modules[leaf] = module
            yield
        finally:
            for (holder, leaf, _), base in zip(places, kept, strict=True):
                holder._modules[leaf] = base

    def _check_free(self, name: str) -> None:
        if not name:
            raise ConfigError("an adapter needs a name")
        with self._lock:
            self._refuse_taken(name)

    def _refuse_taken(self, name: str) -> None:
        if name in self._identity:
            raise ConfigError(f"there is an adapter {name!r} already; unload it first", adapter=name)

    def _known(self, name: str) -> str:
        if name not in self._identity:
            known = ", ".join(self._identity) or "none is loaded"
            raise ConfigError(f"there is no adapter {name!r}; {known}", adapter=name)
        return name

    def _drop_unused(self, identity: str) -> None:
        if self._users[identity] <= 0 and identity not in self._identity.values():
            self._loaded.pop(identity, None)
            del self._users[identity]


def _layer_by_layer(decoder: Decoder) -> Decoder:
    """The same layers, each asked by its call: a decoder that is one native call would ask no module."""
    plain = Decoder.__new__(Decoder)
    nn.Module.__init__(plain)
    plain.config, plain.layers, plain.norm = decoder.config, decoder.layers, decoder.norm
    return plain


def _hash(folder: Path) -> str:
    state = blake2b(digest_size=8)
    for name in (SETTINGS, WEIGHTS):
        state.update((folder / name).read_bytes())
    return state.hexdigest()
