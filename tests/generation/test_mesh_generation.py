"""Sampling from a model that is sharded over a mesh.

One process with 8 virtual devices samples from the same tiny models on one device and on several
meshes, and prints the tokens and how many bytes each device has.
"""

import gc
import json
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qkvjax import config as configs
from qkvjax.costs.measure import peak_bytes
from qkvjax.costs.program import Program
from qkvjax.fields import Model
from qkvjax.generation import decode as decoding
from qkvjax.generation.generate import generate
from qkvjax.generation.serving import compile_generation, serve
from qkvjax.models.lm import LanguageModel
from qkvjax.models.spec import model_spec
from qkvjax.parallel import placed
from qkvjax.parallel.mesh import for_generation, for_scoring, make_mesh
from qkvjax.training.restore import abstract_model, load_model, new_workdir, save_model
from qkvjax.training.step import state_shardings

PARALLEL = Path(__file__).parents[1] / "parallel"
# Parameters are gathered layer by layer, as by the compilers of accelerators.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
PROMPT = np.array([7, 3, 11, 40, 2], np.int32)
IDS, NEW = 61, 6
KV_SHARED = {"sharing": "q-k=v", "position": "rope"}
ONE = ({"fsdp": 4, "expert": 2}, 1)  # one sequence, which the devices do not divide
HEADS = ({"tensor": 4}, 1)
BOTH = ({"replica": 2, "fsdp": 2, "tensor": 2}, 4)
EVERY = ({"expert": 2, "context": 2, "tensor": 2}, 6)
# name: (fields of the model, options of `generate`, (axes of the mesh, sequences))
VARIANTS = {
    "QKV": ({}, {}, ONE),
    "GQA in pages": ({"num_kv_heads": 2, "qk_norm": True}, {"page_size": 4}, EVERY),
    "MQA in int8": ({"num_kv_heads": 1, "position": "learned"}, {"cache_dtype": "int8"}, BOTH),
    "Q-K=V, raw, modified scores": (
        KV_SHARED
        | {
            "num_kv_heads": 2,
            "qk_norm": True,
            "rotary_values": "raw",
            "score": ("role_bias", "role_gain", "column_bias"),
        },
        {},
        HEADS,
    ),
    "Q-K=V, raw, in pages and int8": (
        KV_SHARED | {"rotary_values": "raw"},
        {"page_size": 4, "cache_dtype": "int8"},
        BOTH,
    ),
    "a pattern of layers and experts": (
        {
            "num_layers": 2,
            "mlp": "swiglu(experts=4,top=2)",
            "layer_overrides": (
                {"window": 3},
                KV_SHARED | {"num_kv_heads": 1, "rotary_values": "unrotated_output"},
            ),
        },
        {},
        EVERY,
    ),
}


def spec_of(fields, **sizes):
    small = {"d_model": 32, "num_layers": 1, "num_heads": 4, "mlp_ratio": 1.0}
    return model_spec(Model(**(small | fields | sizes)), IDS, 16)


def filled(spec):
    """A model with random parameters, those of attention's output larger, so that it matters."""
    model = jax.eval_shape(lambda: LanguageModel(spec, key=jax.random.key(0)))
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        scale = 0.3 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        return jnp.asarray(noise * scale * (4 if "output" in jax.tree_util.keystr(path) else 1))

    return jax.tree_util.tree_map_with_path(fill, model)


def on_mesh(model, mesh):
    return jax.device_put(model, state_shardings(model, mesh))


def tokens(fields, options, mesh):
    """[tokens on one device, tokens on the mesh] of a variant."""
    sizes, batch = mesh
    model = filled(spec_of(fields))
    devices = jax.devices()[: np.prod([*sizes.values()])]
    return [
        generate(
            m, PROMPT, num_ids=IDS, max_tokens=NEW, batch=batch, dtype="float64", **options
        ).ids.tolist()
        for m in (model, on_mesh(model, make_mesh(sizes, devices)))
    ]


def bytes_on_devices(tree):
    """Bytes of a tree on each of the devices."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return list(sizes.values())


def restored(workdir):
    """Bytes on each device of a model that a command loads, and of its caches for 8 sequences."""
    alone, *_ = load_model(workdir)
    results = {"alone": bytes_on_devices(alone)}
    for name, mesh in {"scoring": for_scoring, "generation": for_generation}.items():
        model, tokenizer, _, _ = load_model(workdir, mesh=mesh)
        with placed.on_mesh_of(model):
            cache = decoding.empty_caches(model, 8, 32, jnp.float32)
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), model, alone)
        results[name] = {
            "mesh": dict(placed.mesh_of(model).shape),
            "model": bytes_on_devices(model),
            "cache": bytes_on_devices(cache),
            "same": all(jax.tree.leaves(same)),
        }
    return results


def served(workdir):
    """Bytes on each device of all arrays alive while a restored model is served, and the tokens
    that it samples in bfloat16, before and after `serve`."""
    model, tokenizer, _, _ = load_model(workdir, mesh=for_generation)
    options = {"num_ids": IDS, "max_tokens": NEW, "temperature": 0, "dtype": "bfloat16"}
    before = generate(model, PROMPT, **options).ids.tolist()
    others = {id(array) for array in jax.live_arrays()} - {id(a) for a in jax.tree.leaves(model)}
    one = serve(model, "bfloat16")
    gc.collect()
    alive = [array for array in jax.live_arrays() if id(array) not in others]
    after = generate(one, PROMPT, **options).ids.tolist()
    return {"bytes": bytes_on_devices(alive), "before": before, "after": after}


def peaks():
    """axis of the mesh -> program -> peak bytes of a device; and the bytes of all parameters."""
    spec = spec_of(KV_SHARED, d_model=128, num_layers=6, num_heads=8, num_kv_heads=2)
    results = {}
    for axis in ("tensor", "fsdp"):
        mesh = make_mesh({axis: 8})
        programs = compile_generation(spec, mesh, 8, 64, dtype="float32")
        results[axis] = {name: peak_bytes(program) for name, program in programs.items()}
        sent = Program(programs["decode"].as_text()).collectives()
        results[axis]["sent"] = sum(kind["bytes"] for kind in sent.values())
    return results | {"parameters": 4 * spec.num_params}


def main(workdir):
    results = {"tokens": {name: tokens(*variant) for name, variant in VARIANTS.items()}}
    with jax.enable_x64(False):
        results |= {"restored": restored(workdir), "served": served(workdir), "peaks": peaks()}
    print("result: " + json.dumps(results))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    sys.path.insert(0, str(PARALLEL))
    import processes

    sys.path.insert(0, str(Path(__file__).parent))
    folder = tmp_path_factory.mktemp("mesh")
    config = configs.default()
    config.data.update(source="text:corpus.txt", tokenizer="bytes", seq_len=16)
    config.model.update(
        d_model=64, num_layers=2, num_heads=8, num_kv_heads=2, mlp_ratio=2.0, sharing="q-k=v"
    )
    config = configs.resolve(config)
    shapes = abstract_model(config)[1]
    arrays = {name: np.random.default_rng(0).normal(size=s.shape) for name, s in shapes.items()}
    save_model(new_workdir(str(folder / "run")), config, arrays, {})
    program = f"import {__name__} as t; t.main({str(folder / 'run')!r})"
    flags = os.environ.get("XLA_FLAGS", ""), IN_ORDER
    return processes.run_program(folder, program, JAX_ENABLE_X64="1", XLA_FLAGS=" ".join(flags))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mesh_samples_the_tokens_of_one_device(results, variant):
    alone, spread = results["tokens"][variant]
    assert np.shape(alone) == (VARIANTS[variant][2][1], NEW)
    assert alone == spread


@pytest.mark.parametrize("purpose", ["scoring", "generation"])
def test_a_restored_model_is_sharded_over_all_devices(results, purpose):
    """Each device has an eighth of the parameters, apart from norms, and an eighth of the cache.

    For generation the cache has 8 heads, one for each query head, instead of 2.
    """
    got = results["restored"][purpose]
    whole = results["restored"]["alone"][0]
    assert results["restored"]["alone"][1:] == [0] * 7
    assert got["mesh"]["tensor" if purpose == "generation" else "fsdp"] == 8
    assert got["same"]
    assert len(got["model"]) == 8 and whole / 8 <= max(got["model"]) < whole / 7
    heads = 2 if purpose == "scoring" else 8
    assert got["cache"] == [8 * 32 * 2 * heads * 8 * 4 // 8] * 8


def test_a_served_model_is_in_memory_once(results):
    """In bfloat16, apart from the embedding and the norms; it samples the same tokens."""
    whole = results["restored"]["alone"][0]
    assert results["served"]["after"] == results["served"]["before"]
    assert whole / 8 / 2 < max(results["served"]["bytes"]) < whole / 8 * 0.75


def test_compiled_generation_holds_no_second_copy(results):
    """Neither of a device's part of the parameters nor, where they are gathered, of all of them."""
    whole = results["peaks"]["parameters"]
    assert results["peaks"]["tensor"]["decode"] < 2 * whole / 8
    assert results["peaks"]["fsdp"]["decode"] < 0.4 * whole
    assert results["peaks"]["fsdp"]["prefill"] < 0.4 * whole
    assert results["peaks"]["tensor"]["sent"] < results["peaks"]["fsdp"]["sent"] / 20
