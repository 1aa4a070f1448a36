"""What a publish did, for people and for programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from trainer.cli.console import fail, out, print_json, print_table

if TYPE_CHECKING:
    from router.challengers import Challenge
    from router.tasks import TaskRecord
    from trainer.admission import SuspectInput
    from trainer.gate import GateReport
    from trainer.workshop import Published


def print_published(published: Published, as_json: bool) -> None:
    """Print the revision and what the publish did to routing."""
    if as_json:
        gate = published.gate.document() if published.gate else None
        print_json(
            {
                "revision": published.revision,
                "report": published.report,
                "gate": gate,
                **challenges_document(published),
            }
        )
        return
    out.print(f"published catalog revision {published.revision}")
    print_effect(published)
    if published.gate is not None:
        print_gate(published.gate)


def publish_or_refuse(publish: Callable[[], Published], as_json: bool) -> None:
    """Publish and print what that did; where the gate refuses, print why and leave."""
    from trainer.gate import InterferenceError

    try:
        published = publish()
    except InterferenceError as error:
        if not as_json:
            print_gate(error.report)
        fail(error, as_json)
    print_published(published, as_json)


def challenges_document(published: Published) -> dict[str, object]:
    """The challengers that there are now and those that there are no more, for programs."""
    return {
        "challengers": [challenge_fields(each) for each in published.challenges],
        "ended_challengers": [challenge_fields(each) for each in published.ended],
    }


def challenge_fields(challenge: Challenge) -> dict[str, object]:
    """What programs are told of a challenger; the share of a shadow is None."""
    return {"task": challenge.task, "revision": challenge.revision, "share": challenge.share}


def print_effect(published: Published) -> None:
    """What the publish did to routing, on the rows that the tasks hold out in turn."""
    report, head = published.report, published.head
    _print_challenges(published)
    if not head.tasks:
        out.print("no live task is left: every input is unknown now")
        return
    if not report["held_out_rows"]:
        out.print("no task keeps rows to hold out: nothing can be said of how they are routed")
        return
    out.print(
        f"routing of held-out rows: {report['held_out_accuracy']:.1%} right, "
        f"{report['held_out_rejected']:.1%} rejected, {report['held_out_ambiguous']:.1%} ambiguous "
        f"({len(head.tasks)} tasks, {head.kind})"
    )
    changed = published.changed_decisions
    if changed:
        listed = ", ".join(f"{task} {rows}" for task, rows in sorted(changed.items())[:10])
        out.print(
            f"decisions on old held-out rows that changed: {sum(changed.values())} ({listed})"
        )
    else:
        out.print("decisions on old held-out rows that changed: none")


def _print_challenges(published: Published) -> None:
    for each in published.challenges:
        what = "a shadow: it decides, and never answers"
        if each.share is not None:
            what = f"it answers {each.share_text} of the request keys"
        out.print(f"challenger {each.key}: {what}", markup=False, highlight=False)
    for each in published.ended:
        is_live = each.key in published.head.tasks
        what = "the current revision now" if is_live else "tried no more"
        out.print(f"{each.key} is {what}", markup=False, highlight=False)


def summary(record: TaskRecord) -> dict[str, object]:
    """What programs are told of a task."""
    return {
        "name": record.name,
        "revision": record.revision,
        "sha256": record.sha256,
        "rows": record.data.rows,
        "outputs": record.outputs,
        "template": record.template,
        "prompt": asdict(record.prompt) if record.prompt else None,
        "created_at": record.created_at,
    }


def print_gate(gate: GateReport, suspects: Sequence[SuspectInput] = ()) -> None:
    """What the new tasks do to the old ones, and which of their rows look wrong."""
    if gate.accuracy_before is not None and gate.accuracy_after is not None:
        out.print(
            "right on the held-out rows of old tasks: "
            f"{gate.accuracy_before:.1%} before, {gate.accuracy_after:.1%} with the new one"
        )
    if gate.taken:
        print_table(
            ["task", "taken by", "rows", "share"],
            [[t.task, t.by, f"{t.taken} of {t.rows}", f"{t.share:.1%}"] for t in gate.taken[:10]],
            title="held-out rows of a task that go to a new one",
        )
    for new, old in gate.near_duplicates:
        out.print(f"{new} is nearly the same as {old}: a fifth of their rows or more is mixed up")
    if suspects:
        print_table(
            ["new task", "input", "goes to"],
            [[s.task, s.input, s.decided or "none (outlier?)"] for s in suspects[:10]],
            title=f"{len(suspects)} new rows that go elsewhere: mislabelled, or unlike the others?",
        )
