from __future__ import annotations

from dataclasses import replace

from shardproof.report import show, values
from shardproof.report.data import Report
from shardproof.spec.stages import STAGES


def seen(report: Report, rank: int, width: int = 80) -> str:
    return "\n".join(line.plain for line in show.view(report, rank, width))


def test_stages_are_shown_in_the_order_of_traces():
    assert tuple(show.MEANING) == STAGES


def test_a_tensor_is_shown_with_the_strategies_below_each_other(held: Report):
    assert """\
step 0, gradient: of parameters

  2.weight
    ddp      [2, 2] whole               0.1134       0
                                        0.1134       0
    fsdp     [1, 2] dp_shard: rows 0:1  0.1134       0
    tp_fsdp  [0, 2] dp_shard: rows 2:2  (no part of it)
""" in seen(held, 2)


def test_what_every_run_held_alike_is_shown_once(held: Report):
    assert "    every run  [2] samples 2:4  1  0\n" in seen(held, 2)


def test_causes_come_before_effects_however_they_were_recorded(held: Report):
    assert seen(held, 2).index("step 0, batch") < seen(held, 2).index("step 0, gradient")


def test_a_rank_that_a_run_does_not_have_is_said_to_be_unknown(held: Report):
    first, *others = held.runs
    assert "nothing is known of it in ddp\n" in seen(replace(held, runs=(replace(first, shown={}), *others)), 2)
    assert "nothing is known of it in ddp, fsdp, tp_fsdp" in seen(held, 9)


def test_values_go_below_where_there_is_no_room_beside(held: Report):
    lines = seen(held, 2, width=44).splitlines()
    assert "    ddp [2, 2] whole" in lines
    assert "      0.1134       0" in lines


def test_a_big_tensor_is_summed_up_with_its_first_values():
    lines = values.lines([float(i) for i in range(99)] + [float("nan")], (100,), 80)
    assert lines == [
        "100 values, from 0 to 98.0000, mean 49.0000, 1 NaN or infinite",
        "first: 0 1.0000 2.0000 3.0000 4.0000 5.0000 6.0000 7.0000 ...",
    ]


def test_an_exact_zero_is_not_mistaken_for_a_small_value():
    assert values.lines([0.0, 0.25, 1e-9], (3,), 80) == ["     0  0.2500  0.0000"]


def test_small_numbers_keep_their_digits():
    assert values.lines([1e-9, -2.5e-8], (2,), 80) == [" 1.0000e-09  -2.5000e-08"]


def test_a_scalar_and_a_mask_are_values_too():
    assert values.lines(0.6931471, (), 80) == ["0.6931"]
    assert values.lines([True, False], (2,), 80) == [" True  False"]


def test_more_than_two_dims_are_shown_matrix_by_matrix():
    assert values.lines([[[1, 2]], [[3, 4]]], (2, 1, 2), 80) == ["[0, :, :]", "1  2", "[1, :, :]", "3  4"]
