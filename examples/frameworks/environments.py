"""Makes an environment for each framework, with the shardproof of this checkout in it.

    python examples/frameworks/environments.py                    # all of them, into .venv/frameworks/NAME
    python examples/frameworks/environments.py fabric composer    # these two
    .venv/frameworks/fabric/bin/python examples/frameworks/fabric.py --layout tp_fsdp

Each has the torch of constraints.txt. `requirements-NAME.txt` is installed with what it requires, and
`requirements-NAME-no-deps.txt`, where there is one, without: its comments say why.
"""

import argparse
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent

ROOT = HERE.parents[1]

NAMES = tuple(
    sorted(
        path.stem.removeprefix("requirements-")
        for path in HERE.glob("requirements-*.txt")
        if not path.stem.endswith("-no-deps")
    )
)


def make(name: str, into: Path) -> None:
    """Set up the environment `into`/`name`, or bring the one that is there up to date."""
    python = into / name / "bin" / "python"
    if not python.exists():
        venv.create(into / name, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    # One command, so that pip finds versions that fit shardproof and the framework.
    subprocess.run([*install, "-e", str(ROOT), "-r", str(HERE / f"requirements-{name}.txt")], check=True)
    alone = HERE / f"requirements-{name}-no-deps.txt"
    if alone.exists():
        subprocess.run([*install, "--no-deps", "-r", str(alone)], check=True)


def main() -> None:
    """Make what was asked for, and say how long it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them by default")
    parser.add_argument("--into", type=Path, default=ROOT / ".venv" / "frameworks", metavar="DIR")
    given = parser.parse_args()
    for name in given.names:
        if name not in NAMES:
            parser.error(f"{name}: there is {', '.join(NAMES)}")
    for name in given.names or NAMES:
        began = time.monotonic()
        try:
            make(name, given.into)
        except subprocess.CalledProcessError as error:
            sys.exit(f"{name}: pip ended with exit code {error.returncode}; what it said is above")
        print(f"{name}: {given.into / name}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
