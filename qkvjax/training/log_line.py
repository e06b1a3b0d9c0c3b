"""What the loop shows of a step: a line of the log, or a progress bar on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping

from qkvjax.formats import count
from qkvjax.parallel.distributed import is_first
from qkvjax.progress import duration


def log_line(step: int, steps: int, line: Mapping[str, float], left: float | None) -> str:
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    if "tokens_per_second" in line:
        mfu = f"{100 * line['mfu']:.1f} %" if "mfu" in line else "n/a"
        parts += [
            f"loss {line.get('train/loss', math.nan):.4f}",
            f"lr {line['train/learning_rate']:.2e}",
            f"{line['tokens_per_second']:,.0f} tokens/s",
            f"MFU {mfu}",
        ]
    parts += _scores(line)
    if line.get("train/bad_steps"):
        parts.append(f"{line['train/bad_steps']} bad steps left out")
    if left is not None and step < steps:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def _scores(line: Mapping[str, float]) -> list[str]:
    """Returns the scores of an evaluation as text, with how many labels they are of."""
    scores = []
    for name, value in line.items():
        evaluator, _, score = name.rpartition("/")
        if evaluator == "train" or score not in ("bits_per_byte", "accuracy", "loss"):
            continue
        labels = line.get(f"{evaluator}/num_labels")
        sample = "" if score == "loss" or not labels else f" ({count(labels)} labels)"
        scores.append(f"{name} {value:.4f}{sample}")
    return scores


def make_progress_bar(start: int, steps: int, log: Callable[[str], None]):
    """(move, log): `move(step)` sets the bar and `move(None)` ends it; `log` prints above it.

    Without a terminal on stderr there is no bar, and only process 0 has one.
    """
    if not (sys.stderr.isatty() and is_first()):
        return lambda step: None, log
    from tqdm import tqdm

    bar = tqdm(total=steps, initial=start, unit="step", leave=False, dynamic_ncols=True)
    return lambda step: bar.close() if step is None else bar.update(step - bar.n), bar.write
