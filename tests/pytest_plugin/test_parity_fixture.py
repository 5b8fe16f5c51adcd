"""`parity` in tests without a mark, and what its failure shows."""

pytest_plugins = "pytester"

CHECKS = """
    import os

    import pytest
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import TensorDataset

    import shardproof as sp

    MADE = []

    def of(**changes):
        return sp.Experiment(
            model=lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)),
            data=TensorDataset(torch.linspace(-1, 1, 256).reshape(32, 8).sin(), torch.arange(32) % 4),
            loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            batch_size=8,
            steps=1,
            **changes,
        )

    @pytest.fixture(scope="module")
    def experiment():
        MADE.append(os.getpid())
        return of()

    def test_of_pytests_own_process_that_forks_badly_after_this():
        torch.ones(3, requires_grad=True).sum().backward()

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
    def test_each_strategy(parity, strategy, experiment):
        parity(experiment)
        assert MADE == [os.getpid()]  # the process stays warm, and with it wide fixtures

    @pytest.mark.ranks(2, ["ddp"])
    def test_a_mark_says_how_many_ranks(parity, experiment):
        parity(experiment)

    def test_a_planted_bug(parity):
        parity(of(parallelize=lambda model, mesh, parallelism: model), strategies=["ddp"], ranks=2)

    @pytest.mark.parametrize("parity", [7])
    def test_somebody_elses_parity(parity):
        assert parity == 7 and not MADE
"""


def test_parity_fails_with_the_report(run) -> None:
    result = run(test_checks=CHECKS)
    result.assert_outcomes(passed=5, failed=1)
    text = result.stdout.str()
    result.stdout.re_match_lines([r"E +cause +grad-not-reduced"])
    assert "FAILED test_checks.py::test_a_planted_bug - DIVERGES: ddp, first at step 0" in text
    assert "def assert_parity" not in text  # the test's own line is what matters
