"""Commands that ask: route, generate, status."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from router.settings import (
    DEFAULT_BASE_MODEL,
    DEFAULT_ENCODER,
    DEFAULT_LISTEN,
    ServerSettings,
)
from trainer.cli.asking import ServerAt, in_process, remote, server_at
from trainer.cli.console import (
    AccessToken,
    AsJson,
    BaseModel,
    EncoderName,
    Home,
    Server,
    ServerAsked,
    TlsCa,
    TlsCert,
    TlsKey,
    UseTls,
    errors_for_people,
    home_folder,
    out,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from router.answer import AnswerEvent
    from router.decision import Decision, ShadowDecision, Side
    from router.explanation import Explanation
    from router.rejection import RejectionPolicy
    from router.routing import Router

_SHOWN_CHARACTERS = 60

Texts = Annotated[list[str], typer.Argument(metavar="TEXT...", help="One or more texts.")]

OnUnknown = Annotated[
    str | None,
    typer.Option(
        metavar="POLICY",
        help="Task that is used for a text that fits none: abstain (none), best (the best-scoring "
        "one) or fallback:TASK. Default: as the catalog says, see `promptyard policy show`.",
    ),
]

RequestKey = Annotated[
    str,
    typer.Option(
        metavar="KEY",
        help="Whose request it is: where a challenger shares the texts of a task, all requests of "
        "one key are answered by the same revision, those without one by the current one.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Mount the commands."""
    app.command("route")(route)
    app.command("generate")(generate)
    app.command("status")(status)


def route(
    texts: Texts,
    top_k: Annotated[int, typer.Option(min=0, max=100, help="Candidates to list.")] = 0,
    on_unknown: OnUnknown = None,
    request_key: RequestKey = "",
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say why: the terms of the scores, and the closest stored rows of each task.",
        ),
    ] = False,
    server: Server = None,
    token: AccessToken = "",
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    as_json: AsJson = False,
) -> None:
    """Say which task each text belongs to, or that none fits."""
    with errors_for_people(as_json):
        policy = _policy(on_unknown)
        at = None if server is None else server_at(server, token, tls, tls_ca, tls_cert, tls_key)
        settings = ServerSettings(home=home_folder(home), encoder=encoder, base_model=None)
        if explain:
            _explain(texts, top_k, policy, request_key, at, settings, as_json)
            return
        if at is not None:
            decisions = remote(
                at,
                as_json,
                lambda client: client.batch_route(
                    texts, top_k, on_unknown=policy, request_key=request_key
                ),
            )
        else:
            decisions = in_process(
                settings, lambda router: router.route_batch(texts, top_k, policy, request_key)
            )
        if as_json:
            print_json(
                [_decision_fields(text, d) for text, d in zip(texts, decisions, strict=True)]
            )
            return
        print_table(
            ["input", "outcome", "task", "probability", "score", "margin", "threshold"],
            [
                [
                    *(_short(text), d.outcome.value, _used(d)),
                    *("-" if d.probability is None else f"{d.probability:.3f}", d.score),
                    *(d.margin, d.threshold),
                ]
                for text, d in zip(texts, decisions, strict=True)
            ],
            title=f"catalog revision {decisions[0].revision}",
        )
        if top_k:
            for text, decision in zip(texts, decisions, strict=True):
                print_table(
                    ["candidate", "score", "threshold"],
                    [[str(c.task), c.score, c.threshold] for c in decision.candidates],
                    title=_short(text),
                )


def _explain(
    texts: Sequence[str],
    top_k: int,
    policy: RejectionPolicy | None,
    request_key: str,
    server: ServerAt | None,
    settings: ServerSettings,
    as_json: bool,
) -> None:
    from trainer.cli.explained import explanation_fields, print_explanation

    if server is not None:
        explained = remote(
            server,
            as_json,
            lambda client: [
                client.explain(text, top_k, on_unknown=policy, request_key=request_key)
                for text in texts
            ],
        )
    else:

        async def explain_all(router: Router) -> list[tuple[Decision, Explanation]]:
            return [await router.explain(text, top_k, policy, request_key) for text in texts]

        explained = in_process(settings, explain_all)
    if as_json:
        print_json(
            [
                {**_decision_fields(text, decision), "explanation": explanation_fields(why)}
                for text, (decision, why) in zip(texts, explained, strict=True)
            ]
        )
        return
    for text, (_, why) in zip(texts, explained, strict=True):
        print_explanation(_short(text), why)


def generate(
    texts: Texts,
    task: Annotated[str, typer.Option(help="Skip routing: answer under this task.")] = "",
    context: Annotated[
        list[str] | None, typer.Option(help="A retrieved passage to answer from; repeatable.")
    ] = None,
    max_output_tokens: Annotated[int, typer.Option(help="0: the default.")] = 0,
    on_unknown: OnUnknown = None,
    request_key: RequestKey = "",
    server: Server = None,
    token: AccessToken = "",
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    home: Home = None,
    encoder: EncoderName = DEFAULT_ENCODER,
    base_model: BaseModel = DEFAULT_BASE_MODEL,
    as_json: AsJson = False,
) -> None:
    """Route each text and answer it with the base model under the task's soft prompt."""
    with errors_for_people(as_json):
        passages = context or []
        policy = _policy(on_unknown)
        if server is not None:
            answers = remote(
                server_at(server, token, tls, tls_ca, tls_cert, tls_key),
                as_json,
                lambda client: [
                    list(
                        client.generate(
                            text,
                            task=task,
                            context=passages,
                            max_output_tokens=max_output_tokens,
                            on_unknown=policy,
                            request_key=request_key,
                        )
                    )
                    for text in texts
                ],
            )
        else:

            async def answer_all(router: Router) -> list[list[AnswerEvent]]:
                return [
                    [
                        event
                        async for event in router.generate(
                            text,
                            task=task,
                            context=passages,
                            max_output_tokens=max_output_tokens,
                            on_unknown=policy,
                            request_key=request_key,
                        )
                    ]
                    for text in texts
                ]

            answers = in_process(
                ServerSettings(home=home_folder(home), encoder=encoder, base_model=base_model),
                answer_all,
            )
        rows = [_answer_fields(t, events) for t, events in zip(texts, answers, strict=True)]
        if as_json:
            print_json(rows)
            return
        print_table(
            ["input", "outcome", "task used", "answer", "finish"],
            [
                [
                    *(_short(str(r["text"])), r["outcome"], r["used_task"] or "-"),
                    *(r["answer"], r["finish"]),
                ]
                for r in rows
            ],
        )


def status(
    server: ServerAsked = DEFAULT_LISTEN,
    token: AccessToken = "",
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    as_json: AsJson = False,
) -> None:
    """Show what a server serves: revision, tasks, tasks out of service, models."""
    with errors_for_people(as_json):
        from google.protobuf.json_format import MessageToDict

        document = MessageToDict(
            remote(
                server_at(server, token, tls, tls_ca, tls_cert, tls_key),
                as_json,
                lambda client: client.status(),
            ),
            preserving_proto_field_name=True,
        )
        if as_json:
            print_json(document)
        else:
            out.print_json(data=document)


def _decision_fields(text: str, decision: Decision) -> dict[str, object]:
    return {
        "text": text,
        "outcome": decision.outcome.value,
        "task": decision.task.name if decision.task else None,
        "task_revision": decision.task.revision if decision.task else None,
        "used_task": decision.used.name if decision.used else None,
        "used_task_revision": decision.used.revision if decision.used else None,
        "use": decision.use.value,
        "probability": decision.probability,
        "score": _finite(decision.score),
        "margin": _finite(decision.margin),
        "threshold": _finite(decision.threshold),
        "revision": decision.revision,
        "truncated": decision.truncated,
        "candidates": [
            {"task": c.task.name, "score": c.score, "threshold": c.threshold}
            for c in decision.candidates
        ],
        "side": _side_fields(decision.side) if decision.side else None,
        "shadows": [_shadow_fields(shadow) for shadow in decision.shadows],
    }


def _side_fields(side: Side) -> dict[str, object]:
    return {
        "task": side.challenger.name,
        "current_revision": side.current.revision,
        "challenger_revision": side.challenger.revision,
        "by_challenger": side.by_challenger,
    }


def _shadow_fields(shadow: ShadowDecision) -> dict[str, object]:
    return {
        "shadow_of": shadow.challenger.name,
        "shadow_revision": shadow.challenger.revision,
        "outcome": shadow.outcome.value,
        "task": shadow.task.name if shadow.task else None,
        "task_revision": shadow.task.revision if shadow.task else None,
        "score": _finite(shadow.score),
        "differs": shadow.differs,
    }


def _answer_fields(text: str, events: Sequence[AnswerEvent]) -> dict[str, object]:
    from router.answer import AnswerSummary
    from router.decision import Decision

    decisions = [event for event in events if isinstance(event, Decision)]
    summaries = [event for event in events if isinstance(event, AnswerSummary)]
    return {
        **_decision_fields(text, decisions[0]),
        "answer": "".join(event for event in events if isinstance(event, str)),
        "finish": summaries[0].finish_reason.value,
        "usage": {
            "input_tokens": summaries[0].input_tokens,
            "prompt_tokens": summaries[0].prompt_tokens,
            "output_tokens": summaries[0].output_tokens,
            "truncated": summaries[0].truncated,
        },
    }


def _policy(text: str | None) -> RejectionPolicy | None:
    from router.rejection import RejectionPolicy

    return None if text is None else RejectionPolicy.parse(text, "--on-unknown")


def _used(decision: Decision) -> str:
    """The task that is used, and why where that does not follow from the outcome."""
    from router.decision import USE_WITHOUT_POLICY

    task = str(decision.used or "-")
    if decision.use is USE_WITHOUT_POLICY[decision.outcome]:
        return task
    return f"{task} ({decision.use.value.replace('_', ' ')})"


def _finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 1] + "…"
