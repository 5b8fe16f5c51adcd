"""Evaluations over data ranks, against torchmetrics on one device that sees all samples at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score
from torchmetrics.regression import MeanSquaredError

from shardproof.errors import UsageError
from shardproof.parallel import mesh as meshes
from shardproof.parallel.data import Microbatch
from shardproof.parallel.layout import lay_out
from shardproof.ranks import Place, Ranks, start
from shardproof.spec.experiment import Experiment
from shardproof.spec.loss import LossSum
from shardproof.spec.parallelism import Parallelism
from shardproof.trainer.metrics import Measurement, Metrics, measured

CLASSES = 4
BATCH = 4
LAYOUTS = {"ddp": Parallelism(dp_replicate=4), "tp_fsdp": Parallelism(dp_shard=2, tp=2)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def samples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, generator=generator, dtype=torch.float64), torch.arange(count) % CLASSES


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def ragged_loss(model: nn.Module, batch: Any) -> LossSum:
    """Class 0 does not count, class k counts k times."""
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return LossSum((each * batch[1]).sum(), batch[1].sum())


EXPERIMENT = Experiment(
    model=build,
    data=[],
    loss=mean_loss,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    batch_size=BATCH,
    tp_plan={"0": "colwise", "2": "rowwise"},
)


class Rows(torchmetrics.Metric):
    """Keeps what it was given as a list that no reduction makes one tensor of."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx=None)

    def update(self, got: Tensor, want: Tensor) -> None:
        self.rows.extend((got - want).unbind())

    def compute(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(len(self.rows)), "sum": torch.stack(self.rows).sum()}


class Least(torchmetrics.Metric):
    """Has a state that no reduction joins: from several processes, `compute` gets it stacked."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("least", torch.tensor(0.0), dist_reduce_fx=None)

    def update(self, got: Tensor, want: Tensor) -> None:
        self.least = got.min() if self.update_count == 1 else torch.minimum(self.least, got.min())

    def compute(self) -> Tensor:
        # A rank that has seen nothing would bring in the 0 that it started with.
        return self.least.min()


def first_output(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0])[:, 0] + 10, batch[1].double()


def even(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0])[:, 0].sigmoid(), batch[1] % 2


CASES = {
    "counts": lambda: {
        "accuracy": MulticlassAccuracy(CLASSES, average="micro"),
        "of_class": MulticlassAccuracy(CLASSES, average=None),
    },
    "one metric": lambda: MulticlassAccuracy(CLASSES, average="micro"),
    "collection": lambda: torchmetrics.MetricCollection(
        [MulticlassAccuracy(CLASSES), MulticlassF1Score(CLASSES)], prefix="val_"
    ),
    # One sample on which the first is right makes their states agree: torchmetrics would take them for one.
    "alike": lambda: torchmetrics.MetricCollection(
        {f"top{k}": MulticlassAccuracy(CLASSES, average="micro", top_k=k) for k in (1, 2, 3)}
    ),
    "list of numbers": lambda: Metrics(metrics={"auroc": BinaryAUROC(thresholds=None)}, inputs=even),
    "list of rows": lambda: MulticlassAUROC(CLASSES, thresholds=None),
    "means": lambda: Metrics(
        metrics={
            "mse": MeanSquaredError(),
            "twice": MeanSquaredError() * 2,
            "least": Least(),
            "rows": Rows(),
        },
        inputs=first_output,
    ),
}


def counts_of(case: str) -> range:
    """Numbers of samples, most of which four ranks cannot share evenly."""
    # With fewer samples than classes torchmetrics warns that a class has no positives.
    return range(CLASSES if case == "list of rows" else 2, 10)


def parts(indices: list[int], ranks: int) -> list[tuple[list[int], float]]:
    """A batch cut as evenly as it goes; who has nothing reads the first sample with weight 0."""
    cut = [part.tolist() for part in torch.tensor(indices).tensor_split(ranks)]
    return [(own or indices[:1], len(own) * ranks / len(indices)) for own in cut]


def see(measurement: Measurement, model: nn.Module, count: int, data_rank: int, data_ranks: int) -> None:
    x, y = samples(count)
    for begin in range(0, count, BATCH):
        own, weight = parts(list(range(begin, min(begin + BATCH, count))), data_ranks)[data_rank]
        measurement.update(model, Microbatch((x[own], y[own]), weight))


class OnRanks:
    def evaluate(self, place: Place, layout: str) -> dict[tuple[str, int], dict[str, float]]:
        """{(case, samples): results}, of one evaluation after the other."""
        parallelism = LAYOUTS[layout]
        data_rank = parallelism.coordinates(place.rank)["dp"]
        found = {}
        with place.world("metrics", 4):
            mesh, group = meshes.build(parallelism, "cpu")
            model = lay_out(build(), EXPERIMENT, mesh, parallelism)
            for case, make in CASES.items():
                measurement = Measurement(
                    make(), loss=mean_loss, data_group=group, device=torch.device("cpu"), dtype=torch.float64
                )
                for count in counts_of(case):
                    see(measurement, model, count, data_rank, parallelism.dp)
                    found[case, count] = measurement.compute()
        return found

    def losses(self, place: Place, count: int) -> dict[str, float]:
        with place.world("losses", 4):
            _, group = meshes.build(LAYOUTS["ddp"], "cpu")
            found = {}
            for loss in (mean_loss, ragged_loss):
                measurement = Measurement(None, loss=loss, data_group=group, device=torch.device("cpu"))
                see(measurement, build(), count, place.rank, 4)
                found[loss.__name__] = measurement.compute()["loss"]
            return found

    def forwards(self, place: Place, case: str, in_place: bool) -> tuple[int, dict[str, float]]:
        """How often the model ran, and the results, on a loss that may change what the model returned."""

        def loss(model: nn.Module, batch: Any) -> Tensor:
            output = model(batch[0])
            return F.cross_entropy(output.mul_(-1) if in_place else output, batch[1])

        with place.world("forwards", 4):
            _, group = meshes.build(LAYOUTS["ddp"], "cpu")
            model, ran = build(), []
            model[0].register_forward_hook(lambda *_: ran.append(1))
            measurement = Measurement(CASES[case](), loss=loss, data_group=group, device=torch.device("cpu"))
            see(measurement, model, 4, place.rank, 4)
            return len(ran), measurement.compute()

    def shards(self, place: Place) -> dict[str, float]:
        """Predictions that are a DTensor, cut over `tp`, and in bfloat16."""

        def sharded(model: nn.Module, batch: Any) -> tuple[DTensor, Tensor]:
            local = batch[1][2 * tp : 2 * tp + 2].bfloat16() + 1
            return DTensor.from_local(local, mesh["tp"], [Shard(0)]), batch[1].float()

        parallelism = LAYOUTS["tp_fsdp"]
        with place.world("shards", 4):
            mesh, group = meshes.build(parallelism, "cpu")
            tp = parallelism.coordinates(place.rank)["tp"]
            measurement = Measurement(
                Metrics(metrics={"mse": MeanSquaredError()}, inputs=sharded),
                loss=lambda model, batch: torch.tensor(1.0),
                data_group=group,
                device=torch.device("cpu"),
            )
            measurement.update(build(), Microbatch((torch.zeros(4, 3), torch.arange(4)), 1.0))
            return measurement.compute()

    def peers_that_differ(self, place: Place) -> dict[str, float]:
        """Each rank has a loss of its own, tensor-parallel peers included."""
        with place.world("peers", 4):
            _, group = meshes.build(LAYOUTS["tp_fsdp"], "cpu")
            measurement = Measurement(
                None, loss=lambda *_: torch.tensor(float(place.rank)), data_group=group, device=torch.device("cpu")
            )
            measurement.update(build(), Microbatch((torch.zeros(1, 3), torch.zeros(1)), 1.0))
            return measurement.compute()

    def wrong(self, place: Place, batch: Any, metrics: Any, loss: Any, weight: float) -> str:
        """What the error says."""
        with place.world("wrong", 4):
            _, group = meshes.build(LAYOUTS["ddp"], "cpu")
            measurement = Measurement(metrics, loss=loss, data_group=group, device=torch.device("cpu"))
            try:
                measurement.update(build().float(), Microbatch(batch, weight))
                measurement.compute()
            except UsageError as error:
                return str(error)
            return "no error"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with start(4, OnRanks()) as ranks:
        yield ranks


def on_one_device(case: str, count: int) -> dict[str, float]:
    """torchmetrics alone: no ranks, no parts, one update."""
    wanted = CASES[case]()
    metrics = wanted.metrics if isinstance(wanted, Metrics) else wanted
    x, y = samples(count)
    with torch.no_grad():
        arguments = wanted.inputs(build(), (x, y)) if isinstance(wanted, Metrics) else (build()(x), y)
        loss = F.cross_entropy(build()(x), y)
    if isinstance(metrics, torchmetrics.MetricCollection):
        metrics = dict(metrics.items())
    elif not isinstance(metrics, dict):
        metrics = {type(metrics).__name__: metrics}
    results = {"loss": loss.item()}
    for name, metric in metrics.items():
        for part in metric.modules():
            part.set_dtype(torch.float64)
        metric.update(*arguments)
        result = metric.compute()
        if isinstance(result, dict):
            results |= {key: value.item() for key, value in result.items()}
        elif result.dim():
            results |= {f"{name}/{index}": value.item() for index, value in enumerate(result)}
        else:
            results[name] = result.item()
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_measures_what_one_device_measures(ranks: Ranks, layout: str):
    want = {(case, count): on_one_device(case, count) for case in CASES for count in counts_of(case)}
    for answer in ranks.call("evaluate", layout).values():
        assert answer.keys() == want.keys()
        for of, results in answer.items():
            assert results == pytest.approx(want[of], rel=1e-12, abs=1e-12), of
            assert all(isinstance(value, float) for value in results.values())


@pytest.mark.parametrize("count", [2, 7])
def test_the_loss_is_the_mean_over_all_that_counts(ranks: Ranks, count: int):
    batch = samples(count)
    with torch.no_grad():
        ragged = ragged_loss(build(), batch)
        want = {"mean_loss": mean_loss(build(), batch).item(), "ragged_loss": (ragged.total / ragged.count).item()}
    for answer in ranks.call("losses", count).values():
        assert answer == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_model_runs_once_where_loss_and_metrics_call_it_alike(ranks: Ranks, in_place: bool):
    for ran, results in ranks.call("forwards", "one metric", in_place).values():
        assert ran == 1
        assert results["MulticlassAccuracy"] == pytest.approx(on_one_device("one metric", 4)["MulticlassAccuracy"])


def test_a_users_own_inputs_run_the_model_once_more(ranks: Ranks):
    assert {ran for ran, _ in ranks.call("forwards", "means", False).values()} == {2}


def test_sharded_and_half_precision_predictions_are_whole_and_wide_before_they_are_measured(ranks: Ranks):
    assert list(ranks.call("shards").values()) == [{"loss": 1.0, "mse": 1.0}] * 4


def test_all_ranks_have_the_same_results_even_where_tensor_parallel_peers_do_not_agree(ranks: Ranks):
    # Data ranks are 0 with 2, and 1 with 3.
    assert list(ranks.call("peers_that_differ").values()) == [{"loss": 1.0}] * 4


def test_the_users_own_metric_is_not_touched():
    metric = MulticlassAccuracy(CLASSES, average="micro")
    metric.update(torch.tensor([0]), torch.tensor([0]))
    copy = next(iter(measured(metric).metrics.values()))
    copy.update(torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert metric.compute() == 1.0
    assert copy.compute() == 0.0, "what the user has measured before does not count"


def failure(ranks: Ranks, *arguments: Any) -> str:
    (text,) = set(ranks.call("wrong", *arguments).values())
    return text


class Wrong:
    """Losses that can be sent to a rank."""

    @staticmethod
    def mean(model: nn.Module, batch: Any) -> Tensor:
        return torch.tensor(1.0)

    @staticmethod
    def vector(model: nn.Module, batch: Any) -> Tensor:
        return torch.ones(2)


def test_a_dict_batch_without_inputs_is_told_what_to_write(ranks: Ranks):
    batch = {"image": torch.zeros(2, 3), "label": torch.zeros(2)}
    text = failure(ranks, batch, MeanSquaredError(), Wrong.mean, 1.0)
    assert "a dict with the keys image, label" in text
    assert "inputs=lambda model, batch: (model(batch['image']), batch['label'])" in text


def test_a_loss_that_is_no_scalar_is_refused(ranks: Ranks):
    text = failure(ranks, (torch.zeros(2, 3), torch.zeros(2)), None, Wrong.vector, 1.0)
    assert "a tensor of shape (2,) in an evaluation" in text


def test_an_evaluation_of_nothing_is_refused(ranks: Ranks):
    text = failure(ranks, (torch.zeros(2, 3), torch.zeros(2)), None, Wrong.mean, 0.0)
    assert "the evaluation measured nothing" in text


def test_a_batch_without_a_tensor_cannot_be_counted(ranks: Ranks):
    assert "cannot tell how many samples" in failure(ranks, ("a", "b"), None, Wrong.mean, 1.0)


@pytest.mark.parametrize(
    ("metrics", "text"),
    [
        ("accuracy", "metrics is 'accuracy'; give a torchmetrics Metric"),
        ({}, "metrics is {}; give"),
        ({"a": 1}, "give a torchmetrics Metric"),
        ({"a.b": MeanSquaredError()}, "'a.b' cannot be the name of a metric"),
        ({"loss": MeanSquaredError()}, "the name 'loss' is taken"),
    ],
)
def test_what_is_no_metric_is_refused(metrics: Any, text: str):
    with pytest.raises(UsageError, match="metrics") as caught:
        measured(metrics)
    assert text in str(caught.value)


def test_inputs_that_cannot_be_called_are_refused():
    with pytest.raises(UsageError, match=r"Metrics\.inputs is 3, which cannot be called"):
        Metrics(metrics=MeanSquaredError(), inputs=3)


def test_torchmetrics_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shardproof.trainer.optional.find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"torchmetrics, which is not installed; run: pip install 'shardproof\[metrics"
    ):
        measured({"accuracy": object()})


def test_no_metrics_need_no_torchmetrics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert measured(None) is None
