"""Puts a server together: the only place that names concrete backends, and loads them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

import structlog

from router.answering import Answerer
from router.errors import InvalidInputError
from router.interfaces import Encoder, LanguageModel, Observer
from router.observing import UNOBSERVED
from router.routing import Router
from router.settings import DEFAULT_ENCODER, FAST_ENCODER, ServerSettings
from router.tenants import tenant_home
from router.turns import Turns, TurnTakingEncoder

if TYPE_CHECKING:
    from router.cascade import FastModel
    from router.decision_log import DecisionLog
    from router.loading import ServedModels
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
    from router.backends.language_model import load_language_model

    return load_language_model(name, device=device, threads=threads)


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a process, and what they demand of a catalog.

    Whoever answers with the base model takes `turns`.
    """

    encoder: Encoder
    base_model: LanguageModel | None
    served: ServedModels
    turns: Turns = field(default_factory=Turns)


def load_models(settings: ServerSettings) -> Models:
    """The models that `settings` name, warmed up.

    Raises:
        PromptyardError: one cannot be loaded.
    """
    from router.background import measure_background
    from router.loading import ServedModels

    encoder = load_encoder(
        settings.encoder, device=settings.encoder_device, threads=settings.encoder_threads
    )
    base_model = load_base_model(
        settings.base_model, device=settings.base_model_device, threads=settings.base_model_threads
    )
    served = ServedModels(
        encoder.fingerprint,
        encoder.dimension,
        measure_background(encoder),
        None if base_model is None else base_model.fingerprint,
        load_fast_model() if settings.cascade else None,
    )
    # The first run of a graph allocates its memory, which the first caller should not wait for.
    encoder.encode(["warm up"])
    return Models(encoder, base_model, served)


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
    settings: ServerSettings, models: Models, observer: Observer = UNOBSERVED
) -> Iterator[TenantRouters]:
    """The routers of a server: one over `settings.home`, and one for each tenant in turn.

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
        )
    with router_over(models, settings, observer, log=log) as own:
        routers = TenantRouters(
            own, lambda tenant: router_over(models, settings, observer, tenant, log)
        )
        try:
            yield routers
        finally:
            routers.close()


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
            answerer = Answerer(models.base_model, settings.answer_batches, observer, models.turns)
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

    check_address(settings.listen)
    if settings.metrics is not None:
        check_address(settings.metrics, "metrics")
    if settings.tokens is not None:
        read_tokens(settings.tokens, settings.max_tenants)
    if settings.tls is not None:
        check_certificates(settings.tls)


def serve(settings: ServerSettings, announce: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; `announce` gets one line when calls can come.

    Raises:
        PromptyardError: a model or the catalog cannot be loaded, an address is in use, or the
            file of tokens or of certificates cannot be used.
    """
    check_settings(settings)
    models = load_models(settings)
    if settings.metrics is None:
        with open_routers(settings, models) as routers:
            _run(routers, settings, announce)
        return

    from router.prometheus import PrometheusMetrics, metrics_port, serving

    metrics = PrometheusMetrics()
    with open_routers(settings, models, metrics) as routers:
        metrics.watch(lambda: serving(routers.look()))
        with metrics_port(metrics, settings.metrics) as address:
            _log.info("metrics", address=address)
            _run(routers, settings, announce)


def _run(routers: TenantRouters, settings: ServerSettings, announce: Callable[[str], None]) -> None:
    from router.server import RouterServer

    server = RouterServer(routers, settings, version("promptyard"))
    asyncio.run(server.run(announce))


def log_to_stderr(least: str = "info") -> None:
    """Write the log as JSON lines to stderr, so that stdout is for results.

    What is below the level `least` (`info`, `warning`, ...) is left out.
    """
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(least),
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        # Looked up for every line: a test or a program may have put another stream in its place.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
