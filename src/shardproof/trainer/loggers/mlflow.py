"""Values for MLflow."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from shardproof.errors import UsageError
from shardproof.trainer.logger import Logger
from shardproof.trainer.optional import require

AT_ONCE = 100
"""Params that MLflow takes in one request; of metrics it takes 1000."""

LONGEST = 6000
"""Characters of a param that MLflow takes."""


class MLflowLogger(Logger):
    """Logs to a run of MLflow, by its client: MLflow's own active run, if you have one, is left alone."""

    def __init__(
        self,
        experiment: str = "Default",
        run_name: str | None = None,
        *,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        resume: bool = False,
    ) -> None:
        """Raise `UsageError` where mlflow is not installed.

        Args:
            experiment: name of MLflow's experiment; it is made where there is none.
            run_name: name of the run; MLflow makes one up where it is None.
            tracking_uri: where MLflow keeps its runs; None for MLflow's own setting.
            run_id: a run to go on with.
            resume: whether to go on with the newest run called `run_name` where there is one.
        """
        require("mlflow", extra="mlflow", by="MLflowLogger")
        if resume and run_name is None and run_id is None:
            raise UsageError("MLflowLogger: resume=True looks for a run by its name; give run_name")
        if resume and '"' in (run_name or ""):
            raise UsageError(f"MLflowLogger: run_name={run_name!r}; MLflow finds no name with a double quote in it")
        self.experiment, self.run_name, self.tracking_uri = experiment, run_name, tracking_uri
        self.run_id, self.resume = run_id, resume
        self._mlflow: Any = None
        self._client: Any = None

    def open(self, about: Mapping[str, Any]) -> None:
        """Find or make the run; `about` becomes its params, `{"mesh": {"tp": 2}}` as `mesh.tp`."""
        # The skinny package has all of this too.
        self._mlflow = importlib.import_module("mlflow")
        self._client = self._mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        self.run_id = self.run_id or self._find_or_make()
        run = self._client.get_run(self.run_id)
        self._client.update_run(self.run_id, status="RUNNING")
        # MLflow refuses to change a param, and what a run was started with stays what it was started with.
        params = {name: value for name, value in _flat(about).items() if name not in run.data.params}
        make = self._mlflow.entities.Param
        rest = iter([make(name, str(value)[:LONGEST]) for name, value in params.items()])
        while some := list(islice(rest, AT_ONCE)):
            self._client.log_batch(self.run_id, params=some)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log them as metrics of the run, in one request."""
        if self._client is None:
            raise UsageError("MLflowLogger is not open; call open() before log()")
        now_ms, make = int(time.time() * 1000), self._mlflow.entities.Metric
        rest = iter([make(name, value, now_ms, step) for name, value in values.items()])
        while some := list(islice(rest, AT_ONCE)):
            self._client.log_batch(self.run_id, metrics=some)

    def close(self, *, failed: bool = False) -> None:
        """End the run."""
        if self._client is not None:
            self._client.set_terminated(self.run_id, status="FAILED" if failed else "FINISHED")
            self._client = None

    def _find_or_make(self) -> str:
        known = self._client.get_experiment_by_name(self.experiment)
        where = self._client.create_experiment(self.experiment) if known is None else known.experiment_id
        if self.resume:
            found = self._client.search_runs(
                [where],
                f'attributes.run_name = "{self.run_name}"',
                order_by=["attributes.start_time DESC"],
                max_results=1,
            )
            if found:
                return str(found[0].info.run_id)
        return str(self._client.create_run(where, run_name=self.run_name).info.run_id)


def _flat(about: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in about.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
