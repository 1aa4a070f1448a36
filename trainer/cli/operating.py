"""Commands for those who run a server: serve, token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from router.errors import InvalidInputError
from router.roles import Role
from router.settings import (
    DEFAULT_BASE_MODEL,
    DEFAULT_ENCODER,
    DEFAULT_LISTEN,
    ServerSettings,
    TlsFiles,
)
from trainer.cli.console import (
    AsJson,
    BaseModel,
    EncoderName,
    Home,
    errors_for_people,
    home_folder,
    out,
    print_json,
)


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command("serve")(serve)
    app.command("token")(token)


def serve(
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
            "--insecure", help="Let others than this machine reach the server without TLS."
        ),
    ] = False,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    route_only: Annotated[
        bool, typer.Option("--route-only", help="Load no base model; Generate is refused.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each model.")] = 2,
    poll_seconds: Annotated[
        float, typer.Option(min=0.01, help="How often to look for a new catalog revision.")
    ] = 0.25,
) -> None:
    """Serve the catalog over gRPC until SIGTERM or Ctrl-C.

    Prints one line when calls can come. New tasks are picked up by themselves. The log goes to
    stderr, as JSON lines, and never carries the text of an input.
    """
    with errors_for_people():
        from router.bootstrap import log_to_stderr
        from router.bootstrap import serve as run_server

        log_to_stderr()
        settings = ServerSettings(
            home=home_folder(home),
            listen=listen,
            metrics=metrics,
            tokens=tokens,
            tls=_tls_files(tls_cert, tls_key, tls_client_ca),
            insecure=insecure,
            encoder=encoder,
            base_model=None if route_only else base_model,
            encoder_threads=threads,
            base_model_threads=threads,
            poll_seconds=poll_seconds,
        )
        run_server(settings, lambda line: print(line, flush=True))  # noqa: T201


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
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whom the token is for.")],
    roles: Annotated[
        list[Role],
        typer.Option(
            "--role",
            help="What it may be used for; repeatable. route: Route, BatchRoute, StreamRoute. "
            "generate: Generate. read: the tasks, the status and the soft prompts.",
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Make a token, and the entry that lets a server know it. The token is shown only here.

    promptyard token checkout-service --role route --role generate
    """
    with errors_for_people(as_json):
        import yaml

        from router.access import new_token

        secret, entry = new_token(name, roles)
        if as_json:
            print_json({"token": secret, "entry": entry})
            return
        out.print("for the caller, as PROMPTYARD_TOKEN:", highlight=False)
        out.print(f"  {secret}", highlight=False, markup=False, soft_wrap=True)
        out.print("for the server, in the file that --tokens names:", highlight=False)
        text = yaml.safe_dump({"tokens": [entry]}, sort_keys=False, width=1000)
        out.print(text.rstrip(), highlight=False, markup=False, soft_wrap=True)
