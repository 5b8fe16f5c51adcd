"""What user code prints on ranks reaches the user whole, once, labelled, and never as a flood."""

import ctypes
import os
import sys
import warnings

import pytest

from shardproof.errors import RankFailed
from shardproof.ranks import Place, start
from shardproof.ranks.output import MAX_BYTES, MAX_LINES, Caught, grouped, label


class Talks:
    def alike(self, place: Place) -> None:
        print("building the model")
        print(f"shard {place.rank}")
        print("done", file=sys.stderr)

    def natively(self, place: Place) -> None:
        os.write(1, b"from a descriptor\n")
        ctypes.CDLL(None).puts(b"from C")
        print("no newline", end="")

    def progress(self, place: Place) -> None:
        for step in range(3):
            print(f"\r{step + 1}/3", end="", file=sys.stderr)

    def warns(self, place: Place) -> None:
        warnings.simplefilter("default")
        warnings.warn("is deprecated", FutureWarning, stacklevel=1)

    def floods(self, place: Place, lines: int, width: int) -> None:
        for number in range(lines):
            print(f"{number:<{width}}|")

    def fails(self, place: Place) -> None:
        print(f"rank {place.rank} is about to work")
        if place.rank == 1:
            raise ValueError("3 is not 4")


def _said(method: str, *args: object, size: int = 1, during: str = "ddp") -> list[str]:
    lines: list[str] = []
    with start(size, Talks()) as ranks:
        ranks.on_output = lines.append
        ranks.call(method, *args, during=during)
        ranks.call("warns", ranks=[0])
    return [line for line in lines if "Warning" not in line and "warnings.warn(" not in line]


def test_lines_that_several_ranks_print_are_shown_once() -> None:
    assert _said("alike", size=3) == [
        "[ddp ranks 0-2] building the model",
        "[ddp rank 0] shard 0",
        "[ddp rank 1] shard 1",
        "[ddp rank 2] shard 2",
        "[ddp ranks 0-2] done",
    ]


def test_native_code_and_half_lines_are_caught_too() -> None:
    assert sorted(_said("natively", during="")) == [
        "[rank 0] from C",
        "[rank 0] from a descriptor",
        "[rank 0] no newline",
    ]


def test_a_progress_bar_is_shown_in_its_last_state() -> None:
    assert _said("progress") == ["[ddp rank 0] 3/3"]


def test_a_warning_of_the_user_is_shown_and_one_of_torchs_own_noise_is_not() -> None:
    lines: list[str] = []

    class Warns:
        def step(self, place: Place) -> None:
            warnings.simplefilter("default")
            warnings.warn("mine", UserWarning, stacklevel=1)

        def noise(self, place: Place) -> None:
            warnings.warn("Slicing a flattened dim from root mesh will be deprecated in 2.11.", stacklevel=1)

    with start(1, Warns()) as ranks:
        ranks.on_output = lines.append
        ranks.call("noise")
        assert lines == []
        ranks.call("step")
    assert "UserWarning: mine" in lines[0]


def test_a_flood_is_cut_in_the_middle_and_says_so() -> None:
    lines = _said("floods", 1000, 4)
    assert len(lines) == MAX_LINES + 1
    assert lines[0] == "[ddp rank 0] 0   |"
    assert lines[MAX_LINES // 2] == f"[ddp rank 0] ... {1000 - MAX_LINES} lines left out ..."
    assert lines[-1] == "[ddp rank 0] 999 |"


def test_a_flood_of_long_lines_is_cut_by_size() -> None:
    lines = _said("floods", 50, 10_000)
    assert sum(map(len, lines)) < MAX_BYTES + 1000
    assert any("lines left out" in line for line in lines)
    assert lines[-1].startswith("[ddp rank 0] ")


def test_one_endless_line_is_cut_as_well() -> None:
    lines = _said("floods", 1, 200_000)
    assert sum(map(len, lines)) < MAX_BYTES + 1000
    assert any("long line left out" in line for line in lines)


def test_the_guilty_rank_and_the_others_are_heard_when_one_fails() -> None:
    lines: list[str] = []
    with start(2, Talks()) as ranks:
        ranks.on_output = lines.append
        with pytest.raises(RankFailed):
            ranks.call("fails", during="tp")
    assert lines == ["[tp rank 0] rank 0 is about to work", "[tp rank 1] rank 1 is about to work"]


def test_output_goes_to_stderr_unless_told_otherwise(capfd: pytest.CaptureFixture[str]) -> None:
    with start(1, Talks()) as ranks:
        ranks.call("progress")
    assert capfd.readouterr() == ("", "[rank 0] 3/3\n")


@pytest.mark.parametrize(
    ("lines", "want"),
    [
        ({0: ["a", "b"], 1: ["a", "b"]}, [((0, 1), "a"), ((0, 1), "b")]),
        ({0: ["b"], 1: ["a", "b"]}, [((1,), "a"), ((0, 1), "b")]),
        ({0: ["a", "a"], 1: ["a"]}, [((0, 1), "a"), ((0,), "a")]),
        ({0: ["a", "b"], 1: ["b", "a"]}, [((0,), "a"), ((0, 1), "b"), ((1,), "a")]),
        ({0: [], 1: []}, []),
    ],
)
def test_grouping_keeps_the_order_of_every_rank(lines: dict[int, list[str]], want: list[object]) -> None:
    assert list(grouped(lines)) == want


@pytest.mark.parametrize(
    ("ranks", "during", "want"),
    [
        ([0, 1, 2, 3], "ddp", "[ddp ranks 0-3]"),
        ([2], "tp=2", "[tp=2 rank 2]"),
        ([0, 2, 3], "", "[ranks 0, 2-3]"),
    ],
)
def test_labels_name_runs_of_ranks(ranks: list[int], during: str, want: str) -> None:
    assert label(ranks, during) == want


def test_caught_output_has_no_name_on_disk() -> None:
    caught = Caught()
    assert caught.new_lines() == []
    assert not isinstance(caught._file.name, str)
    caught.close()
