"""Compares downstream tasks with what composer made of them: token ids and a tiny model's scores.

    python benchmarks/icl_golden.py --data DIR --tokenizer FILE --prompts PROMPTS.json \\
        --scores SCORES.json

DIR holds the tasks' JSONL files, FILE is the tokenizer.json of GPT-NeoX-20B. PROMPTS.json has, by
task, hashes over all token ids that composer 0.17.2 makes of it; SCORES.json what composer's
metrics say of the model in `tiny_neox.py` on the first questions of a task. The settings of the
tasks are those of configs/evaluations/gadre2024.yaml. Prints a line a task. Exit code 1: something
differs; 2: a file cannot be read.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny_neox import TinyNeoX

from scaling_jax.data.vocabularies import Vocabulary, vocabulary
from scaling_jax.errors import UserError
from scaling_jax.evaluation import generation, prompts, results, scoring, tasks
from scaling_jax.evaluation.prompts import Digest, Prompt
from scaling_jax.evaluation.results import Outcome
from scaling_jax.evaluation.scoring import ChoiceScore, Scorer
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

NATS = 1e-4  # of the mean negative log-probability
CONFIG = "gadre2024"

Golden = Mapping[str, Any]


def main() -> None:
    """Compares every task of both files."""
    parser = argparse.ArgumentParser(description="Compares downstream tasks with composer.")
    for name in ("data", "tokenizer", "prompts", "scores"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    try:
        hashes, scores = read(given.prompts), read(given.scores)
        ids = vocabulary(str(given.tokenizer))
        if not given.data.is_dir():
            raise UserError(f"{given.data}: there is no such folder")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    config, scorer, differing = tasks.load(CONFIG), TinyNeoX(), 0
    names = list(dict.fromkeys([*hashes, *scores]))
    for name in names:
        both = hashes.get(name), scores.get(name)
        try:
            line, faults = compare(name, *both, given.data, ids, config, scorer)
        except KeyError as key:
            line, faults = "", [f"what is known of it has no {key}"]
        differing += bool(faults)
        print(f"{name:<34}{'; '.join(['DIFFERS', *faults]) if faults else line}", flush=True)
    print(f"{len(names) - differing} of {len(names)} tasks are as composer has them")
    sys.exit(1 if differing else 0)


def read(path: Path) -> dict[str, Golden]:
    """What is known of each task.

    Raises:
      UserError: the file cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(task, dict) for task in found.values()):
        raise UserError(f"{path}: must map the names of tasks to what is known of them")
    return found


def compare(
    name: str,
    hashes: Golden | None,
    scores: Golden | None,
    data: Path,
    ids: Vocabulary,
    config: TasksConfig,
    scorer: Scorer,
) -> tuple[str, list[str]]:
    """What a task was found to be, in words, and all that differs."""
    if scores and scores["type"] == "question_answering":
        return compare_answers(scores, ids, scorer)
    if name not in config.tasks:
        return "", [f"{CONFIG} has no such task"]
    task, faults, found = config.tasks[name], [], []
    for golden in filter(None, (hashes, scores)):
        for key, ours in (("type", task.type), ("num_fewshot", task.shots)):
            faults += _differs(key, ours, golden[key])
        # Of some tasks only a part of the file was there.
        task = dataclasses.replace(task, data=golden["data"])
    longest = scores["max_seq_len"] if scores else config.max_tokens
    try:
        asked = list(prompts.build(task, data / task.data, ids, longest, config.seed))
    except UserError as error:
        return "", [str(error)]
    if hashes:
        faults += compare_prompts(hashes, asked)
        found.append(f"{len(asked):>6} prompts equal")
    if scores:
        gap, count, wrong = compare_scores(task, scores, asked, scorer)
        faults += wrong
        found.append(f"{count:>3} scored: nats per token within {gap:.1e}")
    return "  ".join(found), faults


def compare_prompts(golden: Golden, asked: Sequence[Prompt]) -> list[str]:
    """What differs between the token ids of all questions and composer's."""
    whole, parts = Digest(), dict[str, Digest]()
    for prompt in asked:
        whole.add(prompt)
        parts.setdefault(prompt.category, Digest()).add(prompt)
    faults = _differs("questions", len(asked), golden["n"])
    truncated = sum(prompt.truncated for prompt in asked)
    faults += _differs("truncated sequences", truncated, golden["truncated_sequences"])
    faults += _differs("sha256 of all ids", whole.sha256, golden["sha256"])
    if golden["per_category"]:
        faults += _differs("categories", sorted(parts), sorted(golden["per_category"]))
    for category, each in golden["per_category"].items():
        if category in parts:
            faults += _differs(f"sha256 of {category}", parts[category].sha256, each["sha256"])
    return faults


def compare_scores(
    task: TaskConfig, golden: Golden, asked: Sequence[Prompt], scorer: Scorer
) -> tuple[float, int, list[str]]:
    """The largest difference in nats per token, of how many questions, and all that differs."""
    faults: list[str] = []
    gaps = [0.0]
    count = 0
    for category, part in golden["categories"].items():
        first = [prompt for prompt in asked if prompt.category == category][: part["n_scored"]]
        # The model takes one row after the other anyhow.
        scores = scoring.score(first, scorer, tokens_per_batch=1)
        outcomes = [results.outcome(task, *both) for both in zip(first, scores, strict=True)]
        faults += _differs("questions", len(first), len(part["examples"]))
        for prompt, choices, outcome, wanted in zip(
            first, scores, outcomes, part["examples"], strict=False
        ):
            where = f"question {prompt.index}" + (f" of {category}" if category else "")
            gap, wrong = _compare_question(prompt, choices, outcome, wanted)
            gaps.append(gap)
            faults += [f"{where}: {fault}" for fault in wrong]
        accuracy = float(np.mean([outcome.correct for outcome in outcomes], dtype=np.float32))
        faults += _differs("accuracy", np.float32(accuracy), np.float32(part["accuracy_first_n"]))
        count += len(first)
    return max(gaps), count, faults


def compare_answers(golden: Golden, ids: Vocabulary, scorer: Scorer) -> tuple[str, list[str]]:
    """Greedy answers to prompts given as ids."""
    contexts = [np.array(row, np.int32) for row in golden["prompt_ids_unpadded"]]
    rows = generation.generate(contexts, scorer, golden["generation_length"], ids.end_of_text)
    answers = ids.decode_batch(rows)
    correct = [
        generation.is_right(answer, aliases)
        for answer, aliases in zip(answers, golden["labels"], strict=True)
    ]
    faults = _differs("answers", answers, golden["outputs"])
    faults += _differs("accuracy", float(np.mean(correct)), golden["accuracy"])
    return f"{len(answers):>6} answers equal", faults


def _compare_question(
    prompt: Prompt, scores: Sequence[ChoiceScore], outcome: Outcome, wanted: Golden
) -> tuple[float, list[str]]:
    faults, gaps = [], []
    if "choices" in wanted:
        faults += _differs("gold", prompt.gold, wanted["gold"])
        faults += _differs("prediction", outcome.prediction, wanted["pred"])
    else:
        faults += _differs("correct", outcome.correct, wanted["correct"])
    for choice, score, each in zip(
        prompt.choices, scores, wanted.get("choices", [wanted]), strict=True
    ):
        faults += _differs("start", len(choice.context), each["start"])
        faults += _differs("tokens", len(choice.tokens), each["n_tokens"])
        if "argmax" in each:
            faults += _differs("likeliest tokens", list(score.likeliest), each["argmax"])
        for nats in (each["mean_nll_f32"], -each["sum_logprob"] / each["n_tokens"]):
            gaps.append(abs(score.nats_per_token - nats))
    if not max(gaps) <= NATS:
        faults.append(f"nats per token differ by {max(gaps):.1e}")
    return max(gaps), faults


def _differs(what: str, ours: object, golden: object) -> list[str]:
    return [] if ours == golden else [f"{what}: {ours}, not {golden}"]


if __name__ == "__main__":
    main()
