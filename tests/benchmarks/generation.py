"""`make bench-generation`: tokens a second of text generation beside transformers' `generate`, a table and a JSON line.

SmolLM2-135M in float32, read from GGUF, completes prompts of different lengths greedily, up to 64 tokens or the token
that ends a text. What batch runs use, a slot of one thread for each core, is held against `model.generate` over static
batches in order of length, of every size in SIZES, with all cores in one pass and with a thread for each core. The best
of those is found first, on part of the prompts; then both complete all prompts in turn. Only tokens of completions
count, up to the one that ends each. The rate by CPU seconds is there for machines that have other work.

PROMPTS=48, SIZES=16,32 and ROUNDS=1 for a quick look.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from serving.machine import count_cores
from serving.model.contract import Contract
from serving.model.encoding import encode
from serving.model.forward import Forward
from serving.model.interface import Tunable
from serving.model.loading import load_model
from serving.model.registry import resolve_model
from tests.benchmarks.shared import FOLDER, ROUNDS, console, machine, open_registry, use_experiment
from tests.generators import load_smollm2, register_generator
from tests.support import read_glosses

PROMPTS = int(os.environ.get("PROMPTS", "96"))
TOKENS_MAX = 64
SIZES = tuple(int(size) for size in os.environ.get("SIZES", "8,16,32,64").split(","))
QUESTIONS = (
    "Which single word is defined here? {}",
    "Say in one short sentence what this means: {}",
    "Is this an animal, a person, a place or a thing? Answer in one word. {}",
    "Explain this to a child, with an example: {}",
)

# Tokens by seconds and by CPU seconds.
Rates = tuple[float, float]


def main() -> None:
    """Measure and print."""
    open_registry()
    use_experiment("generation")
    pipeline = load_smollm2()
    prompts = make_prompts(pipeline.tokenizer)
    model, contract = load_ours(pipeline)
    few = prompts[: max(SIZES[-1], PROMPTS // 3)]
    static = list_static(pipeline)
    found = {
        name: measure_rates(run, few) for name, run in track(list(static.items()), "static batches", console=console)
    }
    best = max(found, key=lambda name: found[name])
    runs = {"ours": functools.partial(complete_ours, model, contract), best: static[best]}
    rates: dict[str, list[Rates]] = {name: [] for name in runs}
    for _, (name, run) in track(list(itertools.product(range(ROUNDS), runs.items())), "in turn", console=console):
        rates[name].append(measure_rates(run, prompts))
    show(found, rates, best, prompts)


def measure_rates(run: Callable[[Sequence[str]], int], prompts: Sequence[str]) -> Rates:
    """Return the tokens of a run by seconds and by CPU seconds."""
    start, start_cpu = time.perf_counter(), time.process_time()
    tokens = run(prompts)
    rates = tokens / (time.perf_counter() - start), tokens / (time.process_time() - start_cpu)
    console.print(f"{tokens:,} tokens: {rates[0]:.1f} a second, {rates[1]:.1f} a CPU second")
    return rates


def make_prompts(tokenizer: Any) -> list[str]:
    """Return questions about one to four glosses of WordNet, as the model's chat template has them."""
    glosses = iter(read_glosses(4 * PROMPTS))
    counts = np.random.default_rng(3).integers(1, 5, PROMPTS)
    texts = [
        QUESTIONS[at % len(QUESTIONS)].format("; ".join(itertools.islice(glosses, int(count))))
        for at, count in enumerate(counts)
    ]
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in texts
    ]


def load_ours(pipeline: Any) -> tuple[Tunable, Contract]:
    """Register the model once, and load it as a batch run does."""
    done = FOLDER / "generator.json"
    if not done.exists():
        done.write_text(json.dumps(register_generator("smollm2", pipeline)))
    resolved = resolve_model(json.loads(done.read_text()))
    contract = resolved.contract({}, {}, {"max_new_tokens": TOKENS_MAX})
    return load_model(resolved, contract), contract


def complete_ours(model: Tunable, contract: Contract, prompts: Sequence[str]) -> int:
    """Complete the prompts in every slot of the model, each its share as one block, and return the tokens."""

    def score(share: Sequence[str]) -> int:
        encoded = model.prepare(encode(contract, pa.table({"prompt": share})))
        with model.slot():
            counts = Forward(model, contract, model.batch_size).score(encoded)["completion_tokens"]
        return int(counts.sum())

    with ThreadPoolExecutor(model.slots) as pool:
        return sum(pool.map(score, [prompts[at :: model.slots] for at in range(model.slots)]))


def list_static(pipeline: Any) -> dict[str, Callable[[Sequence[str]], int]]:
    """Return the ways to complete prompts by `generate` in static batches, by name."""
    cores = count_cores()
    threads = {f"{cores} threads": 1, f"{cores} times 1 thread": cores}
    return {
        f"generate, batch {size}, {name}": functools.partial(run_static, pipeline, size, workers)
        for (name, workers), size in itertools.product(threads.items(), SIZES)
    }


def run_static(pipeline: Any, size: int, workers: int, prompts: Sequence[str]) -> int:
    """Complete prompts by `generate` in batches of `size`, in order of length, and return the tokens."""
    tokenizer = pipeline.tokenizer
    in_order = sorted(prompts, key=lambda prompt: len(tokenizer(prompt)["input_ids"]))

    def complete(batch: Sequence[str]) -> int:
        torch.set_num_threads(max(1, count_cores() // workers))
        features = tokenizer(list(batch), return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            sequences = pipeline.model.generate(**features, max_new_tokens=TOKENS_MAX, do_sample=False)
        return count_tokens(sequences[:, features["input_ids"].shape[1] :], tokenizer.eos_token_id)

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(complete, [in_order[at : at + size] for at in range(0, len(in_order), size)]))


def count_tokens(tokens_BL: torch.Tensor, end: int) -> int:
    """Return how many tokens there are in all rows, each up to the first that ends a text."""
    return sum(row.index(end) + 1 if end in row else len(row) for row in tokens_BL.tolist())


def show(found: dict[str, Rates], rates: dict[str, list[Rates]], best: str, prompts: Sequence[str]) -> None:
    """Print the table, then one JSON object."""
    table = Table("run", "tokens/s", "tokens/CPU s")
    for name, each in sorted(found.items(), key=lambda item: item[1]):
        table.add_row(f"{name}, part of the prompts", *(f"{rate:.1f}" for rate in each))
    for name, several in rates.items():
        table.add_row(name, *(describe(list(column)) for column in zip(*several, strict=True)))
    ratios = [[ours[at] / theirs[at] for ours, theirs in zip(rates["ours"], rates[best], strict=True)] for at in (0, 1)]
    table.add_row("ratio", *(describe(column, 2) for column in ratios))
    Console().print(table)
    figures = {
        "machine": machine(),
        "prompts": len(prompts),
        "best_static": best,
        "tokens_per_second": {name: [round(rate, 1) for rate, _ in several] for name, several in rates.items()},
        "ratio": round(statistics.median(ratios[0]), 2),
        "ratio_by_cpu_seconds": round(statistics.median(ratios[1]), 2),
    }
    print(json.dumps(figures))


def describe(rates: list[float], digits: int = 1) -> str:
    """Return a median and its range."""
    return f"{statistics.median(rates):.{digits}f} ({min(rates):.{digits}f}-{max(rates):.{digits}f})"


if __name__ == "__main__":
    main()
