"""Writes the model card of the base model.

python -m trainer.base_model.card MODEL_DIR --figures FIGURES.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trainer.base_model.evaluate import Figures, mean
from trainer.base_model.sources import LEFT_OUT, SOURCES
from trainer.base_model.train import FAMILY_SHARES

_FAMILIES = {
    "written": "instruction tasks as their authors wrote them",
    "verification": "is this output right? (outputs of the same task as wrong ones)",
    "choice": "which of two is right? Which sentence comes next, follows, contradicts?",
    "entailment": "SNLI and SciTail: three or two classes, 7 formats, natural or arbitrary labels",
    "intents": "all or a few intents or domains, by their names or by arbitrary words",
    "pairs": "same intent, statement, question, source, missing word? Word order, well-formedness",
    "semantics": "regions of the encoder's own embedding space, levels along scales, kinds of text",
    "opinions": "good or bad, and how much: sentences rated by a lexicon, reviews put together",
    "copying": "a word by place or neighbour, a field of a record, a role in an event, a slot",
    "rewriting": "fill in, put in order, split, join, continue",
}

_TEMPLATE = Path(__file__).with_name("card_template.md")

SHIPPED_RUN = {
    "minutes": "5.6",
    "more_minutes": "5.6",
    "dropout": "0.12, then 0.1",
    "flags": " --dropout 0.12",
    "more_flags": (
        " --start FIRST_STAGE --kept 0 --dropout 0.1 --learning-rate 0.5 --encoder-rate 0.4"
        " --episode-share 0.5 --seed 1"
    ),
    "tasks": "994",
    "rows": "1,323,606",
    "dropped": "187",
    "trained_steps": "4,500 steps on one H100 and 4,551 on one H200",
    "tuning_steps": "800",
    "tuning_rows": "16",
    "test_rows": "500",
    "full": (
        "Full fine-tuning is one model a task, 200 steps of 32\nrows, the better of two learning"
        " rates (1e-4, 3e-4) and of four checks by dev rows."
    ),
    "measured": (
        "Measured on one H200 in bf16 by\n`tests/benchmarks/bench_base_model.py --bf16 --steps 800"
        " --validations 5`, one seed, the tasks in groups side\nby side (`--tasks`)."
    ),
}
"""What the card says about the run that made the shipped weights; a rebuild changes it."""


def write_card(model: Path, figures: Figures) -> None:
    """Write `README.md` into the model's folder."""
    shares = [
        f"| {name} | {share:.0%} | {_FAMILIES[name]} |" for name, share in FAMILY_SHARES.items()
    ]
    sources = sorted(SOURCES.values(), key=lambda source: source.title.lower())
    text = _TEMPLATE.read_text(encoding="utf-8").format(
        families="\n".join(shares),
        figures=_figures_table(figures),
        sources="\n".join(f"| {s.title} | {s.licence} | {s.citation} |" for s in sources),
        left_out="\n".join(f"- {why}: {what}." for why, what in LEFT_OUT.items()),
        **SHIPPED_RUN,
    )
    (model / "README.md").write_text(text, encoding="utf-8")


def _figures_table(figures: Figures) -> str:
    """Ways of prompting as columns; the means on dev and test, then test by task."""
    names = list(figures["test"])
    rows = [["", *names], ["---"] * (len(names) + 1)]
    for split in (split for split in ("dev", "test") if split in figures):
        rows.append([f"**mean, {split}**", *(f"**{mean(figures[split][n]):.3f}**" for n in names)])
    for task in figures["test"][names[0]]:
        rows.append([task, *(f"{figures['test'][name][task]:.3f}" for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("--figures", type=Path, required=True, help="what `evaluate` wrote")
    options = parser.parse_args()
    write_card(options.model, json.loads(options.figures.read_text()))


if __name__ == "__main__":
    main()
