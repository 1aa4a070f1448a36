"""Watches the catalog and swaps one reference: requests always see one whole revision."""

from __future__ import annotations

import threading
from pathlib import Path

import structlog
from structlog.contextvars import bound_contextvars

from router.catalog import CatalogReader, has_catalog
from router.errors import CatalogError, PromptyardError
from router.loading import ServedModels, SnapshotLoader
from router.snapshot import Snapshot

_log = structlog.get_logger(__name__)


class LiveCatalog:
    """The live snapshot of a home folder.

    The next snapshot is built in a thread beside the current one and swapped in by assigning one
    reference. A revision that cannot be loaded leaves the last good one in place and `problem`
    says why; it is tried again whenever the catalog moves on.
    """

    def __init__(
        self, home: Path, models: ServedModels, poll_seconds: float = 0.25, tenant: str = ""
    ) -> None:
        """`tenant` is whose home it is, for the log."""
        self._home = home
        self._about = {"tenant": tenant} if tenant else {}
        self._loader = SnapshotLoader(home, models)
        self._poll_seconds = poll_seconds
        self._snapshot = self._loader.empty()
        self._newest_revision = 0
        self._problem = ""
        self._catalog: CatalogReader | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="live-catalog", daemon=True)

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot to serve. Take it once per request."""
        return self._snapshot

    @property
    def newest_revision(self) -> int:
        """The newest revision in the catalog, loaded or not."""
        return self._newest_revision

    @property
    def problem(self) -> str:
        """Why the newest revision is not being served; empty where it is."""
        return self._problem

    def start(self) -> None:
        """Load the newest revision that can be loaded, then watch.

        A folder without a catalog is served as an empty one until a task is registered.

        Raises:
            PromptyardError: the catalog cannot be read, or none of its revisions can be served.
        """
        with bound_contextvars(**self._about):
            if has_catalog(self._home):
                self._catalog = CatalogReader(self._home)
            self.refresh()
            if self._problem and self._catalog is not None:
                self._load_last_good()
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._catalog is not None:
            self._catalog.close()

    def refresh(self) -> None:
        """Look once, and swap where there is a newer revision."""
        try:
            if self._catalog is None:
                self._catalog = CatalogReader(self._home)
            newest = self._catalog.newest_revision()
            if newest == self._newest_revision:
                if newest == self._snapshot.revision:
                    self._problem = ""  # the catalog could not be read for a moment
                return
            self._newest_revision = newest
            self._snapshot = self._loader.load(self._catalog, newest, self._snapshot)
            self._problem = ""
            _log.info("serving", revision=newest, tasks=len(self._snapshot.tasks))
        except PromptyardError as error:
            self._note(error)
        except Exception as error:  # the watcher must outlive whatever a broken file does
            _log.exception("unexpected error while loading a revision")
            self._note(error)

    def _note(self, error: Exception) -> None:
        if str(error) != self._problem:
            _log.warning("revision not loaded", problem=str(error))
        self._problem = str(error)

    def _load_last_good(self) -> None:
        catalog, newest = self._catalog, self._newest_revision
        if catalog is None:
            raise CatalogError("home", self._home, self._problem)
        for revision in range(newest - 1, 0, -1):
            try:
                self._snapshot = self._loader.load(catalog, revision, None)
            except PromptyardError:
                continue
            _log.warning("serving an older revision", revision=revision, newest=newest)
            return
        raise CatalogError("catalog revision", newest, self._problem)

    def _watch(self) -> None:
        with bound_contextvars(**self._about):
            while not self._stopping.wait(self._poll_seconds):
                self.refresh()
