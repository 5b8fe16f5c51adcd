"""Fuzzes one reader with libFuzzer, by way of atheris, which is not among the developers' tools: `pip install atheris`.

    python tests/fuzz/with_atheris.py trace_line -max_total_time=300

What stands behind the name of the target goes to libFuzzer. It ends with a crash file and a traceback where anything
but a clear error is raised, an input takes longer than `-timeout` seconds, or more memory than `-rss_limit_mb`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shardproof", "json"]):
    import targets

KEYS = [
    *('"step":', '"stage":', '"name":', '"piece":', '"whole":', '"offset":', '"shape":', '"pending":', '"stretch":'),
    *('"depth":"full"', '"depth":"stats"', '"sketch":', '"stats":', '"file":', '"at":', '"bytes":', '"missing":true'),
    *(
        '"event":',
        '"records":',
        '"samples":',
        '"tensors":',
        '"chunks":',
        '"files":',
        '"extra":',
        '"tuple":',
        '"items":',
    ),
    *("NaN", "Infinity", "1e999", "9007199254740993", "-1", "\\ud800", "[[[[", "null", "true", "../", "\x1b[2J"),
]
"""Words that a fuzzer does not find by itself in minutes."""


def main() -> None:
    """Runs until libFuzzer ends it."""
    read, seeds = targets.TARGETS[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(seeds()):
            (corpus / str(number)).write_bytes(seed)
        words = Path(folder) / "words"
        quoted = (key.replace("\\", "\\\\").replace('"', '\\"').replace("\x1b", "\\x1b") for key in KEYS)
        words.write_text("".join(f'"{word}"\n' for word in quoted))
        defaults = ["-timeout=10", "-rss_limit_mb=4096", f"-dict={words}"]
        atheris.Setup([sys.argv[0], *defaults, *sys.argv[2:], str(corpus)], read)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
