"""The device mesh: five axes, always there, all of size 1 on one device.

The axes are Explicit: an array's type says how it is sharded, and what cannot be sharded as
asked is an error while tracing, not a silent copy. `jax.jit` with `NamedSharding` under
`jax.set_mesh` is what pjit has become.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils

from qkvjax.errors import UserError

AXES = ("replica", "fsdp", "context", "tensor", "expert")


def find_devices() -> list[jax.Device]:
    """`jax.devices()`, with a message when there are none of the kind that was asked for.

    Raises:
      UserError: JAX_PLATFORMS names what is not here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"jax finds no device (JAX_PLATFORMS={asked!r}; {str(error).splitlines()[:1]}): unset"
            " JAX_PLATFORMS, or install what it names, as in pip install 'qkvjax[cuda]'"
        ) from None


def idle_devices(sizes: Mapping[str, int], count: int) -> str | None:
    """Returns how to use the devices that a mesh leaves idle; None where it leaves none.

    Args:
      sizes: the `mesh` group of a config.
      count: devices in all.
    """
    used = math.prod(int(sizes.get(axis, 1)) for axis in AXES)
    if not 0 < used < count:  # negative with an axis of -1, which takes all
        return None
    return (
        f"{used} of {count} devices {'is' if used == 1 else 'are'} used: --config.mesh.fsdp=-1"
        f" trains one model on all of them, qkvjax study --jobs={count} a model on each"
    )


def make_mesh(sizes: Mapping[str, int], devices: Sequence | None = None) -> jax.sharding.Mesh:
    """Builds the mesh from the `mesh` group of a config.

    Args:
      sizes: axis name to size; axes left out have size 1; at most one is -1, which takes the
        devices that are left.
      devices: what to use; None means all that jax sees.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or to fewer when another
        process has some of them.
    """
    devices = list(find_devices() if devices is None else devices)
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(
            f"mesh={dict(sizes)}: sizes are at least 1, and at most one is -1 (recipes with a size"
            " set mesh.fsdp=-1: give --config.mesh.fsdp=1 beside another)"
        )
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if -1 in shape or math.prod(shape) > len(devices):
        raise UserError(
            f"mesh={dict(sizes)} needs a multiple of {known} devices and {len(devices)} are here:"
            f" change {' or '.join('config.mesh.' + axis for axis in sizes)}"
        )
    if len({device.process_index for device in devices}) > 1 and math.prod(shape) < len(devices):
        raise UserError(
            f"mesh={dict(sizes)} takes {math.prod(shape)} of {len(devices)} devices, and where"
            " several processes have them all must be used: give one axis -1, as in mesh.fsdp=-1"
        )
    used = devices[: math.prod(shape)]
    types = (jax.sharding.AxisType.Explicit,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=used)
    except RuntimeError:  # sizes that are not products of sides of a torus: 32 on 4 x 4 x 4
        split = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=types)


def for_scoring(spec, devices: Sequence | None = None) -> jax.sharding.Mesh | None:
    """The mesh over which a command that runs whole sequences spreads a trained model.

    All devices are on "fsdp": parameters are sharded over them and gathered layer by layer, and so
    are sequences where the devices divide their number. One gather of a layer's parameters serves
    all tokens of a batch.

    Args:
      spec: the model's `ModelSpec`; the mesh is the same for every model.
      devices: what to use; None means all that jax sees.

    Returns:
      The mesh; None on one device, where nothing is spread.
    """
    devices = list(find_devices() if devices is None else devices)
    return make_mesh({"fsdp": -1}, devices) if len(devices) > 1 else None


def for_generation(spec, devices: Sequence | None = None) -> jax.sharding.Mesh | None:
    """The mesh over which a command that decodes spreads a trained model.

    "tensor" gets as many devices as divide the query heads and the feed-forward width of every
    layer, "fsdp" the rest. Decoding reads every parameter for each token: on "tensor" a device
    reads the parameters that it has and sends activations of a few tokens; on "fsdp" the parameters
    themselves cross the devices for each token.

    Args:
      spec: the model's `ModelSpec`.
      devices: what to use; None means all that jax sees.

    Returns:
      The mesh; None on one device, where nothing is spread.
    """
    devices = list(find_devices() if devices is None else devices)
    if len(devices) == 1:
        return None
    tensor = math.gcd(len(devices), spec.d_ff, *(layer.num_heads for layer in spec.layers))
    return make_mesh({"tensor": tensor, "fsdp": -1}, devices)
