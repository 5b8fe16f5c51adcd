"""The pytest plugin: tests that run on several warm ranks. Found by pytest through its entry point.

Three kinds of process take part. pytest's own collects the tests, and shows and counts their reports. Before its first
test it forks the *host*, which stays as clean as it is then, whatever tests do to pytest's process: backward passes,
CUDA, threads, fixtures. The host forks the *ranks*, one crew for each number of ranks, supervises them, and forks new
ones where a test has cost a crew. All of them have inherited the collected tests, so that running one is a message
with its number.
"""

from shardproof.pytest_plugin.fixtures import mesh, parallelism, parity, ranks_layout, ranks_tmp_path
from shardproof.pytest_plugin.hooks import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_generate_tests,
    pytest_load_initial_conftests,
    pytest_runtest_protocol,
    pytest_runtestloop,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_timeout_set_timer,
    pytest_unconfigure,
)

__all__ = [
    "mesh",
    "parallelism",
    "parity",
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_generate_tests",
    "pytest_load_initial_conftests",
    "pytest_runtest_protocol",
    "pytest_runtestloop",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "pytest_timeout_set_timer",
    "pytest_unconfigure",
    "ranks_layout",
    "ranks_tmp_path",
]
