"""Which implementation computes a call of attention, and how the processes of a job agree on it.

    call of attention -> Problem
      "auto"  -> `candidates`, the best first -> the first one that
                   1. can run on the target device      (`missing`)
                   2. supports the arguments            (the kernel's `refusal`)
                   3. passes a trial                    (`trial.failure`)
      a name  -> that one; an error where 1 or 2 fails

The trial is this very call, small, against the reference. A device that the program is compiled for
and that is not here runs no trial; there it is enough that the kernel can be traced. On every
accelerator the memory of what comes before `xla` grows with the length of a sequence, and not with
its square.

A job of several processes has to run one program. `settle` makes the choices of a program before it
is compiled: a kernel is taken where every process can run it and its trial passes on each. A call
that was not settled is chosen by its arguments alone, among the kernels that `settle` has chosen,
so that processes still agree.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator

from qkvjax.errors import UserError, did_you_mean
from qkvjax.kernels import IMPLEMENTATIONS, trial
from qkvjax.kernels.trial import Problem
from qkvjax.parallel import distributed
from qkvjax.parallel.target import Target, target

# Kernels: (the module for whole sequences, the module for a cache). The first one has `attention`,
# the second one `decode` and `cannot_make`, and both have `refusal`.
KERNELS = {
    "hopper": ("hopper.attention", "triton.decode"),
    "triton": ("triton.attention", "triton.decode"),
    "cudnn": ("cudnn", "triton.decode"),
    "splash": ("tpu.splash", "tpu.decode"),
    "tpu": ("tpu.attention", "tpu.decode"),
}
NO_CACHE = ("hopper", "cudnn", "splash")  # another kernel reads the cache for them

# What "auto" tries for whole sequences, the best first; `xla` comes behind all of them.
ORDER = {
    # Measured on an H200, forward and backward together: benchmarks/results/h200/tiles.jsonl.
    ("hopper", "one tensor"): ("hopper", "cudnn", "triton"),
    ("hopper", "two tensors"): ("cudnn", "hopper", "triton"),
    # Not measured: NVIDIA's library before ours.
    ("nvidia", "one tensor"): ("cudnn", "triton"),
    ("nvidia", "two tensors"): ("cudnn", "triton"),
    # Not measured: ours loads one tile for K = V, jax's is the one that others train with.
    ("tpu", "one tensor"): ("tpu", "splash"),
    ("tpu", "two tensors"): ("splash", "tpu"),
}
# The same for a cache. There the memory of `xla` grows with no square either, so only what was
# measured to be faster stands here: benchmarks/results/h200/splits.jsonl.
ORDER_OF_A_CACHE = {"hopper": ("triton",)}

_decisions: dict[tuple, tuple[str, tuple]] = {}  # (impl, problem, target) -> (name, refusals)
_agreed: set[str] = set()  # kernels that `settle` chose for all processes
_printed: set[str] = set()  # lines
_recordings: list[list[Problem]] = []  # one for each `recording` that is open


def kernel(impl: str, decodes: bool = False):
    """Returns a module of KERNELS.

    It is imported when it is needed, because importing Pallas takes a quarter of a start.
    """
    return importlib.import_module(f"qkvjax.kernels.{KERNELS[impl][decodes]}")


# ---- what could run ---------------------------------------------------------------------------


def generation(device: Target) -> str:
    """Returns the name by which ORDER knows a device: "hopper", "nvidia", "tpu" or "other"."""
    if device.platform == "tpu":
        return "tpu"
    if device.major == 9:
        return "hopper"
    return "nvidia" if device.major >= 8 else "other"


def missing(impl: str) -> str | None:
    """Returns what the target device lacks for an implementation; None where it runs."""
    if impl not in KERNELS:
        return None
    device = target()
    if impl in ("tpu", "splash"):
        return None if device.platform == "tpu" else "a TPU"
    if impl == "hopper":
        return None if device.major == 9 else "an NVIDIA GPU of compute capability 9.0"
    return None if device.major >= 8 else "an NVIDIA GPU of compute capability 8.0 or newer"


def candidates(impl: str = "auto", tied: bool = True, decodes: bool = False) -> tuple[str, ...]:
    """Returns what to try for `impl`, the best first.

    Args:
      tied: whether the keys are the values.
      decodes: whether a cache is read.

    Raises:
      UserError: `impl` is unknown, or the target device lacks something for it.
    """
    if impl == "auto":
        device = generation(target())
        if decodes:
            return (*ORDER_OF_A_CACHE.get(device, ()), "xla")
        return (*ORDER.get((device, "one tensor" if tied else "two tensors"), ()), "xla")
    usable = [name for name in IMPLEMENTATIONS if not missing(name)]
    if impl not in IMPLEMENTATIONS:
        raise UserError(
            f"attention implementation {impl!r} is unknown: this machine has"
            f" {', '.join(usable)}{did_you_mean(impl, usable)}"
        )
    if missing(impl):
        raise UserError(
            f"attention implementation {impl!r} needs {missing(impl)}: this machine has"
            f" {', '.join(usable)}"
        )
    return (impl,)


# ---- decisions --------------------------------------------------------------------------------


def choose(impl: str, problem: Problem) -> str:
    """Returns the first of `candidates` that computes a problem.

    Prints once why it is not one of those before it.

    Raises:
      UserError: none of them computes it.
    """
    if _recordings:
        _recordings[-1].append(problem)
        return "xla"
    key = _key(impl, problem)
    if key not in _decisions:
        must_agree = distributed.several() and len(candidates(impl)) > 1
        reason_against = _reason_against_unsettled if must_agree else _reason_against
        _decisions[key] = _decide(impl, problem, reason_against)
        _print_decision(impl, *_decisions[key], problem)
    return _decisions[key][0]


@contextlib.contextmanager
def recording() -> Iterator[list[Problem]]:
    """Collects the problems of what is traced inside, without a decision on any."""
    problems: list[Problem] = []
    _recordings.append(problems)
    try:
        yield problems
    finally:
        _recordings.pop()


def settle(trace: Callable[[], object], impl: str = "auto") -> tuple[str, ...]:
    """Decides for every call of attention that `trace()` traces, alike on all processes of a job.

    Every process of the job calls it at the same point, with the same program. A kernel is taken
    where each of them can run it and its trial passes on each. A kernel that one process cannot
    run is used by none.

    Returns:
      The names of the implementations that were chosen, each once.

    Raises:
      UserError: no implementation computes one of the calls; on every process.
    """
    if candidates(impl) in (("xla",), ("reference",)):  # these support all arguments
        return candidates(impl)
    with recording() as problems:
        trace()
    for problem in dict.fromkeys(problems):
        key = _key(impl, problem)
        if key not in _decisions:
            _decisions[key] = _decide(impl, problem, _reason_against, distributed.together)
            _print_decision(impl, *_decisions[key], problem)
        _agreed.add(_decisions[key][0])
    return tuple(dict.fromkeys(_decisions[_key(impl, problem)][0] for problem in problems))


def _key(impl: str, problem: Problem) -> tuple:
    return impl, problem, target()


def _decide(impl, problem, reason_against, agree=lambda call: call()) -> tuple[str, tuple]:
    """Returns (name, the reasons against those before it).

    Args:
      reason_against: (name, problem, whether to try it) -> why not, or None.
      agree: calls a function on all processes and raises UserError where one of them did.
    """
    refused = {}
    names = candidates(impl, problem.values_are_keys, problem.decodes)

    def check(name):
        if reason := reason_against(name, problem, len(names) > 1):
            raise UserError(reason)

    for name in names:
        try:
            agree(lambda name=name: check(name))
        except UserError as error:
            refused[name] = str(error)
        else:
            return name, tuple(refused.items())
    # "auto" ends with xla, which supports everything: a single name is left.
    [(name, reason)] = refused.items()
    raise UserError(f"attention implementation {name!r} cannot compute this: {reason}; use auto")


def _reason_against(name: str, problem: Problem, tries: bool) -> str | None:
    """Returns why an implementation should not compute a problem here; None where it should.

    Args:
      tries: whether a trial decides as well.
    """
    if name not in KERNELS:
        return None
    if lacking := missing(name):
        return f"it needs {lacking}"
    module = kernel(name, problem.decodes)
    reason = module.refusal(**problem.operands())
    if reason is None and not problem.whole:
        reason = "it needs whole sequences (mesh.context=1)"
    if reason is not None or not tries:
        return reason
    run = module.decode if problem.decodes else module.attention
    return trial.failure(run, problem) if target().here else trial.refuses(run, problem)


def _reason_against_unsettled(name: str, problem: Problem, tries: bool) -> str | None:
    """Returns what `_reason_against` does, from what all processes of a job know alike.

    It runs no trial: that could pass on some processes and fail on others.
    """
    if tries and name in KERNELS and name not in _agreed:
        return "the processes of this job have not agreed on it"
    return _reason_against(name, problem, False)


def _print_decision(impl: str, chosen: str, refused: tuple, problem: Problem) -> None:
    """Prints, where "auto" had a choice, what was chosen and why not something before it."""
    is_accelerator = target().platform != "cpu"
    if impl != "auto" or not is_accelerator or not distributed.is_first():
        return
    usable = [name for name in KERNELS if missing(name) is None]
    parts = [f"attention: {chosen}"]
    if chosen == "xla" and not problem.decodes:
        parts = [f"attention: {chosen}, whose memory grows with the square of the length"]
    parts += [f"not {name}: {reason}" for name, reason in refused]
    if chosen == "xla" and not refused and usable:
        parts.append(
            f"{' and '.join(usable)} can run on this device and were not measured: name one to use"
            f" it (--attention={usable[0]})"
        )
    if chosen in KERNELS and not target().here:
        parts.append(f"not tried, because no {target().kind} is here")
    line = "; ".join(parts)
    if line not in _printed:
        _printed.add(line)
        print(line, file=sys.stderr, flush=True)
