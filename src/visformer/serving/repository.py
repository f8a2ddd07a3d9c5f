"""The models that are served: which there are, which are loaded, and the change from one version to the next.

A change never interrupts: the new version is loaded and warm before it becomes the one that new requests lease; the
old one answers those that have leased it, and is let go after the last. A version that can't be loaded leaves what was
there in place, and the index says so.

States are the protocol's: LOADING, READY, UNLOADING, UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from visformer.errors import RunError, UsageError, VisformerError
from visformer.serving import log
from visformer.serving.model import Loaded, ServedModel, load
from visformer.serving.refusals import Refusal, bad, busy
from visformer.serving.settings import Settings
from visformer.serving.sources import Found, Source, scan


@dataclass
class _Version:
    source: Source
    state: str = "LOADING"
    reason: str = ""
    model: ServedModel | None = None


@dataclass
class _Entry:
    """A model by its name. `serving` holds the versions that can be leased; it is replaced, never changed."""

    found: Found
    wanted: bool = True
    versions: dict[int, _Version] = field(default_factory=dict)
    serving: dict[int, ServedModel] = field(default_factory=dict)


class Repository:
    """Lives on the event loop; loading happens in threads. `on_batch(name, version, size, seconds)` hears of batches.

    Raises `UsageError` when the targets name nothing that can be served.
    """

    def __init__(
        self,
        targets: list[str],
        settings: Settings,
        *,
        on_batch: Callable[..., None] = lambda name, version, size, seconds: None,
        loader: Callable[[Source, Settings], Loaded] = load,
    ) -> None:
        self._targets, self._settings, self._on_batch, self._loader = targets, settings, on_batch, loader
        self._entries = {name: _Entry(found) for name, found in scan(targets).items()}
        for name, entry in self._entries.items():
            if not entry.found.versions:
                raise UsageError("; ".join(entry.found.problems.values()) or f"{name}: no version of it is there")
        self.ready = False  # true once everything has been loaded; a later change that fails leaves it true
        self._changing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load everything. Raises the error of the first model that can't be loaded."""
        async with self._changing:
            for name, entry in self._entries.items():
                error = await self._bring_up(name, entry)
                if error is not None:
                    raise error
        self.ready = True

    def names(self) -> list[str]:
        """Of every model, loaded or not."""
        return list(self._entries)

    def lease(self, name: str = "", version: str = "") -> ServedModel:
        """The model to use in a `with` block; without a version the newest, without a name the only one there is.

        Raises `Refusal`: 404 for what is unknown or unloaded, 503 while it is loading.
        """
        if not name:
            if len(self._entries) != 1:
                raise bad(f"name one of the models: {', '.join(self._entries)}")
            name = next(iter(self._entries))
        entry = self._entry(name)
        if not version and entry.serving:
            return entry.serving[max(entry.serving)]
        if version.isdecimal() and len(version) < 10 and int(version) in entry.serving:
            return entry.serving[int(version)]
        loading = [number for number, slot in entry.versions.items() if slot.state == "LOADING"]
        if (entry.wanted and not entry.versions) or (loading and (not version or version in map(str, loading))):
            raise busy(f"model {name} is loading; try again later")
        if not version:
            raise Refusal(404, f"model {name} is not loaded")
        raise Refusal(404, f"model {name} has no version {version[:20]} that is loaded")

    def versions(self, name: str) -> list[str]:
        """Those of a model that can be leased, oldest first. Raises `Refusal` 404."""
        return [str(number) for number in sorted(self._entry(name).serving)]

    def models(self) -> list[ServedModel]:
        """Everything that can be leased."""
        return [model for entry in self._entries.values() for _, model in sorted(entry.serving.items())]

    def index(self, ready: bool = False) -> list[dict[str, str]]:
        """The protocol's repository index: name, version, state and reason of each version that is known of."""
        rows = []
        for name, entry in self._entries.items():
            for number, slot in sorted(entry.versions.items()):
                rows.append({"name": name, "version": str(number), "state": slot.state, "reason": slot.reason})
            rows += [
                {"name": name, "version": str(number), "state": "UNAVAILABLE", "reason": "can't be used; see the log"}
                for number in entry.found.problems
            ]
            if not entry.versions:
                rows.append({"name": name, "version": "", "state": "UNAVAILABLE", "reason": "not loaded"})
        return [row for row in rows if not ready or row["state"] == "READY"]

    async def load(self, name: str) -> None:
        """Load a model, or look for a newer version of it. Raises `Refusal` when that fails; what was there stays."""
        async with self._changing:
            self._rescan(only=name)
            entry = self._entry(name)
            if not entry.found.versions:
                raise bad(f"failed to load {name}: no version of it is there that can be used")
            entry.wanted = True
            error = await self._bring_up(name, entry)
        if error is not None:
            raise bad(f"failed to load {name}: {_public(error)}")

    async def unload(self, name: str) -> None:
        """Stop serving a model, once those who use it are done. Raises `Refusal` 404."""
        async with self._changing:
            entry = self._entry(name)
            entry.wanted = False
            self._serve(entry, {})

    async def reload(self) -> list[str]:
        """Look at everything afresh: load what is new, let go what is not there any more. Gives one line for a log for
        each thing that could not be done."""
        async with self._changing:
            problems = []
            try:
                self._rescan()
            except VisformerError as error:
                return [str(error)]
            for name, entry in list(self._entries.items()):
                problems += entry.found.problems.values()
                if entry.wanted and entry.found.versions:
                    error = await self._bring_up(name, entry)
                    problems += [] if error is None else [str(error)]
                elif not entry.found.versions:
                    self._serve(entry, {})
                    del self._entries[name]
            return problems

    async def close(self) -> None:
        """Let every model go, after its last request."""
        async with self._changing:
            for entry in self._entries.values():
                self._serve(entry, {})
        await asyncio.gather(*self._retiring)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise Refusal(404, f"there is no model called {name[:80]}")
        return self._entries[name]

    def _rescan(self, only: str | None = None) -> None:
        try:
            found = scan(self._targets)
        except (VisformerError, OSError):
            if only is None:
                raise
            raise bad("the models' folders can't be read") from None
        for name, model in found.items():
            if only in (None, name):
                if name in self._entries:
                    self._entries[name].found = model
                else:
                    self._entries[name] = _Entry(model)
        for name in self._entries.keys() - found.keys():
            if only in (None, name):
                self._entries[name].found = Found(True)

    async def _bring_up(self, name: str, entry: _Entry) -> VisformerError | None:
        """Load what should be served and is not, then let go what should not be. Gives what went wrong, if anything."""
        serving: dict[int, ServedModel] = {}
        for number, source in self._desired(entry).items():
            have = entry.versions.get(number)
            if have is None or have.model is None or have.source != source:
                error = await self._load_version(name, entry, number, source)
                if error is not None:
                    return error
            model = entry.versions[number].model
            assert model is not None
            serving[number] = model
        self._serve(entry, serving)
        return None

    def _desired(self, entry: _Entry) -> dict[int, Source]:
        found = entry.found
        if not found.numbered:  # changed content counts as the next version
            source = found.versions[1]
            last = max(entry.serving, default=0) or max(entry.versions, default=0)
            same = last in entry.versions and entry.versions[last].source == source
            return {last if same else last + 1: source}
        newest = max(found.versions, default=0)
        return {n: s for n, s in found.versions.items() if self._settings.versions == "all" or n == newest}

    async def _load_version(self, name: str, entry: _Entry, number: int, source: Source) -> VisformerError | None:
        before = entry.versions.get(number)
        slot = _Version(source)
        if before is None or before.model is None:
            entry.versions[number] = slot
        try:
            loaded = await asyncio.to_thread(self._loader, source, self._settings)
        except Exception as error:  # readers of foreign files have errors of every kind
            slot.state, slot.reason = "UNAVAILABLE", "can't be loaded; see the log"
            if isinstance(error, VisformerError):
                return error
            log.fault(error, model=name, version=number)
            return RunError(f"{source.path}: can't be loaded: {' '.join(str(error).split())[:300] or repr(error)}")
        slot.model = ServedModel(name, number, loaded, self._settings, self._on_batch)
        slot.state = "READY"
        entry.versions[number] = slot
        return None

    def _serve(self, entry: _Entry, serving: dict[int, ServedModel]) -> None:
        """From now on lease these; retire the others."""
        leaving = [model for model in entry.serving.values() if model not in serving.values()]
        entry.serving = serving
        for model in leaving:
            slot = entry.versions[int(model.version)]
            slot = slot if slot.model is model else _Version(slot.source)  # else it has a successor of its number
            slot.state, slot.reason, slot.model = "UNLOADING", "", None
            task = asyncio.get_running_loop().create_task(_retire(slot, model))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        for number in [n for n, slot in entry.versions.items() if slot.state == "UNAVAILABLE" and serving]:
            del entry.versions[number]  # it is past


async def _retire(slot: _Version, model: ServedModel) -> None:
    await model.retire()
    if slot.state == "UNLOADING":
        slot.state, slot.reason = "UNAVAILABLE", "unloaded"


def _public(error: VisformerError) -> str:
    """What a client may know of a failure to load, which names paths."""
    return f"{type(error).__name__}, which the log explains"


def describe(model: ServedModel) -> dict[str, Any]:
    """One line for the log that says what has been loaded."""
    return {
        "model": model.name,
        "version": model.version,
        "architecture": model.loaded.model_name,
        "platform": model.loaded.platform,
        "precision": model.loaded.precision,
        "classes": len(model.labels),
    }
