"""What the page says of each part: a title, and how it is measured."""

from __future__ import annotations

from collections.abc import Mapping

METHODS = {
    "prompt": "prompt",
    "prefix": "prefix",
    "lora": "LoRA",
    "adapter": "bottleneck adapters",
    "full": "full fine-tuning",
}

# Title and text; what lines they are written in does not matter.
WORDS: Mapping[str, tuple[str, str]] = {
    "all": (
        "Soft prompts",
        """What soft prompts cost and answer beside the alternatives, on the 15 tasks of `cl15` (and
        two small sets of our own) and the embedded base model. The sides of a comparison are
        measured in the same run, on the same base, rows and precision. Everything is trained on
        `train` rows and chosen on `dev` rows; `test` rows are only scored. Parts are run alone or
        together, on a CPU or a GPU; the page is made of what they wrote (`bench_prompts.py
        --merge`).""",
    ),
    "tuning-speed": (
        "Tuning many tasks",
        """All tasks tuned together by `trainer.tuning`, beside PEFT's prompt tuning of one task
        after the other. The sides have the same network, precision, steps, rows (in the same
        order), start, optimiser and schedule; precision is what Promptyard chooses on the device.
        PEFT learns to write the right output; Promptyard's
        own loss also compares the labels of a task, which is more work, so that it is measured
        with PEFT's loss as well: the losses at the end must then be the same but for rounding
        (bfloat16's makes a percent or two).
        Promptyard validates on one row a task, PEFT not at all. Medians, and the least and the
        most of the repeats.""",
    ),
    "serving-speed": (
        "Serving many prompts",
        """One batch of rows with 16 different prompts. PEFT has one adapter for each prompt and
        switches: with the rows of a prompt in one batch (which knows all of them beforehand), or
        row by row, as requests come. `generate` writes greedy answers, `score` gives log p of one
        output for each row; both from texts. `same results` is the share of rows for which the
        two agree (log p: within 5 %). Medians, and the least and the most of the repeats.""",
    ),
    "costs": (
        "What a task takes",
        """The same training loop, loss and rows for all; they differ in what is trained. LoRA is
        PEFT's, rank 8, in the layers that PEFT chooses, and not merged; bottleneck adapters (32)
        follow the feed-forward part of every layer. Memory is the GPU's peak in training, base
        included. `switch` copies one task's tensors from host memory to where they are used.
        Latency is that of scoring the labels of one task for one row, alone in its batch; the
        base alone takes turns with the method. Rows of different prompts or prefixes share a
        batch, so that serving them switches nothing. Where weights are trained the instruction is
        left out of the latency, which favours them.""",
    ),
    "comparison": (
        "What the methods answer",
        """Every method learns each task by itself in the same training loop, with the same number
        of rates and checks on dev rows. Where weights are trained the instruction stands before the
        input, and there is dropout; prompts and prefixes start from instruction and labels.""",
    ),
    "forgetting": (
        "Forgetting",
        """The tasks in the order of the file, one after the other. Full fine-tuning, LoRA and
        adapters go on in the same weights, from the best of a task by its dev rows. Prompts and
        prefixes share no weights: they are tuned together, with the same steps and rows a task, and
        measured alone (then) and in batches with all others (at the end). BWT is the
        mean change of the test accuracy of all tasks but the last, from right after they were
        learned to the end.""",
    ),
    "accuracy": (
        "Accuracy",
        """Prompts and prefixes, all tasks tuned together by `trainer.tuning`, and one fully
        fine-tuned model a task: the same steps, rows, number of rates, and checks on dev rows.
        Means over the seeds, with the least and the most.""",
    ),
    "stream": (
        "A stream of tasks, none of which is named",
        """The tasks arrive one after the other, in the orders that continual learning is measured
        in (`cl15_orders.json`), and are registered as a user would: prompt, label classifier,
        routing, and a split of train and dev rows of its own. Then every test row is routed and
        answered under the task that it was routed to, beside the
        answers under its own task. Means over the tasks. BWT, in points, is the mean change of a
        task's answers since right after it arrived, of all tasks but the last. Asked for are at
        most 1.0 points under the right task's, a BWT of 0 with the right task given, and of at
        least -1.0 routed. The prompts do not change; but a GPU holds the base model in bfloat16,
        where the other rows of a batch can tip an answer whose labels are as good as equal.""",
    ),
    "data-size": (
        "How much data, and which start",
        """Prompts tuned on a few rows, with as many dev rows as train rows (all: as many as there
        are, at most `--dev-rows`). `nearest` starts from the other tasks' prompts, tuned on all
        their rows: the one with the least loss on the dev rows. Steps to the same loss: the
        median of when the dev loss was first as low as the vocabulary start's best on the same
        rows, of those runs in which it was.""",
    ),
    "context": (
        "With the retrieved passage, and without it",
        """Not on `cl15`: 320 questions about wares of an invented store, written for this, each
        with a passage of four sentences that holds the answer among other things (192 train, 48
        dev, 80 test rows; no ware is in two of them). Free text, right if it is the output. A
        prompt is tuned with the passages and another without, both with the same rows and steps;
        without a passage all that can be known is what answers are common. The interval is
        Wilson's, for the 80 rows.""",
    ),
    "safety": (
        "Rejected outputs",
        """Not on `cl15`: 240 messages of customers of invented companies, written for this, with a
        reply that is wanted and one that must not be given (120 train, 36 dev, 84 test rows; test
        messages combine what occurs in others). A prompt is tuned on replies of which half are the
        rejected ones, as they might be found; from there, one goes on with the desired replies, and
        one is told of the rejected ones as well (`rejected` rows, weight 1). Probabilities are of
        whole replies, means over the test rows. Asked for are at most half of before for the
        rejected, and not less than before for the desired ones.""",
    ),
}
