"""Calls that last: events, output while they run, a time limit that counts silence, SIGTERM."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from shardproof.errors import RankFailed, RankHung
from shardproof.ranks import Place, Ranks, start
from shardproof.ranks.live import LOOK_S, Live
from shardproof.ranks.output import MAX_LINES, Caught
from shardproof.trainer.signals import Termination

THREADS, EVENTS = 3, 50


class Squares(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        worker = get_worker_info()
        assert worker is not None
        return torch.tensor([index * index, os.getpid()])


class Works:
    def tells_from_threads(self, place: Place) -> str:
        def tell(thread: int) -> None:
            for number in range(EVENTS):
                place.tell({"thread": thread, "number": number, "padding": "x" * 1000})

        threads = [threading.Thread(target=tell, args=(thread,)) for thread in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        place.tell("last")
        return "answer"

    def tells_a_lambda(self, place: Place) -> None:
        place.tell(lambda: None)

    def tells_late(self, place: Place) -> None:
        threading.Timer(0.2, place.tell, args=("too late",)).start()

    def tells_in_a_child(self, place: Place) -> None:
        child = os.fork()
        if child == 0:
            place.tell("from a child")
            os._exit(0)
        os.waitpid(child, 0)
        place.tell("from the rank")

    def prints(self, place: Place, seen: Path) -> None:
        print(f"begin {place.rank}")
        print("half a line ...", end="", flush=True)
        assert _within(10.0, lambda: (seen / f"begin {place.rank}").exists()), "nobody has seen it"
        print(" and the rest")

    def floods(self, place: Place, floods: int, lines: int, seen: Path) -> None:
        for flood in range(floods):
            for number in range(lines):
                print(f"{flood}.{number}")
            assert _within(10.0, lambda last=f"{flood}.{lines - 1}": (seen / last).exists()), "nobody has seen it"

    def lives_long(self, place: Place, seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.2)
            if place.rank == 0:
                place.tell("alive")
        return "done"

    def goes_quiet(self, place: Place) -> None:
        self.lives_long(place, 1.0)
        time.sleep(60)

    def loads(self, place: Place) -> tuple[list[int], list[int]]:
        loader = DataLoader(Squares(), num_workers=2, persistent_workers=True)
        self.batches = iter(loader)  # held, so that its workers live on
        read = torch.cat(list(self.batches))
        return read[:, 0].tolist(), read[:, 1].unique().tolist()


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    with start(2, Works(), timeout_s=30.0) as ranks:
        yield ranks


@pytest.fixture
def events(ranks: Ranks) -> list[tuple[int, object]]:
    found: list[tuple[int, object]] = []
    ranks.on_event = lambda rank, event: found.append((rank, event))
    return found


def test_every_event_of_every_thread_arrives_in_order_and_before_the_answer(
    ranks: Ranks, events: list[tuple[int, object]]
) -> None:
    assert ranks.call("tells_from_threads") == {0: "answer", 1: "answer"}
    for rank in range(2):
        of_rank = [event for teller, event in events if teller == rank]
        assert of_rank.pop() == "last"
        for thread in range(THREADS):
            numbers = [event["number"] for event in of_rank if event["thread"] == thread]
            assert numbers == list(range(EVENTS))


def test_what_is_told_between_two_calls_is_dropped(ranks: Ranks, events: list[tuple[int, object]]) -> None:
    ranks.call("tells_late")
    time.sleep(0.4)
    ranks.call("lives_long", 0.1)
    assert [event for _, event in events] == ["alive"]


def test_a_child_of_a_rank_tells_nothing(ranks: Ranks, events: list[tuple[int, object]]) -> None:
    ranks.call("tells_in_a_child", ranks=[1])
    assert events == [(1, "from the rank")]


def test_telling_where_nobody_listens_does_nothing() -> None:
    Place(rank=0, size=1, local_rank=0, device_type="cpu").tell("hello")


def test_an_event_that_does_not_pickle_is_a_failure_of_its_rank() -> None:
    with start(1, Works()) as ranks, pytest.raises(RankFailed, match="pickle"):
        ranks.call("tells_a_lambda")


def _seeing(ranks: Ranks, seen: Path) -> list[str]:
    """The lines that `ranks` show from now on. Each leaves a file of its name in `seen`, for which ranks wait."""
    lines: list[str] = []

    def see(line: str) -> None:
        lines.append(line)
        (seen / line.partition("] ")[2]).touch()

    ranks.on_output = see
    return lines


def test_whole_lines_are_shown_while_a_live_call_runs(ranks: Ranks, tmp_path: Path) -> None:
    lines = _seeing(ranks, tmp_path)
    ranks.call("prints", tmp_path, ranks=[1], during="fit", live=True)
    assert lines == ["[fit rank 1] begin 1", "[fit rank 1] half a line ... and the rest"]


def test_the_bounds_of_output_hold_for_each_look_at_a_live_call(ranks: Ranks, tmp_path: Path) -> None:
    lines = _seeing(ranks, tmp_path)
    ranks.call("floods", 3, MAX_LINES - 50, tmp_path, ranks=[0], live=True)
    assert lines == [f"[rank 0] {flood}.{number}" for flood in range(3) for number in range(MAX_LINES - 50)]


def test_what_ranks_print_at_almost_the_same_time_is_shown_together() -> None:
    outputs, shown = [Caught(), Caught()], []
    live = Live(outputs, lambda: shown.append([output.new_lines(whole=True) for output in outputs]))
    for output in outputs:
        os.write(output._file.fileno(), b"hello\n")
        live.look()
        assert shown == []
    time.sleep(LOOK_S)
    live.look()
    assert shown == [[["hello"], ["hello"]]]
    for output in outputs:
        output.close()


def test_output_that_was_shown_takes_no_disk_space() -> None:
    output = Caught()
    descriptor, line = output._file.fileno(), b"x" * 1023 + b"\n"
    for _ in range(4):
        os.write(descriptor, line * 1024)
        assert output.has_more()
        output.new_lines(whole=True)
        output.free()
    os.write(descriptor, b"the rest\n")
    assert os.fstat(descriptor).st_blocks * 512 < 1024 * 1024 < 4 * 1024 * 1024 < os.fstat(descriptor).st_size
    assert output.new_lines() == ["the rest"]
    output.close()


def test_a_live_call_outlives_its_time_limit_as_long_as_a_rank_speaks_and_not_longer() -> None:
    with start(2, Works(), timeout_s=1.2) as ranks:
        assert ranks.call("lives_long", 2.0, live=True) == {0: "done", 1: "done"}
        began = time.monotonic()
        with pytest.raises(RankHung) as caught:
            ranks.call("goes_quiet", live=True)
    assert sorted(caught.value.stacks) == [0, 1]
    assert all("in goes_quiet" in stack for stack in caught.value.stacks.values())
    assert time.monotonic() - began > 2.0, "a second of life, and the time limit"


def test_events_do_not_prolong_an_ordinary_call() -> None:
    with start(1, Works(), timeout_s=0.5) as ranks, pytest.raises(RankHung):
        ranks.call("lives_long", 5.0)


def test_a_caller_that_is_slow_to_show_events_takes_no_rank_for_hung() -> None:
    with start(1, Works(), timeout_s=1.0) as ranks:
        slow = iter([1.5])
        ranks.on_event = lambda rank, event: time.sleep(next(slow, 0.0))
        assert ranks.call("lives_long", 1.0, live=True) == {0: "done"}


def test_a_rank_loads_data_in_workers_that_end_with_it() -> None:
    with start(2, Works()) as ranks:
        answers = ranks.call("loads", live=True)
    workers = [worker for _, of_rank in answers.values() for worker in of_rank]
    assert len(set(workers)) == 4
    assert all(squares == [index * index for index in range(8)] for squares, _ in answers.values())
    assert _within(5.0, lambda: not any(_alive(worker) for worker in workers))


_PROGRAM = """
import os, signal, sys, time
from shardproof.ranks import start
from shardproof.trainer.signals import Termination

class Fits:
    def fit(self, place, obeys):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        with Termination() as termination:
            place.tell((os.getpid(), child))
            while not (obeys and termination.requested):
                time.sleep(0.02)
            time.sleep(0.3)
        ended, _ = os.waitpid(child, os.WNOHANG)
        return "saved", ended == 0

def tell(rank, event):
    print(rank, *event, flush=True)

if __name__ == "__main__":
    with start(2, Fits(), timeout_s=30) as ranks:
        ranks.on_event = tell
        print(ranks.call("fit", sys.argv[1] == "obeys", live=True))
    print(signal.getsignal(signal.SIGTERM).name, flush=True)
"""


def _fit(how: str) -> tuple[subprocess.Popen[str], list[int]]:
    program = subprocess.Popen([sys.executable, "-c", _PROGRAM, how], stdout=subprocess.PIPE, text=True)
    assert program.stdout
    told = [program.stdout.readline().split() for _ in range(2)]
    return program, [int(pid) for _, *pids in told for pid in pids]


def test_a_sigterm_is_passed_on_to_the_ranks_and_the_call_returns() -> None:
    program, pids = _fit("obeys")
    program.send_signal(signal.SIGTERM)
    said, _ = program.communicate(timeout=20)
    assert said.splitlines() == ["{0: ('saved', True), 1: ('saved', True)}", "SIG_DFL"]
    assert program.returncode == 0
    assert _within(5.0, lambda: not any(map(_alive, pids)))


def test_a_second_sigterm_ends_the_ranks_and_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    program, pids = _fit("disobeys")
    for _ in range(2):
        program.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert all(map(_alive, pids)), "a launcher's echo of the first is no second request"
    time.sleep(2.0)
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=10) == -signal.SIGTERM
    program.communicate()
    assert _within(5.0, lambda: not any(map(_alive, pids)))


def test_a_handler_of_the_users_own_is_left_alone(ranks: Ranks, events: list[tuple[int, object]]) -> None:
    got: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    ranks.on_event = lambda rank, event: os.kill(os.getpid(), signal.SIGTERM) if not got else None
    try:
        assert ranks.call("lives_long", 0.5, live=True) == {0: "done", 1: "done"}
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")  # an orphan stays a zombie until the init process has reaped it
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_termination_is_requested_once_and_the_earlier_handler_comes_back() -> None:
    got: list[int] = []
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        with Termination() as termination:
            assert not termination.requested
            signal.raise_signal(signal.SIGTERM)
            assert termination.requested
            signal.raise_signal(signal.SIGTERM)  # of the same two seconds: the same request
        assert got == []
        signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, earlier)


def test_termination_outside_the_main_thread_does_nothing() -> None:
    def use() -> None:
        with Termination() as termination:
            found.append((termination.requested, signal.getsignal(signal.SIGTERM)))

    found: list[tuple[bool, object]] = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(False, signal.SIG_DFL)]
