"""Weights & Biases, which must not hold up a run: by a stand-in that answers as it does."""

import sys
import types

import pytest

from qkvjax import config as configs
from qkvjax.files import read_lines
from qkvjax.training.metrics import Metrics


class Error(Exception):
    pass


class Run:
    def __init__(self):
        self.lines = []

    def log(self, values, step):
        self.lines.append((step, values))

    def finish(self):
        self.lines.append("finished")


@pytest.fixture
def service(monkeypatch):
    """A module called wandb whose service fails with `service.error`; `calls` are those of init."""
    module = types.ModuleType("wandb")
    module.Error, module.error, module.calls, module.run = Error, None, [], Run()

    def init(**given):
        module.calls.append(given)
        if module.error is not None and given.get("mode") != "offline":
            raise module.error
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "")
    return module


def config():
    config = configs.default()
    config.train.wandb = "project"
    return configs.to_dict(config)


@pytest.mark.parametrize(
    "error",
    [
        Error("No API key configured. Use `wandb login` to log in."),
        Error("Failed to get resume status: no such host\nwhile retrying"),
        ConnectionError("network is unreachable"),
        TimeoutError(),
    ],
)
def test_a_run_goes_on_without_the_service(service, tmp_path, capsys, error):
    service.error = error
    metrics = Metrics(tmp_path, 0, config())
    told = capsys.readouterr().err
    assert "WANDB_MODE=offline" in told and "the run goes on" in told and told.count("\n") == 1
    assert service.calls[0]["settings"]["init_timeout"] <= 10  # not a minute and a half
    assert service.calls[1]["mode"] == "offline"
    metrics.write(3, {"train/loss": 1.5})
    metrics.close()
    assert service.run.lines == [(3, {"train/loss": 1.5}), "finished"]
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 3, "train/loss": 1.5}]


def test_a_service_that_answers_is_used(service, tmp_path, capsys):
    Metrics(tmp_path, 0, config()).close()
    assert not capsys.readouterr().err
    (given,) = service.calls
    assert given["project"] == "project" and "mode" not in given


def test_an_error_of_another_kind_is_ours(service, tmp_path):
    service.error = TypeError("unexpected keyword")
    with pytest.raises(TypeError):
        Metrics(tmp_path, 0, config())
