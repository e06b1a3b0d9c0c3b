"""Compiles every kernel for NVIDIA GPUs at its default blocks for an H200 that is not there.

  XLA_FLAGS="--xla_dump_to=FOLDER --xla_dump_emitter_re=.*" MOSAIC_GPU_DUMP_TO=FOLDER
      MOSAIC_GPU_DUMP_PTXAS=1 JAX_PLATFORMS=cpu python compile_for_h200.py FOLDER

A line of JSON for each kernel: registers, bytes spilled, bytes of shared memory; a kernel that does
not compile, because it needs more shared memory than there is, ends the script. It needs
jax-cuda13-plugin and jax-cuda13-pjrt of jax's version (`pip install --no-deps`), nvidia-cuda-nvcc
and nvidia-nvvm; exit code 3 says that one is missing.
"""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
    AxisType,
    NamedSharding,
    PartitionSpec,
    use_abstract_mesh,
)

from qkvjax.kernels.hopper import attention as hopper
from qkvjax.kernels.stored import Int8, KeyOfState
from qkvjax.kernels.triton import attention as triton
from qkvjax.kernels.triton import decode as triton_decode
from qkvjax.parallel.topology import H200

B, T, N, K, S, PAGE = 2, 1024, 8, 2, 4096, 64


def training(width, tied):
    """(name, function, arguments) of one shape's training kernels."""
    shapes = [(B, T, N, width), (B, T, K, width)] + ([] if tied else [(B, T, K, width)])

    def loss(*arrays):
        return jnp.sum(triton.attention(*arrays).astype(jnp.float32))

    yield "training", jax.grad(loss, argnums=tuple(range(len(shapes)))), shapes

    def through_mosaic(*arrays):
        return jnp.sum(hopper.attention(*arrays).astype(jnp.float32))

    yield "hopper", jax.grad(through_mosaic, argnums=tuple(range(len(shapes)))), shapes


def decoding(width, tied):
    """The same of the decode kernel: contiguous, in pages and int8, raw."""
    q, cache = (B, 1, N, width), (B, S, K, width)

    def decode(q, *held, **options):
        positions = jnp.full((B, 1), S - 1)
        return triton_decode.decode(q, *held, positions=positions, **options)

    yield "decode", decode, [q, cache] + ([] if tied else [cache])
    if tied:
        pages = (B * S // PAGE, PAGE, K, width)

        def paged(q, codes, scales, table):
            held = Int8(codes.astype(jnp.int8), scales)
            return decode(q, held, table=table.astype(jnp.int32))

        yield "decode, int8 pages", paged, [q, pages, pages[:-1], (B, S // PAGE)]

        def raw(q, states, gain):
            return decode(q, states, key=KeyOfState(1e4, width, gain))

        yield "decode, raw", raw, [q, cache, (width,)]


def main(folder: pathlib.Path) -> int:
    try:
        import nvidia

        devices = topologies.get_topology_desc(
            platform="cuda", target_config=H200, topology="1x1x1"
        ).devices
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 3
    roots = [pathlib.Path(p) for p in nvidia.__path__]
    ptxas = next((p for root in roots for p in root.glob("cu*/bin/ptxas")), None)
    if ptxas is None:
        print("there is no ptxas", file=sys.stderr)
        return 3
    sharding = NamedSharding(jax.sharding.Mesh(devices[:1], ("x",)), PartitionSpec())
    device = {"device_kind": "NVIDIA H200", "num_cores": None}
    if "platform" in AbstractDevice.__dataclass_fields__:
        device["platform"] = "gpu"
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=AbstractDevice(**device)
    )
    for width in (64, 128, 256):
        for tied in (False, True):
            for name, function, shapes in (*training(width, tied), *decoding(width, tied)):
                before = set(folder.glob("*.ptx*"))
                arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
                with use_abstract_mesh(mesh):
                    lowered = jax.jit(function).lower(*arrays)
                lowered.compile()
                new = set(folder.glob("*.ptx*")) - before
                for file in sorted(file for file in new if "hopper" in file.name):
                    if file.suffix == ".ptxas":  # Mosaic's own report
                        line = {"case": name, "width": width, "tied": tied}
                        kernel = re.sub(r"_\d+$", "", file.stem)
                        spilled = re.search(r"(\d+) bytes spill stores", file.read_text())
                        facts = {"kernel": kernel, "spilled": int(spilled[1])}
                        print(json.dumps(line | facts), flush=True)
                for file in sorted(file for file in new if file.suffix == ".ptx"):
                    if "hopper" in file.name:
                        continue
                    for kernel, facts in resources(ptxas, file):
                        line = {"case": name, "width": width, "tied": tied, "kernel": kernel}
                        print(json.dumps(line | facts), flush=True)
    return 0


def resources(ptxas, file):
    """(kernel, registers and bytes spilled) of our kernels in a file of PTX."""
    done = subprocess.run(
        [ptxas, "-v", "-arch=sm_90a", file, "-o", "/dev/null"], capture_output=True, text=True
    )
    kernel, spilled = None, 0
    for line in done.stderr.splitlines():
        if found := re.search(r"entry function '(\w+)'", line):
            kernel = found[1]
        elif found := re.search(r"(\d+) bytes spill stores", line):
            spilled = int(found[1])
        elif (found := re.search(r"Used (\d+) registers", line)) and "attention" in str(kernel):
            yield kernel, {"registers": int(found[1]), "spilled": spilled}


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
