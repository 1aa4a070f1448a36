"""The README keeps its word: what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.main import get_command

from trainer.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_command_in_the_readme_exists_and_knows_its_flags() -> None:
    command = get_command(app)
    found = re.findall(r"promptyard ((?:evaluate |policy )?[a-z]+)([^\n;&]*)", README)
    assert len(found) >= 8
    for name, arguments in found:
        current = command
        for word in name.split():
            current = current.commands[word]  # type: ignore[attr-defined]
        known = {option for parameter in current.params for option in parameter.opts}
        flags = set(re.findall(r"--[a-z-]+", arguments.split("#")[0]))
        assert flags <= known, f"promptyard {name}: {flags - known}"


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_to_a_file(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        assert target.startswith("http") or (document.parent / target).exists(), target


def test_every_module_of_the_two_walks_exists() -> None:
    walks = README.split("## Two walks")[1].split("## Decisions")[0]
    names = set(re.findall(r"`([a-z0-9_/]+\.py)`", walks))
    assert len(names) >= 10
    for name in names:
        places = [ROOT / name, ROOT / "router" / name, ROOT / "trainer" / name]
        assert any(place.exists() for place in places), name
