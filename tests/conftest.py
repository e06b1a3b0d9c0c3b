"""What several folders of tests share."""
# ruff: noqa: E402

import contextlib
import os
import runpy
import tempfile

# Compiled programs of this run's processes; tests leave the user's own alone.
PROGRAMS = tempfile.TemporaryDirectory(prefix="qkvjax-programs-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

from qkvjax.commands import cli
from qkvjax.fields import Model
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import model_spec

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")


def pytest_collection_modifyitems(items):
    """The longest file first: at the end it would keep one process busy and the other waiting."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


# Folders and files of what is held against a reference, to a tolerance, or not at all: it need not
# be compiled well, which takes a quarter of the time.
QUICKLY_COMPILED = {
    "attention",
    "docs",
    "evaluation",
    "generation",
    "interop",
    "kernels",
    "models",
    "notebooks",
    "test_analyze_command.py",
    "test_bad_input.py",
    "test_bad_steps.py",
    "test_bench_command.py",
    "test_compiled_plan.py",
    "test_covering.py",
    "test_evaluate_command.py",
    "test_examples.py",
    "test_failures.py",
    "test_generate_command.py",
    "test_hostile.py",
    "test_loss.py",
    "test_mesh_invariance.py",
    "test_processes.py",
    "test_program.py",
    "test_readme.py",
    "test_situations.py",
    "test_study_command.py",
    "test_tuned_study.py",
    "test_workdir.py",
}


jax.devices()  # reads XLA_FLAGS, which change below
FLAGS = os.environ.get("XLA_FLAGS", "")
# jax 0.10 still has XLA's earlier emitter of fused loops, which takes half as long to compile.
EARLIER_EMITTER = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}


def compile_options(*args, get=compiler.get_compile_options, **options):
    """What jax tells XLA. It has no setting for this but XLA_FLAGS, which a process reads once."""
    if EARLIER_EMITTER and jax.config.read("jax_disable_most_optimizations"):
        given = options["env_options_overrides"] or {}
        options["env_options_overrides"] = EARLIER_EMITTER | given
    return get(*args, **options)


compiler.get_compile_options = compile_options


@pytest.fixture(scope="module", autouse=True)
def compiled(request):
    """How this module's programs are, in the test's process and in those that it starts."""
    quickly = bool({request.path.parent.name, request.path.name} & QUICKLY_COMPILED)
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # what another module compiled in the other way has other bits
    jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quickly)
    flags = [f"--{name}={value}".lower() for name, value in EARLIER_EMITTER.items() if quickly]
    os.environ["XLA_FLAGS"] = " ".join([FLAGS, *flags]).strip()


@pytest.fixture(scope="session")
def recipe():
    """Runs a recipe: ("configs/lm.py", "depth=2") -> its configuration."""
    return lambda path, arg=None: runpy.run_path(cli.find_config(path))["get_config"](arg)


@pytest.fixture(scope="session")
def tiny():
    """Makes the spec of a tiny language model; arguments are fields of the `model` group."""

    def make(tokenizer_size=61, seq_len=16, **fields):
        small = {"d_model": 32, "num_layers": 2, "num_heads": 4, "mlp_ratio": 1.0}
        return model_spec(Model(**(small | fields)), tokenizer_size, seq_len)

    return make


@pytest.fixture(scope="session")
def filled():
    """Makes the module that a function would build, with random numbers in every parameter.

    No bias is zero and no gain one, so that neither hides anything; and nothing is compiled.
    """

    def fill(path, leaf, rng):
        noise = rng.normal(size=leaf.shape)
        kind = jax.tree_util.keystr(path[-2:])
        if "gain" in kind:
            return 1 + 0.2 * noise
        small = "bias" in kind or leaf.ndim < 2
        return 0.2 * noise if small else noise * leaf.shape[-2] ** -0.5

    def make(build, seed=0):
        rng = np.random.default_rng(seed)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(fill(path, leaf, rng), leaf.dtype),
            jax.eval_shape(build),
        )

    return make


@pytest.fixture(scope="session")
def model(tiny, filled):
    """Makes a tiny language model of random numbers; arguments as for `tiny`."""

    def make(**fields):
        spec = tiny(**fields)
        return filled(lambda: LanguageModel(spec, key=jax.random.key(0)))

    return make


@pytest.fixture(scope="session")
def programs_kept_in():
    """programs_kept_in(folder): a context in which compiled programs are kept in a folder."""

    @contextlib.contextmanager
    def kept_in(folder):
        settings = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0.0,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    return kept_in


@pytest.fixture
def in_process(monkeypatch):
    """Lets a study train its runs in this process, and measure nothing."""
    from qkvjax.commands import study as study_command
    from qkvjax.studies import measurements, processes

    class Finished:
        def __init__(self, code):
            self.returncode = code

        def poll(self):
            return self.returncode

    def start_run(study, task, arguments, slot):
        return Finished(study_command.main(["qkvjax study", *arguments, f"--point={task.number}"]))

    monkeypatch.setattr(processes, "start_run", start_run)
    monkeypatch.setattr(measurements, "read_or_measure", lambda *arguments: {})
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.0)
