"""Commands for those who run a server: serve, token."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from router.errors import InvalidInputError
from router.limits import Limits
from router.roles import Role
from router.settings import (
    DEFAULT_BASE_MODEL,
    DEFAULT_ENCODER,
    DEFAULT_LISTEN,
    DEFAULT_MAX_TENANTS,
    FAST_ENCODER,
    FAST_ROUTING_BATCHES,
    MAX_WORKERS,
    ROUTING_BATCHES,
    ServerSettings,
    TlsFiles,
)
from trainer.cli.configuration import ConfigFile
from trainer.cli.console import (
    AsJson,
    BaseModel,
    EncoderName,
    HomeOfAllTenants,
    chosen_tenant,
    errors_for_people,
    home_folder,
    out,
    print_json,
    print_table,
)

_LIMITS = Limits()


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command("serve")(serve)
    app.command("token")(token)


def serve(
    config: ConfigFile = None,  # noqa: ARG001 - its callback reads it
    listen: Annotated[
        str, typer.Option(envvar="PROMPTYARD_LISTEN", help="HOST:PORT; port 0 takes a free one.")
    ] = DEFAULT_LISTEN,
    metrics: Annotated[
        str | None,
        typer.Option(
            envvar="PROMPTYARD_METRICS",
            help="HOST:PORT that Prometheus scrapes over HTTP. Default: no metrics.",
        ),
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="PROMPTYARD_TRACES",
            help="Collector that traces go to by OTLP over gRPC, e.g. http://127.0.0.1:4317; needs "
            "promptyard[tracing]. Default: no traces.",
        ),
    ] = None,
    traces_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            envvar="PROMPTYARD_TRACES_SHARE",
            help="Share of the calls to trace, of those whose caller does not say.",
        ),
    ] = 1.0,
    tokens: Annotated[
        Path | None,
        typer.Option(
            envvar="PROMPTYARD_TOKENS",
            help="File of the tokens that callers must have, see `promptyard token`. It is read "
            "again when it changes. Default: everybody may call everything.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            envvar="PROMPTYARD_TLS_CERT",
            help="Certificate chain for TLS, as PEM; read again when it changes.",
        ),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(envvar="PROMPTYARD_TLS_KEY", help="Its key, as PEM.")
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            envvar="PROMPTYARD_TLS_CLIENT_CA",
            help="Refuse clients without a certificate of this authority (mutual TLS), as PEM.",
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            envvar="PROMPTYARD_INSECURE",
            help="Let others than this machine reach the server without TLS.",
        ),
    ] = False,
    home: HomeOfAllTenants = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    route_only: Annotated[
        bool,
        typer.Option(
            "--route-only",
            envvar="PROMPTYARD_ROUTE_ONLY",
            help="Load no base model; Generate is refused.",
        ),
    ] = False,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_WORKERS,
            envvar="PROMPTYARD_WORKERS",
            help="Processes that share the port, each with queues, bounds and caches of its own; "
            "one that ends is started again. The metrics of the second one are one port above "
            "those of the first, and so on. Only on Linux.",
        ),
    ] = 1,
    threads: Annotated[
        int,
        typer.Option(
            min=1, envvar="PROMPTYARD_THREADS", help="Threads of each model, in each worker."
        ),
    ] = 2,
    poll_seconds: Annotated[
        float,
        typer.Option(
            min=0.01,
            envvar="PROMPTYARD_POLL_SECONDS",
            help="How often to look for a new catalog revision.",
        ),
    ] = 0.25,
    shutdown_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            envvar="PROMPTYARD_SHUTDOWN_SECONDS",
            help="How long running calls may take after SIGTERM.",
        ),
    ] = 10.0,
    max_calls: Annotated[
        int,
        typer.Option(
            min=1,
            envvar="PROMPTYARD_MAX_CALLS",
            help="Calls at the same time, of each tenant; more are refused.",
        ),
    ] = 1000,
    max_tenants: Annotated[
        int,
        typer.Option(
            min=0, envvar="PROMPTYARD_MAX_TENANTS", help="Tenants that --tokens may name."
        ),
    ] = DEFAULT_MAX_TENANTS,
    max_connection_calls: Annotated[
        int,
        typer.Option(
            min=1,
            envvar="PROMPTYARD_MAX_CONNECTION_CALLS",
            help="Calls at the same time on one connection; more wait at the caller.",
        ),
    ] = 200,
    max_text_bytes: Annotated[
        int,
        typer.Option(min=1, envvar="PROMPTYARD_MAX_TEXT_BYTES", help="UTF-8 bytes of one text."),
    ] = _LIMITS.max_text_bytes,
    max_batch_texts: Annotated[
        int,
        typer.Option(min=1, envvar="PROMPTYARD_MAX_BATCH_TEXTS", help="Texts of one BatchRoute."),
    ] = _LIMITS.max_batch_texts,
    max_output_tokens: Annotated[
        int,
        typer.Option(min=1, envvar="PROMPTYARD_MAX_OUTPUT_TOKENS", help="Tokens of one answer."),
    ] = _LIMITS.max_output_tokens,
    cache_mib: Annotated[
        float,
        typer.Option(
            min=0,
            envvar="PROMPTYARD_CACHE_MIB",
            help="Memory for embeddings of texts that were seen lately, in MiB, of each tenant; "
            "0: none.",
        ),
    ] = 64.0,
    cascade: Annotated[
        bool,
        typer.Option(
            "--cascade",
            envvar="PROMPTYARD_CASCADE",
            help="Let the fast encoder decide what it is sure of. Needs the texts of all tasks "
            "(register --keep-text); `promptyard evaluate routing --cascade` measures it.",
        ),
    ] = False,
    decision_log: Annotated[
        Path | None,
        typer.Option(
            envvar="PROMPTYARD_DECISION_LOG",
            help="Note decisions in this file, without texts, for `promptyard drift`.",
        ),
    ] = None,
    decision_log_share: Annotated[
        float,
        typer.Option(
            min=0, max=1, envvar="PROMPTYARD_DECISION_LOG_SHARE", help="Share of them to note."
        ),
    ] = 1.0,
    decision_log_mib: Annotated[
        float,
        typer.Option(
            min=1,
            envvar="PROMPTYARD_DECISION_LOG_MIB",
            help="What the file and the older one beside it may take, in MiB.",
        ),
    ] = 64.0,
    log_calls: Annotated[
        bool,
        typer.Option(
            "--log-calls",
            envvar="PROMPTYARD_LOG_CALLS",
            help="Log one line a call: id, method, status, time. Texts are never logged.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Check the settings and the files and ports they name, and leave."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the catalog over gRPC until SIGTERM or Ctrl-C.

    Prints one line when calls can come. New tasks are picked up by themselves. The log goes to
    stderr, as JSON lines, and never carries the text of an input.

    A setting comes from its flag, or else its environment variable, or else the file that
    --config names, or else its default.
    """
    with errors_for_people(as_json):
        from router.bootstrap import check_settings, log_to_stderr
        from router.bootstrap import serve as run_server

        log_to_stderr()
        batches = FAST_ROUTING_BATCHES if encoder == FAST_ENCODER else ROUTING_BATCHES
        limits = Limits(
            max_text_bytes=max_text_bytes,
            max_batch_texts=max_batch_texts,
            max_output_tokens=max_output_tokens,
            default_output_tokens=min(_LIMITS.default_output_tokens, max_output_tokens),
        )
        settings = ServerSettings(
            home=home_folder(home),
            listen=listen,
            metrics=metrics,
            traces=traces,
            traces_share=traces_share,
            tokens=tokens,
            tls=_tls_files(tls_cert, tls_key, tls_client_ca),
            insecure=insecure,
            workers=workers,
            encoder=encoder,
            base_model=None if route_only else base_model,
            encoder_threads=threads,
            base_model_threads=threads,
            poll_seconds=poll_seconds,
            shutdown_seconds=shutdown_seconds,
            max_calls=max_calls,
            max_connection_calls=max_connection_calls,
            max_tenants=max_tenants,
            cache_mib=cache_mib,
            cascade=cascade,
            decision_log=decision_log,
            decision_log_share=decision_log_share,
            decision_log_mib=decision_log_mib,
            log_calls=log_calls,
            limits=limits,
            routing_batches=replace(
                batches, queue_items=max(batches.queue_items, 4 * max_batch_texts)
            ),
        )
        if check:
            check_settings(settings)
            _print_settings(settings, as_json)
            return
        run_server(settings, lambda line: print(line, flush=True))  # noqa: T201


def _print_settings(settings: ServerSettings, as_json: bool) -> None:
    found = asdict(settings)
    if as_json:
        print_json(found)
        return
    rows = []
    for name, value in found.items():
        parts = value if isinstance(value, dict) else {"": value}
        rows += [[f"{name}.{part}".rstrip("."), str(each)] for part, each in parts.items()]
    print_table(["setting", "value"], rows)


def _tls_files(
    certificate: Path | None, key: Path | None, client_ca: Path | None
) -> TlsFiles | None:
    if certificate is not None and key is not None:
        return TlsFiles(certificate, key, client_ca)
    if certificate is not None or key is not None or client_ca is not None:
        missing = "--tls-cert" if certificate is None else "--tls-key"
        raise InvalidInputError(missing, "missing", "give a certificate and its key")
    return None


def token(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whom the token is for.")],
    roles: Annotated[
        list[Role],
        typer.Option(
            "--role",
            help="What it may be used for; repeatable. route: Route, BatchRoute, StreamRoute. "
            "generate: Generate. read: the tasks, the status and the soft prompts.",
        ),
    ],
    tenant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Let it see and use this tenant's catalog and no other. Default: the home's own.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token, and the entry that lets a server know it. The token is shown only here.

    promptyard token checkout-service --role route --role generate
    """
    with errors_for_people(as_json):
        import yaml

        from router.access import new_token

        secret, entry = new_token(name, roles, tenant or chosen_tenant(context))
        if as_json:
            print_json({"token": secret, "entry": entry})
            return
        out.print("for the caller, as PROMPTYARD_TOKEN:", highlight=False)
        out.print(f"  {secret}", highlight=False, markup=False, soft_wrap=True)
        out.print("for the server, in the file that --tokens names:", highlight=False)
        text = yaml.safe_dump({"tokens": [entry]}, sort_keys=False, width=1000)
        out.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)
