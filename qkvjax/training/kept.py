"""Which checkpoints stay when newer ones are saved."""

from __future__ import annotations

from collections.abc import Sequence


class Kept:
    """The newest checkpoints, those of every so many steps, and the best one.

    A preservation policy as Orbax asks for one.

    Attributes:
      newest: how many of the newest stay.
      every: multiples of this stay as well; 0: none.
      best: the step of the best checkpoint, which stays as well, or None.
    """

    def __init__(self, newest: int, every: int = 0):
        self.newest = newest
        self.every = every
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence, *, context=None) -> list[bool]:
        """Whether each checkpoint stays.

        Args:
          checkpoints: in the order of their steps; each has a `step`.
          context: unused.
        """
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = set(steps[-self.newest :])
        return [step in newest or step == self.best or self._is_multiple(step) for step in steps]

    def _is_multiple(self, step: int) -> bool:
        return bool(self.every) and step > 0 and step % self.every == 0
