"""Puts a server together: the only place that names concrete backends, and loads them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

import structlog

from router.answering import Answerer
from router.errors import InvalidInputError
from router.interfaces import (
    Encoder,
    LanguageModel,
    Observer,
    PromptedEncoder,
    prompted_encoder,
)
from router.observing import UNOBSERVED
from router.routing import Router
from router.settings import DEFAULT_ENCODER, FAST_ENCODER, ServerSettings
from router.tenants import tenant_home
from router.turns import ModelThread, TurnTakingEncoder

if TYPE_CHECKING:
    from router.cascade import FastModel
    from router.decision_log import DecisionLog
    from router.loading import ServedModels
    from router.snapshot import Snapshot
    from router.tenant_routers import TenantRouters

_log = structlog.get_logger(__name__)


def load_encoder(name: str = DEFAULT_ENCODER, *, device: str = "auto", threads: int = 2) -> Encoder:
    """The sentence encoder of that name or folder.

    The embedded one runs on ONNX Runtime unless another `device` than the CPU is named: a catalog
    belongs to one runtime, so that `auto` must not depend on the machine. `threads` are its own.
    The `fast` one knows the CPU only.

    Raises:
        InvalidInputError: there is no such model, or not on that device.
        IncompatibleModelError: its weights are not what they should be.
    """
    if name == FAST_ENCODER:
        if device not in ("auto", "cpu"):
            raise InvalidInputError("encoder device", device, f"{name} runs on the cpu")
        from router.backends.static_encoder import StaticMiniLM

        return StaticMiniLM()
    if name == DEFAULT_ENCODER and device in ("auto", "cpu"):
        from router.backends.onnx_encoder import OnnxMiniLM

        return OnnxMiniLM(threads=threads)
    from router.backends.torch_encoder import TorchEncoder, TorchMiniLM

    if name == DEFAULT_ENCODER:
        return TorchMiniLM(device)
    return TorchEncoder(name, device="cpu" if device == "auto" else device)


def load_fast_model() -> FastModel:
    """The fast encoder of a cascade."""
    from router.background import measure_background
    from router.cascade import FastModel

    encoder = load_encoder(FAST_ENCODER)
    return FastModel(encoder, measure_background(encoder))


_TORCH_ENVIRONMENT = {
    # Threads that wait for the next product do it spinning: by default for a millisecond and more,
    # in which the encoder and the event loop go short of a processor.
    "GOMP_SPINCOUNT": "10000",
    # Products that are kept compiled, one for each shape: batches are of any shape, and the 1,024
    # of the default take half a gigabyte more.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
"""What torch reads of the environment when it is imported, where nobody has said otherwise."""


def load_base_model(
    name: str | None, *, device: str = "auto", threads: int | None = None
) -> LanguageModel | None:
    """The base model of that name or folder; None for None, which is for routing only.

    `threads` sets torch's for the whole process; None leaves them.

    Raises:
        InvalidInputError: there is none.
        IncompatibleModelError: it is not a model that can answer.
    """
    if name is None:
        return None
    for variable, value in _TORCH_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    with _no_garbage_collection():
        from router.backends.language_model import load_language_model

        return load_language_model(name, device=device, threads=threads)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing is looked through for garbage in this process while this is open.

    Torch and transformers make a million objects when they are imported, all of which stay: to
    look through them again and again takes a fifth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a process, and what they demand of a catalog.

    All work with the base model is done in `model_thread`. `prompted_encoder` is `encoder` itself
    where that can read encoder prompts.
    """

    encoder: Encoder
    base_model: LanguageModel | None
    served: ServedModels
    model_thread: ModelThread = field(default_factory=ModelThread)
    prompted_encoder: PromptedEncoder | None = None


def load_models(settings: ServerSettings, base_model: LanguageModel | None = None) -> Models:
    """The models that `settings` name, warmed up; the base model is not loaded where it is given.

    Raises:
        PromptyardError: one cannot be loaded.
    """
    from router.background import when_needed
    from router.loading import ServedModels

    # Side by side: the encoder is ready while torch is still being imported.
    with ThreadPoolExecutor(1, thread_name_prefix="loading") as beside:
        loading = None
        if base_model is None:
            loading = beside.submit(
                load_base_model,
                settings.base_model,
                device=settings.base_model_device,
                threads=settings.base_model_threads,
            )
        encoder = load_encoder(
            settings.encoder, device=settings.encoder_device, threads=settings.encoder_threads
        )
        if loading is not None:
            base_model = loading.result()
    served = ServedModels(
        encoder.fingerprint,
        encoder.dimension,
        when_needed(encoder),
        None if base_model is None else base_model.fingerprint,
        load_fast_model() if settings.cascade else None,
    )
    # The first runs of a graph allocate its memory, which the first callers should not wait for.
    for texts in (1, settings.routing_batches.batch_items):
        encoder.encode(["warm up"] * texts)
    return Models(encoder, base_model, served, prompted_encoder=prompted_encoder(encoder))


@contextlib.contextmanager
def open_router(settings: ServerSettings, observer: Observer = UNOBSERVED) -> Iterator[Router]:
    """A router with its models over the live catalog of `settings.home`, warmed up.

    Raises:
        PromptyardError: a model or the catalog cannot be loaded.
    """
    with router_over(load_models(settings), settings, observer) as router:
        yield router


@contextlib.contextmanager
def open_routers(
    settings: ServerSettings,
    models: Models,
    observer: Observer = UNOBSERVED,
    salt: bytes | None = None,
) -> Iterator[TenantRouters]:
    """The routers of a server: one over `settings.home`, and one for each tenant in turn.

    Processes that share a decision log are given the same `salt`.

    Raises:
        PromptyardError: the home's own catalog cannot be loaded.
    """
    from router.decision_log import DecisionLog
    from router.tenant_routers import TenantRouters

    if settings.tokens is not None:  # which may name tenants, now or later
        models = replace(models, encoder=TurnTakingEncoder(models.encoder))
    log = None
    if settings.decision_log is not None:
        log = DecisionLog(
            settings.decision_log,
            settings.decision_log_share,
            int(settings.decision_log_mib * 2**20),
            salt,
        )
    with router_over(models, settings, observer, log=log) as own:
        routers = TenantRouters(
            own, lambda tenant: router_over(models, settings, observer, tenant, log)
        )
        try:
            yield routers
        finally:
            routers.close()


def _warm_up(encoder: PromptedEncoder, snapshot: Snapshot) -> None:
    """Read a text under some task's encoder prompt, which takes longer the first time."""
    for task in snapshot.tasks.values():
        if task.classifier is not None and task.classifier.encoder_prompt is not None:
            encoder.encode_prompted(["warm up"], [task.classifier.encoder_prompt])
            return


@contextlib.contextmanager
def router_over(
    models: Models,
    settings: ServerSettings,
    observer: Observer = UNOBSERVED,
    tenant: str = "",
    log: DecisionLog | None = None,
) -> Iterator[Router]:
    """A router over a tenant's live catalog; nothing but `models` is shared with other routers.

    Raises:
        PromptyardError: the catalog cannot be loaded.
    """
    from router.artifacts import ArtifactReader
    from router.catalog import ARTIFACTS_FOLDER
    from router.embedding_cache import CachingEncoder
    from router.explaining import Explainer
    from router.live import LiveCatalog

    home = tenant_home(settings.home, tenant)
    observer = observer.of(tenant)
    encoder = models.encoder
    with contextlib.ExitStack() as closing:
        if tenant:
            closing.callback(observer.forget)
        live = LiveCatalog(home, models.served, settings.poll_seconds, tenant)
        closing.callback(live.close)
        live.start()
        answerer = None
        if models.base_model is not None:
            if models.prompted_encoder is not None:
                _warm_up(models.prompted_encoder, live.snapshot)
            answerer = Answerer(
                models.base_model,
                settings.answer_batches,
                observer,
                models.model_thread,
                models.prompted_encoder,
            )
            closing.callback(answerer.close)
        if settings.cache_mib > 0:
            encoder = CachingEncoder(encoder, int(settings.cache_mib * 2**20), observer)
        explainer = Explainer(
            ArtifactReader(home / ARTIFACTS_FOLDER), models.served.background, observer
        )
        closing.callback(explainer.close)
        router = Router(
            live,
            encoder,
            answerer,
            settings.limits,
            settings.routing_batches,
            observer,
            explainer,
            None if log is None else partial(log.note, tenant=tenant),
        )
        closing.callback(router.close)
        yield router


def check_settings(settings: ServerSettings) -> None:
    """Look at everything that settings name and that can be looked at before a model is loaded.

    Raises:
        InvalidInputError: an address is taken, or a file of tokens or certificates unusable.
    """
    from router.access import read_tokens
    from router.server import check_address
    from router.tls import check_certificates
    from router.tracing import check_tracing

    check_address(settings.listen)
    for number in range(settings.workers):
        metrics = settings.of_worker(number, settings.listen).metrics
        if metrics is not None:
            check_address(metrics, "metrics")
    if settings.tokens is not None:
        read_tokens(settings.tokens, settings.max_tenants)
    if settings.tls is not None:
        check_certificates(settings.tls)
    if settings.traces is not None:
        check_tracing(settings.traces)


def serve(settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `announce` gets one line when calls can come.

    Raises:
        PromptyardError: a model or the catalog cannot be loaded, an address is in use, or the
            file of tokens or of certificates cannot be used.
    """
    check_settings(settings)
    if settings.workers == 1:
        _serve_alone(settings, load_models(settings), announce)
    else:
        _serve_with_workers(settings, announce)


def _serve_with_workers(settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """In the supervisor, which forks the workers when it has imported and loaded what they share.

    No session of ONNX Runtime survives a fork, nor do threads of torch or a GPU's context: the
    encoder is loaded in each worker, and the base model here, on one thread of the processor.
    """
    from router.decision_log import new_salt
    from router.supervisor import Supervisor, shared_port

    import_for_serving(settings)
    base_model = load_base_model(settings.base_model, device="cpu", threads=1)
    salt = new_salt()
    with shared_port(settings.listen) as address:

        def work(number: int, announce: Callable[[str], None]) -> None:
            log_to_stderr(worker=number)
            if base_model is not None:
                from router.backends.language_model import use_threads

                use_threads(settings.base_model_threads)
            mine = settings.of_worker(number, address)
            _serve_alone(mine, load_models(mine, base_model), announce, salt)

        Supervisor(settings.workers, work, settings.shutdown_seconds).run(announce)


def import_for_serving(settings: ServerSettings) -> None:
    """Import what a server of these settings needs, before it is needed."""
    names = ["artifacts", "decision_log", "live", "server", "tenant_routers"]
    if settings.metrics is not None:
        names.append("prometheus")
    if settings.encoder == DEFAULT_ENCODER:
        names.append("backends.onnx_encoder")
    if settings.base_model is not None:
        names.append("backends.language_model")
    with _no_garbage_collection():
        for name in names:
            import_module(f"router.{name}")


def _serve_alone(
    settings: ServerSettings,
    models: Models,
    announce: Callable[[str], None],
    salt: bytes | None = None,
) -> None:
    """Serve in this process."""
    if settings.metrics is None:
        with open_routers(settings, models, salt=salt) as routers:
            _run(routers, settings, announce)
        return

    from router.prometheus import PrometheusMetrics, metrics_port, serving

    metrics = PrometheusMetrics()
    with open_routers(settings, models, metrics, salt) as routers:
        metrics.watch(lambda: serving(routers.look()))
        with metrics_port(metrics, settings.metrics) as address:
            _log.info("metrics", address=address)
            _run(routers, settings, announce)


def _run(routers: TenantRouters, settings: ServerSettings, announce: Callable[[str], None]) -> None:
    from router.server import RouterServer
    from router.tracing import tracing_to

    release = version("promptyard")
    tracing = None
    if settings.traces is not None:
        tracing = tracing_to(settings.traces, settings.traces_share, release)
    # What is there by now stays for good: no collection has to look through it.
    gc.freeze()
    try:
        asyncio.run(RouterServer(routers, settings, release, tracing).run(announce))
    finally:
        if tracing is not None:
            tracing.close()


def log_to_stderr(least: str = "info", *, worker: int | None = None) -> None:
    """Write the log as JSON lines to stderr, so that stdout is for results.

    What is below the level `least` (`info`, `warning`, ...) is left out. Every line names the
    `worker`, where there is one.
    """

    def add_worker(
        _logger: object, _method: str, line: MutableMapping[str, object]
    ) -> MutableMapping[str, object]:
        return line if worker is None else {"worker": worker, **line}

    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(least),
        processors=[
            structlog.contextvars.merge_contextvars,
            add_worker,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        # Looked up for every line: a test or a program may have put another stream in its place.
        # A line is one write: those of several processes do not get into one another.
        logger_factory=lambda *_: structlog.WriteLogger(sys.stderr),
    )
