"""Which checkpoints stay."""

from types import SimpleNamespace

from qkvjax.training.kept import Kept


def stays(kept, steps):
    preserved = kept.should_preserve([SimpleNamespace(step=step) for step in steps])
    return [step for step, stays in zip(steps, preserved, strict=True) if stays]


def test_the_newest_every_nth_and_the_best_stay():
    kept = Kept(2)
    assert stays(kept, [3, 5, 8, 10, 12]) == [10, 12]
    kept = Kept(1, every=5)
    assert stays(kept, [0, 3, 5, 8, 10, 12]) == [5, 10, 12]
    kept.best = 3
    assert stays(kept, [0, 3, 5, 8, 10, 12]) == [3, 5, 10, 12]
