"""Steps a second of shardproof's Trainer, of a loop by hand, and of other libraries, side by side in one run.

    pip install -r benchmarks/requirements-trainer.txt
    python benchmarks/trainer.py [--only WORDS] [--steps N] [--rounds N] [--json PATH] [--device cuda]

Every contestant trains the same model from the same weights on the same samples in the same order, in float32, with
the same AdamW and without clipping. All of them live in the same processes, one for each rank and each with one
thread, and take turns of some steps, so that a busy machine is busy for all of them; each round starts with another
one. A ratio is seconds over those of the loop by hand in the same round; the table has their median, least and most,
and the median for processor time, which tells work from waiting. The loop by hand takes part twice: the ratio of its
second self is what the measurement is good to.

What each of them shards is read from the parameters that its ranks hold, and losses are compared, so that neither a
layout that was not applied nor a training of something else goes unseen. Memory is measured afterwards, for each
contestant in processes of its own.

Models: digits and gpt of examples/, and transformers' Llama in the size of gpt, as transformers lays out its own model
classes only. `--only digits,gpt,ddp,tp,shardproof,fabric` takes part of each list; the loop by hand is always there.
`single` is one rank without any layout, where nothing is waited for. With `--device cuda` there is nothing else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import platform
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from shardproof.ranks import start

RANKS = 4
STRATEGIES = ("single", "ddp", "fsdp", "tp", "tp_fsdp")
PEERS = ("torch", "lightning", "transformers", "accelerate")
TIMEOUT_S = 3600.0


def chosen(words: str | None, lists: dict[str, Sequence[str]]) -> dict[str, list[str]]:
    """Of each list those that are named, or all of it where none is. Raises `SystemExit` for a word in no list."""
    named = [word.strip() for word in words.split(",")] if words else []
    for word in named:
        if not any(word in names for names in lists.values()):
            raise SystemExit(
                f"--only {word}: there is no such thing; there are {'; '.join(map(', '.join, lists.values()))}"
            )
    return {kind: [name for name in names if name in named] or list(names) for kind, names in lists.items()}


def measure(model: str, strategy: str, names: Sequence[str], options: argparse.Namespace) -> dict[str, object] | None:
    """One model under one layout: turns, then memory; prints its table. None where the loop by hand is alone."""
    from trainers import memory
    from trainers.field import AGAIN, FIELD
    from trainers.measure import Arena
    from trainers.table import plain, rows, show
    from trainers.task import task

    ranks = 1 if strategy == "single" else RANKS
    this = task(model, strategy, ranks)
    enter = [name for name in names if FIELD[name].enters(this)]
    if len(enter) < 3:
        return None
    arena = Arena(task=this, names=enter, steps=options.steps, rounds=options.rounds)
    with start(ranks, arena, timeout_s=TIMEOUT_S, device=options.device) as pool:
        seen = pool.call("take_turns")[0]
        flops = pool.call("count")[0] if options.peak_tflops is not None else None
    weights = {}
    if options.device == "cpu" and memory.measurable() and not options.no_memory:
        for name in enter:
            if name != AGAIN:
                with start(ranks, arena, timeout_s=TIMEOUT_S) as pool:
                    weights[name] = max(pool.call("weigh", name).values())
    made = rows(seen, weights, options.steps)
    show(this, made, flops=flops, peak_tflops=options.peak_tflops)
    return plain(this, made, seen)


def quiet() -> None:
    """Notes and warnings of other libraries would tear the table apart; forked ranks inherit this."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_utilities"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")


def versions() -> dict[str, str]:
    """Of torch and of the peers that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    # Before torch is loaded: ranks share the cores. The address is what Fabric and Accelerate ask for; nobody uses it.
    os.environ |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    # Read when these libraries are loaded.
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    from trainers.field import AGAIN, BASE, FIELD, IMPORTS, PACKAGES
    from trainers.task import MODELS

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="of each contestant in each round")
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--only", metavar="WORDS", help="models, layouts and contestants, with commas in between")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: one device, no layout")
    parser.add_argument("--peak-tflops", type=float, metavar="N", help="of the device, to say how much of it is used")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write everything there")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.rounds < 1:
        parser.error(f"--steps {options.steps} --rounds {options.rounds}: give at least 1 of each")
    layouts = ("single",) if options.device == "cuda" else STRATEGIES
    there = versions()
    names = [name for name in FIELD if PACKAGES.get(name, "torch") in there]
    picked = chosen(options.only, {"models": list(MODELS), "layouts": layouts, "contestants": names})
    field = [name for name in names if name in {BASE, AGAIN, *picked["contestants"]}]
    print(
        f"{', '.join(f'{name} {number}' for name, number in there.items())}; Python {platform.python_version()}, "
        f"{os.cpu_count()} CPUs, one thread a rank; {options.rounds} rounds of {options.steps} steps"
    )
    for name in FIELD:
        if name not in names:
            print(f"without {name}: {PACKAGES[name]} is not installed (benchmarks/requirements-trainer.txt)")
    for package in {PACKAGES[name] for name in field if name in PACKAGES}:
        for module in IMPORTS[package]:
            importlib.import_module(module)
    quiet()
    models = [name for name in picked["models"] if name != "llama" or "transformers" in there]
    found = [measure(model, layout, field, options) for model in models for layout in picked["layouts"]]
    if options.json is not None:
        about = {"versions": there, "python": platform.python_version(), "cpus": os.cpu_count()}
        about |= {"steps": options.steps, "rounds": options.rounds, "device": options.device}
        options.json.write_text(json.dumps(about | {"runs": [run for run in found if run]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
