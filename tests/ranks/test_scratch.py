"""Where the ranks' own children keep their sockets."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_PROGRAM = """
import sys
from multiprocessing.connection import Listener
from pathlib import Path
from shardproof.ranks.scratch import home_of_sockets
with home_of_sockets(Path(sys.argv[1])), Listener(family="AF_UNIX") as listener:
    print(listener.address)
"""


@pytest.mark.parametrize(("name", "there"), [("d", True), ("d" * 80, False)])
def test_sockets_lie_in_the_folder_where_their_paths_are_short_enough(name: str, there: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="f-") as short:
        folder = Path(short) / name
        folder.mkdir()
        program = [sys.executable, "-c", _PROGRAM, str(folder)]
        done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert (Path(done.stdout.strip()).parent == folder) is there
