"""What callbacks and loggers are told during training, and that evaluation and prediction leave it alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from stack import RANKS, Stack, among, experiment, loop, samples, world
from torch import Tensor, nn

import shardproof as sp
from shardproof.errors import RankFailed
from shardproof.ranks import Place, Ranks, start
from shardproof.trainer import exchange
from shardproof.trainer.callback import global_norm
from shardproof.trainer.loggers.json_lines import JSONLinesLogger

SHARDED = ("fsdp", "tp_ddp", "fsdp1", "tp_fsdp1")
UNEVEN = 11
"""Samples that neither four ranks nor batches of eight divide."""


class Diary(sp.Callback):
    """Writes down every event with what the progress says at that time."""

    def __init__(self, *, watches: bool = False) -> None:
        self.watches_gradients = watches
        self.events: list[str] = []
        self.norms: list[float] = []
        self.losses_told: list[tuple[int, int]] = []

    def _note(self, name: str, loop: Any) -> None:
        self.events.append(f"{name} {loop.progress.epoch}.{loop.progress.step}")

    def fit_start(self, loop: Any) -> None:
        self._note("fit_start", loop)

    def epoch_start(self, loop: Any) -> None:
        self._note("epoch_start", loop)

    def step_start(self, loop: Any) -> None:
        self._note("step_start", loop)

    def gradients(self, loop: Any) -> None:
        self._note("gradients", loop)
        self.norms.append(global_norm(loop).item())

    def step_end(self, loop: Any) -> None:
        self._note("step_end", loop)

    def losses(self, loop: Any, first_step: int, losses: list[float]) -> None:
        self.losses_told.append((first_step, len(losses)))

    def epoch_end(self, loop: Any) -> None:
        self._note("epoch_end", loop)

    def eval_end(self, loop: Any, results: Mapping[str, float]) -> None:
        self._note("eval_end", loop)

    def saved(self, loop: Any, path: Path) -> None:
        self._note(f"saved {path.name}", loop)

    def fit_end(self, loop: Any) -> None:
        self._note("fit_end", loop)


class Memory(sp.Logger):
    """Keeps what it is told; may fail at a step."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.told: list[tuple[int, dict[str, float]]] = []
        self.closed: list[bool] = []

    def open(self, about: Mapping[str, Any]) -> None:
        self.closed.clear()

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step == self.fails_at:
            raise OSError("the disk is full")
        self.told.append((step, dict(values)))

    def close(self, *, failed: bool = False) -> None:
        self.closed.append(failed)


class Raises(sp.Callback):
    """Raises in one event, from the second step on."""

    def __init__(self, event: str) -> None:
        self.event = event

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in ("event", "watches_gradients") and name == self.event:
            return self._raise
        return object.__getattribute__(self, name)

    def _raise(self, loop: Any, *_: Any) -> None:
        if loop.progress.step >= 2:
            raise LookupError(f"{self.event} went wrong")


class Pries(sp.Callback):
    """Evaluates and predicts wherever it can, with modules in modes of their own."""

    def _pry(self, loop: Any) -> None:
        modes = [module.training for module in loop.model.modules()]
        loop.evaluate(samples(UNEVEN))
        loop.predict(samples(UNEVEN))
        assert modes == [module.training for module in loop.model.modules()]

    def fit_start(self, loop: Any) -> None:
        self._pry(loop)

    def step_start(self, loop: Any) -> None:
        self._pry(loop)

    def step_end(self, loop: Any) -> None:
        self._pry(loop)

    def epoch_end(self, loop: Any) -> None:
        self._pry(loop)


class Worsens(sp.Callback):
    """The learning rate goes through the roof, so that evaluations get worse."""

    def step_start(self, loop: Any) -> None:
        loop.optimizer.param_groups[0]["lr"] = 1.0


def half_evaluating() -> nn.Module:
    model = Stack(dropout=0.5)
    model.blocks[0].eval()
    return model


def both(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    logits = model(batch[0])
    return {"logits": logits, "nested": (logits.argmax(-1), [batch[1]])}


class OnRanks:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def events(self, place: Place, watches: bool) -> Any:
        """Two epochs of two batches, evaluated every three steps and saved every epoch."""
        diary = Diary(watches=watches)
        with world(place, "ddp"):
            trained = loop(
                place, experiment(data=samples(16), max_grad_norm=1e-3), "ddp", max_duration="2ep",
                callbacks=diary, eval_data=samples(UNEVEN), eval_interval="3ba",
                save_folder=self.folder / f"events-{watches}",
            )  # fmt: skip
            trained.fit()
        return diary.events, diary.norms

    def logged(self, place: Place, resumes: bool) -> Any:
        """Eleven steps with exchanges that grow, evaluations and saves in between them."""
        memory, diary, file = Memory(), Diary(), self.folder / f"run-{resumes}.jsonl"
        about = experiment(data=samples(88))
        settings: dict[str, Any] = {
            "max_duration": "11ba", "eval_data": samples(UNEVEN), "eval_interval": "4ba",
            "save_folder": self.folder / f"saved-{resumes}", "save_interval": "7ba",
        }  # fmt: skip
        with world(place, "ddp"):
            if resumes:
                first = loop(place, about, "ddp", **settings, loggers=JSONLinesLogger(file))
                first.fit("7ba")
            trained = loop(
                place, about, "ddp", **settings, callbacks=diary, loggers=(memory, JSONLinesLogger(file)),
                load_path="auto" if resumes else None,
            )  # fmt: skip
            losses = trained.fit().losses
        lines = [json.loads(line) for line in file.read_text().splitlines()] if place.rank == 0 else []
        return losses, memory.told, memory.closed, diary.losses_told, lines

    def fails(self, place: Place, event: str) -> Any:
        """What ended a run, and what its loggers were told."""
        first, second, last = Memory(), Memory(fails_at=3 if event == "log" else None), Memory()
        with world(place, "single"):
            trained = loop(
                place, experiment(), "single", callbacks=Raises(event), loggers=(first, second, last),
                eval_data=samples(UNEVEN), eval_interval="1ba", save_folder=self.folder / event, save_interval="1ba",
            )  # fmt: skip
            try:
                trained.fit()
            except (LookupError, OSError) as error:
                said = f"{type(error).__name__}: {error}"
            else:
                said = ""
        steps = [step for step, values in first.told if "train/loss" in values]
        return said, steps, [memory.closed for memory in (first, second, last)]

    def stopped(self, place: Place, strategy: str) -> Any:
        with world(place, strategy):
            trained = loop(
                place, experiment(), strategy, max_duration="50ba", eval_data=samples(UNEVEN), eval_interval="2ba",
                callbacks=(Worsens(), sp.EarlyStopping(patience=2)),
            )  # fmt: skip
            fit = trained.fit()
        return fit.step, fit.stop_reason

    def pried(self, place: Place, strategy: str) -> Any:
        """Losses and weights of a run, alone and with evaluations before, after and between all of its steps."""
        found = []
        for callbacks in ((), Pries()):
            with world(place, strategy):
                trained = loop(place, experiment(model=half_evaluating), strategy, callbacks=callbacks)
                losses = trained.fit().losses
                state = trained.state_dict() or {}
            found.append((losses, {name: tensor.tolist() for name, tensor in state.items()}))
        return found

    def loaded(self, place: Place, strategy: str) -> Any:
        """Results before and after a detour over other weights, which have been evaluated as well."""
        with world(place, strategy):
            trained = loop(place, experiment(), strategy)
            trained.fit("1ba")
            path = trained.save(self.folder / f"loaded-{strategy}")
            before = trained.evaluate(samples(UNEVEN))
            trained.fit("3ba")
            detour = trained.evaluate(samples(UNEVEN))
            trained.load(path)
            return before, detour, trained.evaluate(samples(UNEVEN))

    def predicted(self, place: Place, strategy: str) -> Any:
        """On rank 0, how far outputs are from what the whole model says on one device; then those of a dict."""
        with world(place, strategy):
            trained = loop(place, experiment(), strategy, eval_batch_size=8)
            logits = trained.predict(samples(UNEVEN))
            got = trained.predict(samples(UNEVEN), both)
            state = trained.state_dict()
        if state is None:
            return logits, got
        alone = Stack().double()
        alone.load_state_dict(state)
        with torch.no_grad():
            want = both(alone.eval(), samples(UNEVEN).tensors)
        far = float(max((given - want["logits"]).abs().max() for given in (logits, got["logits"])))
        classes, (labels,) = got["nested"]
        return far, torch.equal(classes, want["nested"][0]), labels.tolist()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    # Exchanges are put off as in a run of fast steps, however slow these are.
    pace = exchange.EVERY_S
    exchange.EVERY_S = 1e6
    try:
        with start(RANKS, OnRanks(tmp_path_factory.mktemp("callbacks"))) as started:
            yield started
    finally:
        exchange.EVERY_S = pace


def step(number: int, epoch: int, *, watches: bool = False, ends: bool = False) -> list[str]:
    at = f"{epoch}.{number}"
    middle = [f"gradients {at}"] if watches else []
    return [f"step_start {at}", *middle, f"step_end {epoch + ends}.{number + 1}"]


@pytest.mark.parametrize("watches", [False, True])
def test_events_come_in_their_order_on_all_ranks(ranks: Ranks, watches: bool) -> None:
    told = ranks.call("events", watches)
    assert len({str(events) for events, _ in told.values()}) == 1
    events, norms = told[0]
    assert events == [
        "fit_start 0.0",
        "epoch_start 0.0",
        *step(0, 0, watches=watches),
        *step(1, 0, watches=watches, ends=True),
        "epoch_end 1.2",
        "saved step-00000002 1.2",
        "epoch_start 1.2",
        *step(2, 1, watches=watches),
        "eval_end 1.3",
        *step(3, 1, watches=watches, ends=True),
        "epoch_end 2.4",
        "saved step-00000004 2.4",
        "eval_end 2.4",
        "fit_end 2.4",
    ]
    assert all(norm > 1e-3 for norm in norms), "seen before they are clipped"
    assert len({str(norms) for _, norms in told.values()}) == 1
    assert len(norms) == (4 if watches else 0)


@pytest.mark.parametrize("resumes", [False, True])
def test_loggers_get_every_loss_once_and_in_order(ranks: Ranks, resumes: bool) -> None:
    told = ranks.call("logged", resumes)
    losses, seen, closed, exchanged, lines = told[0]
    begins = 7 if resumes else 0
    assert [(at, values["train/loss"]) for at, values in seen if "train/loss" in values] == [
        (begins + 1 + number, loss) for number, loss in enumerate(losses)
    ]
    assert [at for at, _ in seen] == sorted(at for at, _ in seen)
    assert [at for at, values in seen if "eval/loss" in values] == [at for at in (4, 8, 11) if at > begins]
    assert closed == [False]
    # One exchange told several, none told nothing, none was left out.
    assert max(count for _, count in exchanged) > 1
    position = begins
    for first, count in exchanged:
        assert (first, count > 0) == (position, True)
        position += count
    assert [line["step"] for line in lines if "train/loss" in line.get("values", ())] == list(range(1, 12))
    assert len([line for line in lines if "run" in line]) == 1 + resumes
    assert [line["run"]["first_step"] for line in lines if "run" in line] == ([0, 7] if resumes else [0])
    for rank in range(1, RANKS):
        assert told[rank][1:3] == ([], []), "only rank 0 has loggers"
        assert told[rank][0] == losses


@pytest.mark.parametrize("event", ["step_start", "step_end", "losses", "epoch_end", "eval_end", "saved", "fit_end"])
def test_a_callback_that_raises_ends_the_run_with_its_error(ranks: Ranks, event: str) -> None:
    said, steps, closed = ranks.call("fails", event, ranks=[0])[0]
    assert said == f"LookupError: {event} went wrong"
    assert closed == [[True]] * 3
    assert steps == sorted(set(steps))


def test_a_logger_that_raises_ends_the_run_and_all_are_closed(ranks: Ranks) -> None:
    said, steps, closed = ranks.call("fails", "log", ranks=[0])[0]
    assert said == "OSError: the disk is full"
    assert steps == [1, 2, 3], "the first one, once each"
    assert closed == [[True]] * 3


@pytest.mark.parametrize("strategy", ["ddp", "tp_fsdp"])
def test_all_ranks_stop_early_alike(ranks: Ranks, strategy: str) -> None:
    ends = set(ranks.call("stopped", strategy, ranks=among(strategy)).values())
    assert len(ends) == 1
    ((last, reason),) = ends
    assert last < 50
    assert "no better in 2 evaluations" in reason


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "tp_fsdp", "fsdp1"])
def test_evaluations_change_no_bit_of_training(ranks: Ranks, strategy: str) -> None:
    for alone, pried in ranks.call("pried", strategy, ranks=among(strategy)).values():
        assert alone == pried


@pytest.mark.parametrize("strategy", SHARDED)
def test_what_an_evaluation_gathered_is_not_used_after_a_load(ranks: Ranks, strategy: str) -> None:
    for before, detour, after in ranks.call("loaded", strategy, ranks=among(strategy)).values():
        assert after == before
        assert detour != before


@pytest.mark.parametrize("strategy", ["ddp", "tp_fsdp", "fsdp1"])
def test_predictions_come_in_order_and_whole(ranks: Ranks, strategy: str) -> None:
    told = ranks.call("predicted", strategy, ranks=among(strategy))
    assert {told[rank] for rank in among(strategy) if rank} == {(None, None)}
    far, classes, labels = told[0]
    # Logits of about 1, to which two hundred products were added in another order.
    assert far <= 200 * torch.finfo(torch.float64).eps
    assert classes
    assert labels == [number % 3 for number in range(UNEVEN)]


def test_what_a_callback_raises_on_a_rank_names_the_users_line() -> None:
    with (
        sp.Trainer(
            experiment(), "ddp", ranks=2, fork=True, callbacks=Raises("step_end"), progress_bar=False
        ) as trainer,
        pytest.raises(RankFailed, match=r"test_callbacks_in_fit\.py.*LookupError: step_end went wrong"),
    ):
        trainer.fit("4ba")
