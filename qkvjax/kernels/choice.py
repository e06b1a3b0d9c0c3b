"""Which implementation computes a call of attention, and how the processes of a job agree on it.

"auto" goes through `candidates`, the best first, and takes the first one that takes the arguments
and whose kernel passes a trial: this very call, small, against the reference (`trial`). On every
accelerator what stands before `xla` needs memory that grows with the length of a sequence, not with
its square. A device that the program is compiled for and that is not here runs no trial; there the
kernel must let itself be traced.

A job of several processes has to run one program. `settle` makes the choices of a program before it
is compiled: a kernel is taken where every process can run it and its trial passes on each. What a
job of several processes asks for later, without `settle`, is chosen by its arguments alone, among
the kernels that `settle` has chosen, so that processes still agree.
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

# Kernels: the modules of whole sequences, and of a cache.
KERNELS = {
    "hopper": ("hopper.attention", "triton.decode"),
    "triton": ("triton.attention", "triton.decode"),
    "cudnn": ("cudnn", "triton.decode"),
    "splash": ("tpu.splash", "tpu.decode"),
    "tpu": ("tpu.attention", "tpu.decode"),
}
NO_CACHE = ("hopper", "cudnn", "splash")  # another kernel reads it for them

# What "auto" tries of whole sequences, the best first; `xla` comes behind all of them.
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
# The same of a cache. Through XLA no memory grows with a square, so only what was measured faster
# stands here: benchmarks/results/h200/splits.jsonl.
ORDER_OF_A_CACHE = {"hopper": ("triton",)}

_decided: dict[tuple, tuple[str, tuple]] = {}
_proven: set[str] = set()  # kernels that `settle` chose for all processes
_said: set[str] = set()  # lines that were printed
_recorded: list[list[Problem]] = []  # of the calls of `recording` that are open


def kernel(impl: str, decodes: bool = False):
    """Returns a module of KERNELS. Loaded when it is needed: Pallas takes a quarter of a start."""
    return importlib.import_module(f"qkvjax.kernels.{KERNELS[impl][decodes]}")


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


def choose(impl: str, problem: Problem) -> str:
    """Returns the first of `candidates` that computes this; says once why not one before it.

    Raises:
      UserError: none does.
    """
    if _recorded:
        _recorded[-1].append(problem)
        return "xla"
    key = _key(impl, problem)
    if key not in _decided:
        several = distributed.several() and len(candidates(impl)) > 1
        _decided[key] = _decide(impl, problem, _agreeable if several else _unsuited)
        _tell(impl, *_decided[key], problem)
    return _decided[key][0]


@contextlib.contextmanager
def recording() -> Iterator[list[Problem]]:
    """Collects the problems of what is traced inside, without a decision on any."""
    problems: list[Problem] = []
    _recorded.append(problems)
    try:
        yield problems
    finally:
        _recorded.pop()


def settle(trace: Callable[[], object], impl: str = "auto") -> tuple[str, ...]:
    """Decides for every call of attention that `trace()` traces, alike on all processes of a job.

    Every process of the job calls it at the same point, with the same program. A kernel is taken
    where each of them can run it and its trial passes on each; what one process lacks, all do
    without.

    Returns:
      The names of the implementations that were chosen, each once.

    Raises:
      UserError: no implementation computes one of the calls; on every process.
    """
    if candidates(impl) in (("xla",), ("reference",)):  # these take everything
        return candidates(impl)
    with recording() as problems:
        trace()
    for problem in dict.fromkeys(problems):
        key = _key(impl, problem)
        if key not in _decided:
            _decided[key] = _decide(impl, problem, _unsuited, distributed.together)
            _tell(impl, *_decided[key], problem)
        _proven.add(_decided[key][0])
    return tuple(dict.fromkeys(_decided[_key(impl, problem)][0] for problem in problems))


def _key(impl: str, problem: Problem) -> tuple:
    return impl, problem, target()


def _decide(impl, problem, unsuited, agree=lambda call: call()) -> tuple[str, tuple]:
    """(name, reasons against those before it).

    Args:
      unsuited: (name, problem, whether to try it) -> why not, or None.
      agree: calls a function on all processes and raises UserError where one of them did.
    """
    refused = {}
    names = candidates(impl, problem.values_are_keys, problem.decodes)

    def check(name):
        if why := unsuited(name, problem, len(names) > 1):
            raise UserError(why)

    for name in names:
        try:
            agree(lambda name=name: check(name))
        except UserError as error:
            refused[name] = str(error)
        else:
            return name, tuple(refused.items())
    [(name, why)] = refused.items()
    raise UserError(f"attention implementation {name!r} cannot compute this: {why}; use auto")


def _unsuited(name: str, problem: Problem, tries: bool) -> str | None:
    """Why an implementation should not compute a problem here; None where it should.

    Args:
      tries: whether the kernel's results decide as well.
    """
    if name not in KERNELS:
        return None
    if lacking := missing(name):
        return f"it needs {lacking}"
    module = kernel(name, problem.decodes)
    why = module.refusal(**problem.operands())
    if why is None and not problem.whole:
        why = "it needs whole sequences (mesh.context=1)"
    if why is not None or not tries:
        return why
    run = module.decode if problem.decodes else module.attention
    return trial.failure(run, problem) if target().here else trial.refuses(run, problem)


def _agreeable(name: str, problem: Problem, tries: bool) -> str | None:
    """`_unsuited` by what all processes of a job know alike."""
    if tries and name in KERNELS and name not in _proven:
        return "the processes of this job have not agreed on it"
    return _unsuited(name, problem, False)


def _tell(impl: str, chosen: str, refused: tuple, problem: Problem) -> None:
    """Says, where there is a choice, what was chosen and why not something before it."""
    usable = [name for name in KERNELS if missing(name) is None]
    accelerator = target().platform != "cpu"
    if impl != "auto" or not accelerator or not distributed.is_first():
        return
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
    if line not in _said:
        _said.add(line)
        print(line, file=sys.stderr, flush=True)
