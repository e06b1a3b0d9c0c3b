"""What a step of a run consists of."""

from types import SimpleNamespace

from qkvjax import config as configs
from qkvjax.training.run import Run


def test_the_tokens_of_a_step_are_those_of_all_its_micro_batches():
    config = configs.default()
    config.data.update(batch_size=12, seq_len=32)
    config.train.accumulation = 3
    spec = SimpleNamespace(forward_macs=lambda seq_len: 100 * seq_len)
    run = Run(config, None, spec, None, None, None, None, None)
    assert run.tokens_per_step == 12 * 32 and run.micro_batch == 4
    assert (
        run.train_flops_per_token == 600
    )  # two FLOPs a multiply-add, forward once, backward twice
