"""What a publish did, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from trainer.cli.console import out, print_json

if TYPE_CHECKING:
    from router.tasks import TaskRecord
    from trainer.workshop import Published


def print_published(published: Published, as_json: bool) -> None:
    """Print the revision and what the publish did to routing."""
    if as_json:
        print_json({"revision": published.revision, "report": published.report})
        return
    out.print(f"published catalog revision {published.revision}")
    print_effect(published)


def print_effect(published: Published) -> None:
    """What the publish did to routing, on the rows that the tasks hold out in turn."""
    report, head = published.report, published.head
    if not head.tasks:
        out.print("no live task is left: every input is unknown now")
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


def summary(record: TaskRecord) -> dict[str, object]:
    """What programs are told of a task."""
    return {
        "name": record.name,
        "revision": record.revision,
        "sha256": record.sha256,
        "rows": record.data.rows,
        "outputs": record.outputs,
        "prompt": asdict(record.prompt) if record.prompt else None,
        "created_at": record.created_at,
    }
