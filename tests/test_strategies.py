"""Every strategy trains like one device: real models, awkward shapes, and everything that a right user may do."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import shardproof as sp

EXAMPLES = Path(__file__).parent.parent / "examples"

ON_FOUR = ("single", "ddp", "fsdp", "hsdp", "tp", "tp_ddp", "tp_fsdp", "fsdp1", "tp_fsdp1")
ON_EIGHT = ("tp_hsdp", "tp_fsdp")
"""One after the other, with the same tp mesh: DTensor's caches must not leak from world to world."""

SOME = ("ddp", "fsdp", "tp_fsdp", "fsdp1")
"""One strategy of each kind of layout."""

MOST = ("ddp", "hsdp", "tp", "tp_fsdp", "fsdp1", "tp_fsdp1")
"""The same, and each with and without tensor parallelism."""


def experiment_of(example: str) -> sp.Experiment:
    """`digits`, `gpt` or `gpt.ragged`."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    name, _, attribute = example.partition(".")
    if name == "digits":
        pytest.importorskip("sklearn")
    return getattr(__import__(name), attribute or "experiment")


@cache
def checked(example: str, strategies: tuple[str, ...], ranks: int, dtype: str = "float64", steps: int = 3) -> sp.Report:
    """Shared by the tests that look at one and the same check."""
    return sp.check(experiment_of(example), strategies=strategies, ranks=ranks, dtype=dtype, steps=steps)


def passes(experiment: sp.Experiment, *strategies: str, **options: Any) -> sp.Report:
    """Parity, nothing different and nothing unchecked but what the caller looks into."""
    report = sp.check(experiment, strategies=strategies, **options)
    assert report.first is None, str(report)
    assert report.ok, str(report)
    assert [run.strategy for run in report.runs] == list(strategies)
    return report


def passes_in_full(experiment: sp.Experiment, *strategies: str, **options: Any) -> sp.Report:
    report = passes(experiment, *strategies, **options)
    for run in report.runs:
        assert not run.not_checked, run.strategy
    return report


def run_of(report: sp.Report, strategy: str) -> sp.Run:
    return next(run for run in report.runs if run.strategy == strategy)


# The two examples under all ten strategies.


@pytest.mark.parametrize("example", ["digits", "gpt"])
@pytest.mark.parametrize(("strategy", "ranks"), [*((s, 4) for s in ON_FOUR), *((s, 8) for s in ON_EIGHT)])
def test_every_strategy_trains_like_one_device(example: str, strategy: str, ranks: int):
    report = checked(example, ON_FOUR, 4) if ranks == 4 else checked(example, ON_EIGHT, 8, steps=2)
    run = run_of(report, strategy)
    assert run.ok, str(report)
    assert not run.findings
    assert not run.not_checked, "a tensor was left out"
    assert run.verdicts["different"] == 0
    assert run.verdicts["equal"] + run.verdicts["rounding"] == len(run.comparisons)


@pytest.mark.parametrize("example", ["digits", "gpt"])
def test_one_rank_is_the_reference_bit_by_bit(example: str):
    run = run_of(checked(example, ON_FOUR, 4), "single")
    assert run.verdicts["equal"] == len(run.comparisons)


@pytest.mark.parametrize("strategy", ON_FOUR)
def test_no_parameter_gradient_state_or_output_goes_uncompared(strategy: str):
    experiment = experiment_of("gpt")
    model = experiment.model()
    run = run_of(checked("gpt", ON_FOUR, 4), strategy)
    seen = {(c.step, c.stage, c.name, c.part) for c in run.comparisons}
    # The head is tied to the embedding, and stands under its first name.
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name for name, module in model.named_modules() if not isinstance(module, nn.ModuleList)]
    wanted = {(-1, "initial-state", name, "") for name in parameters}
    for step in range(3):
        wanted |= {(step, "batch", "batch", part) for part in ("[0]", "[1]")}
        wanted |= {(step, "forward", name or "(root)", "") for name in modules}
        wanted |= {(step, "backward", name or "(root)", "") for name in modules}
        wanted |= {(step, "loss", "(root)", part) for part in ("local", "logged")}
        wanted |= {(step, "gradient", name, "") for name in parameters}
        wanted |= {(step, "grad-norm", name, "clipped") for name in parameters}
        wanted |= {(step, "grad-norm", "(root)", "norm")}
        state = ("step", "exp_avg", "exp_avg_sq")
        wanted |= {(step, "optimizer-state", name, part) for name in parameters for part in state}
        wanted |= {(step, "update", name, "") for name in parameters}
    assert wanted - seen == set()
    assert len(run.comparisons) == len(seen), "one verdict per tensor"


@pytest.mark.parametrize("strategy", ON_FOUR)
def test_the_key_bias_whose_gradient_is_zero_is_never_different(strategy: str):
    run = run_of(checked("gpt", ON_FOUR, 4), strategy)
    biases = [c for c in run.comparisons if c.name.endswith("k_proj.bias") and c.stage == "gradient"]
    assert len(biases) == 2 * 3
    assert {c.verdict for c in biases} <= {sp.Verdict.EQUAL, sp.Verdict.ROUNDING}
    assert all(c.error < 1e-15 for c in biases)


@pytest.mark.parametrize(
    ("strategy", "axes"),
    [
        ("ddp", {}),
        ("fsdp", {"dp_shard"}),
        ("hsdp", {"dp_shard"}),
        ("tp", {"tp"}),
        ("tp_ddp", {"tp"}),
        ("tp_fsdp", {"dp_shard", "tp"}),
        ("fsdp1", {"dp_shard"}),
        ("tp_fsdp1", {"dp_shard", "tp"}),
    ],
)
def test_each_strategy_really_splits_what_its_name_says(strategy: str, axes: set[str]):
    run = run_of(checked("gpt", ON_FOUR, 4), strategy)
    assert {axis for axis, parameters in run.sharded.items() if parameters} == set(axes)
    declared = {axis for axis, degree in run.degrees.items() if degree > 1}
    assert declared <= {axis for axes in run.collectives for axis in axes.split("+")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("example", ["digits", "gpt"])
@pytest.mark.parametrize("strategy", ["ddp", "tp_fsdp", "fsdp1"])
def test_rounding_in_less_than_float64_is_no_finding(example: str, dtype: str, strategy: str):
    steps = 1 if dtype == "float32" else 2
    run = run_of(checked(example, ("ddp", "tp_fsdp", "fsdp1"), 4, dtype, steps), strategy)
    assert not run.findings
    assert run.ok
    assert not run.not_checked
    assert run.verdicts["different"] == 0


def test_sequence_parallelism_trains_like_one_device():
    passes_in_full(experiment_of("gpt.sequence_parallel"), "tp", "tp_fsdp1", steps=2)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_ragged_tokens_are_weighted_by_their_number(microbatches: int):
    experiment = replace(experiment_of("gpt.ragged"), batch_size=24, microbatches=microbatches)
    passes_in_full(experiment, "ddp", "tp_fsdp", steps=1)


def test_explicit_degrees_bring_their_own_number_of_ranks():
    report = passes_in_full(PLAIN, "tp=2,dp_shard=2", "tp=2,dp_shard=3", "dp_replicate=2,dp_shard=3")
    assert [run.degrees["tp"] for run in report.runs] == [2, 2, 1]
    assert [run.degrees["dp_shard"] for run in report.runs] == [2, 3, 3]
    assert [run.degrees["dp_replicate"] for run in report.runs] == [1, 1, 2]


# A small model for everything that a right user may do.

WIDTH, HIDDEN, CLASSES = 6, 12, 5
"""4 tensor-parallel ranks divide the hidden features; nothing else is divided by anything."""


class Points(torch.utils.data.Dataset):
    """(inputs (WIDTH,), targets (CLASSES,))."""

    def __init__(self, length: int = 48) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(WIDTH, generator=generator), torch.randn(CLASSES, generator=generator)


class Mlp(nn.Module):
    """Norm, MLP with a residual, head; all parameters random, so that none of them hides a fault."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def inner(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, WIDTH)
        return self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:  # (batch, WIDTH) -> (batch, CLASSES)
        return self.head(x + self.inner(x))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def ragged_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> sp.LossSum:
    """Each sample counts 1, 2 or 3, by its own content."""
    inputs, targets = batch
    counts = 1.0 + (inputs[:, 0] > 0) + (inputs[:, 1] > 0.5)
    errors = (model(inputs) - targets).square().mean(-1)
    return sp.LossSum(total=(errors * counts).sum(), count=counts.sum())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


PLAIN = sp.Experiment(
    model=Mlp,
    data=Points(),
    loss=loss,
    optimizer=sgd,
    batch_size=24,
    steps=2,
    tp_plan={"up": "colwise", "down": "rowwise"},
    fsdp_units=("up", "down"),
)


@pytest.mark.parametrize(("microbatches", "loss"), [(2, loss), (3, loss), (3, ragged_loss)])
def test_micro_batches_are_cut_and_weighted_right(microbatches: int, loss: Callable[..., Any]):
    passes_in_full(replace(PLAIN, loss=loss, microbatches=microbatches), *SOME)


@pytest.mark.parametrize(("microbatches", "loss"), [(1, loss), (1, ragged_loss), (2, loss), (2, ragged_loss)])
def test_the_short_last_batch_of_an_epoch_is_weighted_by_its_samples(microbatches: int, loss: Callable[..., Any]):
    # Batches of 8, 8, 3, and then the next epoch: 3 samples leave some of 4 data ranks with nothing to read.
    experiment = replace(PLAIN, data=Points(19), batch_size=8, steps=4, microbatches=microbatches, loss=loss)
    report = passes_in_full(experiment, *SOME)
    for run in report.runs:
        assert {c.step for c in run.comparisons if c.stage == "gradient"} == {0, 1, 2, 3}


def test_shuffled_data_is_the_same_for_all():
    experiment = replace(PLAIN, data=Points(19), batch_size=8, steps=4)
    plain = sp.check(experiment, strategies=["single"], show=(0,))
    shuffled = passes_in_full(experiment, "single", *SOME, shuffle=True, show=(0,))

    def first_batch(report: sp.Report) -> Any:
        return next(s.values for s in report.runs[0].shown[0] if (s.stage, s.step, s.part) == ("batch", 0, "[0]"))

    assert first_batch(plain) != first_batch(shuffled)


def test_shapes_that_no_number_of_ranks_divides_are_sharded_unevenly():
    # 7 and 5 rows over 4 ranks, and whole parameters that some ranks hold nothing of.
    report = passes_in_full(
        replace(PLAIN, model=partial(Mlp, hidden=7), fsdp_units=()), "fsdp", "hsdp", "fsdp1", "dp_shard=3"
    )
    assert run_of(report, "fsdp").sharded["dp_shard"] == 8


def test_columns_and_rows_that_two_ranks_do_not_divide_are_split_unevenly():
    # 7 features of `up` and of the input of `down`: 4 on one rank, 3 on the other.
    plan = {"up": "colwise_gather", "down": "rowwise_split_input"}
    passes_in_full(replace(PLAIN, model=partial(Mlp, hidden=7), tp_plan=plan), "tp=2", "tp_fsdp")


class Tied(Mlp):
    """The last layer is the first one, turned around: one matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.inner(x)) + self.first(x)


def test_tied_parameters_stay_tied():
    report = passes_in_full(replace(PLAIN, model=Tied), *MOST)
    for run in report.runs:
        names = {c.name for c in run.comparisons if c.stage == "gradient"}
        assert "head.weight" not in names or "first.weight" not in names, "one tensor, one name"


def several_groups(model: nn.Module) -> torch.optim.Optimizer:
    vectors = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    matrices = [p for name, p in model.named_parameters() if not (name.endswith("bias") or "norm" in name)]
    # Without foreach, or torch mixes DTensors of two meshes in one call.
    return torch.optim.AdamW([{"params": matrices, "lr": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=0.1)


def without_the_head(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for name, p in model.named_parameters() if "head" not in name], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("optimizer", [several_groups, without_the_head])
def test_param_groups_and_subsets_of_the_parameters_are_welcome(optimizer: Callable[..., Any]):
    passes_in_full(replace(PLAIN, optimizer=optimizer), *MOST)


class Twice(Mlp):
    """Every module of the MLP is called twice in one forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.inner(x) + 0.3 * self.inner(-x))


@pytest.mark.parametrize("microbatches", [1, 3])
def test_modules_called_twice_are_compared_call_by_call(microbatches: int):
    passes_in_full(replace(PLAIN, model=Twice, microbatches=microbatches), *SOME)


class Frozen(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.norm.requires_grad_(False)
        self.down.requires_grad_(False)


def only_trainable(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("optimizer", [sgd, only_trainable])
def test_frozen_parameters_stay_what_they_are(optimizer: Callable[..., Any]):
    report = passes(replace(PLAIN, model=Frozen, optimizer=optimizer, max_grad_norm=0.01), *MOST)
    for run in report.runs:
        # The older FSDP makes one parameter of frozen and learning ones, so that a gradient flows where none need to.
        unchecked = {(c.stage, c.name, c.reason) for c in run.comparisons if c.verdict is sp.Verdict.NOT_CHECKED}
        extra = {("backward", "norm", "the reference has no such tensor")}
        assert unchecked == (extra if run.strategy in ("fsdp1", "tp_fsdp1") else set())
        learning = {"up.weight", "up.bias", "head.weight", "head.bias"}
        assert {c.name for c in run.comparisons if c.stage == "gradient"} == learning
        assert any(c.name == "down.weight" for c in run.comparisons if c.stage == "update")


class PartlyUnused(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 2)


def test_parameters_that_nothing_uses_are_no_finding_and_said_to_be_unchecked():
    report = passes(replace(PLAIN, model=PartlyUnused, max_grad_norm=0.01), *MOST)
    for run in report.runs:
        unchecked = [c for c in run.comparisons if c.verdict is sp.Verdict.NOT_CHECKED]
        assert {c.name for c in unchecked} <= {"spare.weight", "spare.bias"}, run.strategy
        assert {c.stage for c in unchecked} <= {"gradient", "grad-norm"}
        assert all(c.reason for c in unchecked)
        updates = {c.name: c.verdict for c in run.comparisons if c.stage == "update" and c.step == 1}
        assert updates["spare.weight"] is sp.Verdict.EQUAL


class Checkpointed(Mlp):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        def hidden(x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)))

        # Behind the norm, as reentrant checkpoints need an input that requires a gradient.
        return self.head(x + checkpoint(hidden, self.norm(x), use_reentrant=self.reentrant))


def wrapped(reentrant: bool) -> nn.Module:
    """torch's own wrapper, which adds a module and a name."""
    model = Mlp()
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    model.down = checkpoint_wrapper(model.down, checkpoint_impl=kind)
    return model


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_no_finding(reentrant: bool):
    experiment = replace(PLAIN, model=partial(Checkpointed, reentrant=reentrant), fsdp_units=())
    # The older FSDP's pre-backward hooks and DDP's search for unused parameters do not go with reentrant ones.
    passes_in_full(experiment, *(("fsdp", "tp") if reentrant else (*SOME, "tp")))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_wrapper_leaves_names_as_they_are(reentrant: bool):
    # A plan names modules as they stand in the model that it is given.
    plan = {"up": "colwise", "down._checkpoint_wrapped_module": "rowwise"}
    experiment = replace(PLAIN, model=partial(wrapped, reentrant), fsdp_units=(), tp_plan=plan)
    report = passes_in_full(experiment, *(("fsdp", "tp") if reentrant else (*SOME, "tp")))
    for run in report.runs:
        names = {c.name for c in run.comparisons}
        assert "down.weight" in names
        assert not any("_checkpoint_wrapped_module" in name for name in names)


@pytest.mark.parametrize("optimizer", [sgd, several_groups])
def test_clipping_that_bites_is_the_same_everywhere(optimizer: Callable[..., Any]):
    report = sp.check(replace(PLAIN, max_grad_norm=0.01, optimizer=optimizer), strategies=MOST, show=(0,), steps=2)
    assert report.ok, str(report)
    for run in report.runs:
        assert not run.not_checked
        [norm] = [s.values for s in run.shown[0] if (s.stage, s.part, s.step) == ("grad-norm", "norm", 0)]
        assert norm > 0.1, "the limit must bite"
        clipped = [c for c in run.comparisons if c.stage == "grad-norm" and c.part == "clipped"]
        assert len(clipped) == 2 * 8


class Normed(Mlp):
    """A batch norm with statistics of its own, a constant buffer, and one that is not saved."""

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)
        nn.init.normal_(self.bn.running_mean)
        nn.init.uniform_(self.bn.running_var, 0.5, 1.5)
        nn.init.normal_(self.bn.weight)
        nn.init.normal_(self.bn.bias)
        self.bn.train(training)
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)
        self.register_buffer("shift", torch.rand(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.bn(x) * self.scale + self.shift)


BUFFERS = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "scale", "shift"}


def test_buffers_are_compared_and_frozen_statistics_agree():
    report = passes_in_full(replace(PLAIN, model=partial(Normed, training=False)), *MOST)
    for run in report.runs:
        found = {c.name: c.verdict for c in run.comparisons if c.stage == "buffer" and c.step == 1}
        assert found == dict.fromkeys(BUFFERS, sp.Verdict.EQUAL)


def test_running_statistics_agree_where_every_rank_sees_the_whole_batch():
    report = passes_in_full(replace(PLAIN, model=partial(Normed, training=True)), "single", "tp=2")
    for run in report.runs:
        assert {c.name for c in run.comparisons if c.stage == "buffer"} == BUFFERS


def test_batch_statistics_of_a_part_of_the_batch_are_another_training():
    # Each rank norms by its own samples: that is what DDP does, and it is not what one device does.
    report = sp.check(replace(PLAIN, model=partial(Normed, training=True)), strategies=("ddp",))
    assert not report.ok
    assert (report.first.stage, report.first.where, report.first.step) == ("forward", "bn", 0)


class Dropped(Mlp):
    """Dropout on the residual path, where tp peers hold the whole, or on the hidden features, which they split."""

    def __init__(self, *, where: str) -> None:
        super().__init__()
        self.where = where
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "whole":
            return self.head(x + self.dropout(self.inner(x)))
        return self.head(x + self.down(self.dropout(torch.tanh(self.up(self.norm(x))))))


@pytest.mark.parametrize("where", ["whole", "split"])
def test_dropout_with_several_data_ranks_is_unchecked_with_the_reason_and_no_finding(where: str):
    report = passes(replace(PLAIN, model=partial(Dropped, where=where)), *SOME, "hsdp")
    for run in report.runs:
        assert any("random" in reason for reason in run.not_checked), run.not_checked
        # What comes before the first draw is compared as ever.
        before = [c for c in run.comparisons if c.step == 0 and c.stage == "forward" and c.name in ("norm", "up")]
        assert {c.verdict for c in before} <= {sp.Verdict.EQUAL, sp.Verdict.ROUNDING}
        assert len(before) == 2
        # What comes after it is not.
        gradients = {c.verdict for c in run.comparisons if c.stage == "gradient"}
        assert gradients == {sp.Verdict.NOT_CHECKED}


def test_tp_peers_draw_alike_so_that_dropout_on_whole_tensors_is_compared_in_full():
    passes_in_full(replace(PLAIN, model=partial(Dropped, where="whole")), "single", "tp=2")


def test_dropout_on_features_that_tp_peers_split_is_no_finding():
    report = passes(replace(PLAIN, model=partial(Dropped, where="split")), "tp=2")
    assert any("random" in reason for reason in report.runs[0].not_checked)
