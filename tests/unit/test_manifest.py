"""Manifests: several tasks in one YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest

from router.errors import InvalidInputError
from trainer.commands import RegisterTask
from trainer.data import Fields
from trainer.manifest import read_manifest, read_tuning


def manifest(folder: Path, text: str) -> Path:
    path = folder / "tasks.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_manifest(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tasks_are_read_in_order_with_paths_from_the_manifest(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        """
        tasks:
          - name: review-sentiment
            data: data/reviews.jsonl
            instruction: Is the review positive or negative?
          - name: urgency
            data: /elsewhere/urgency.csv
            description: größe 天気
            input_field: text
            output_field: label
            with_prompt: false
            free_text: true
            drop_duplicates: true
            revise: true
            force: a good reason
        """,
    )
    first, second = read_manifest(path)
    assert first == RegisterTask(
        "review-sentiment",
        tmp_path / "data" / "reviews.jsonl",
        instruction="Is the review positive or negative?",
    )
    assert second == RegisterTask(
        "urgency",
        Path("/elsewhere/urgency.csv"),
        description="größe 天気",
        fields=Fields("text", "label"),
        with_prompt=False,
        free_text=True,
        drop_duplicates=True,
        revise=True,
        force="a good reason",
    )


def test_other_keys_beside_tasks_are_allowed_for_anchors(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        """
        common: &common {with_prompt: false}
        tasks:
          - {<<: *common, name: a, data: a.csv}
        """,
    )
    assert read_manifest(path) == [RegisterTask("a", tmp_path / "a.csv", with_prompt=False)]


def test_a_missing_manifest_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.yaml", "No such file", "check the path")
    refused(tmp_path, "check the path")


@pytest.mark.parametrize(
    "text",
    ["", "null", "7", "text", "- a", "tasks:", "tasks: 7", "tasks: {}", "tasks: []", "task: [a]"],
)
def test_a_file_without_a_list_of_tasks_is_refused(tmp_path: Path, text: str) -> None:
    refused(manifest(tmp_path, text), "no list 'tasks'", "list the tasks under the key 'tasks'")


@pytest.mark.parametrize(
    "text",
    [
        "tasks: [",
        "tasks: 'open",
        "\ttasks: []",
        "tasks: !!python/object/apply:os.system ['true']",
        "tasks: *nobody",
        "tasks: [{name: 2024-13-45, data: a.csv}]",
        "tasks: [{name: !!int many, data: a.csv}]",
        "tasks: " + "[" * 1000,
        "{? [a]: b}",
        "tasks: \x07",
    ],
)
def test_a_file_that_is_no_yaml_is_refused(tmp_path: Path, text: str) -> None:
    refused(manifest(tmp_path, text), "give a YAML file")


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_bytes(b"tasks: caf\xe9")
    refused(path, "the byte 0xe9", "save the file as UTF-8")


def test_a_name_that_is_given_twice_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    tasks = [("weather", "a.csv"), ("sport", "b.csv"), ("weather", "c.csv")]
    entries = ", ".join(f"{{name: {name}, data: {data}}}" for name, data in tasks)
    refused(
        manifest(tmp_path, f"tasks: [{entries}]"),
        "task 3, name: weather (as task 1)",
        "name every task once",
    )


def test_a_manifest_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    with path.open("wb") as file:
        file.truncate((16 << 20) + 1)
    refused(path, "over 16 MiB")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("text", "task 2: text; give a mapping"),
        ("[a, b]", "give a mapping"),
        ("{name: b}", "give at least 'name' and 'data'"),
        ("{data: b.csv}", "give at least 'name' and 'data'"),
        ("{name: '', data: b.csv}", "give at least 'name' and 'data'"),
        ("{name: b, data: b.csv, colour: red}", "task 2: colour; the keys are name, data"),
        ("{name: b, data: b.csv, 7: red}", "task 2: 7; the keys are"),
        ("{name: 7, data: b.csv}", "task 2, name: 7; give a text"),
        ("{name: null, data: b.csv}", "task 2, name: None; give a text"),
        ("{name: b, data: [b.csv]}", "task 2, data"),
        ("{name: b, data: b.csv, force: true}", "task 2, force: True; give a text"),
        ("{name: b, data: b.csv, revise: 'yes'}", "task 2, revise: yes; give true or false"),
        ("{name: b, data: b.csv, with_prompt: 1}", "task 2, with_prompt: 1; give true or false"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_by_number_and_key(
    tmp_path: Path, entry: str, problem: str
) -> None:
    text = f"tasks:\n  - {{name: a, data: a.csv}}\n  - {entry}\n"
    refused(manifest(tmp_path, text), problem)


def test_settings_of_tuning_stand_beside_the_tasks(tmp_path: Path) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text("tasks: [{name: a, data: a.csv}]\ntuning: {length: 40, method: prefix}\n")
    assert read_tuning(path) == {"length": 40, "method": "prefix"}
    path.write_text("tasks: [{name: a, data: a.csv}]\n")
    assert read_tuning(path) == {}


@pytest.mark.parametrize("tuning", ["[length]", "40", "{1: 2}"])
def test_settings_of_tuning_that_are_no_mapping_are_refused(tmp_path: Path, tuning: str) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(f"tasks: [{{name: a, data: a.csv}}]\ntuning: {tuning}\n")
    with pytest.raises(InvalidInputError, match=r"tuning: .*; give a mapping of settings"):
        read_tuning(path)
