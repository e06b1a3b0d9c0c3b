"""The device mesh: five axes that always exist, all of size 1 on one device.

The axes are Explicit: the type of an array says how it is sharded, and a sharding that cannot be
had is an error while tracing, not a silent copy. What was pjit is today `jax.jit` with
`NamedSharding` under `jax.set_mesh`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import jax
from jax.experimental import mesh_utils

from qkvjax.errors import UserError

# What each axis cuts: `parallel.rules`.
AXES = ("replica", "fsdp", "context", "tensor", "expert")


def find_devices() -> list[jax.Device]:
    """Returns `jax.devices()`.

    Raises:
      UserError: jax has no device of the kind that JAX_PLATFORMS names.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise UserError(
            f"jax finds no device (JAX_PLATFORMS={platforms!r}; {str(error).splitlines()[:1]}):"
            " unset JAX_PLATFORMS, or install what it names, as in pip install 'qkvjax[cuda]'"
        ) from None


def idle_devices(sizes: Mapping[str, int], count: int) -> str | None:
    """Returns a hint how to use the devices that a mesh leaves idle; None where it leaves none.

    Args:
      sizes: the `mesh` group of a config.
      count: devices in all.
    """
    used = math.prod(int(sizes.get(axis, 1)) for axis in AXES)
    if not 0 < used < count:  # negative with an axis of -1, which takes all devices
        return None
    return (
        f"{used} of {count} devices {'is' if used == 1 else 'are'} used: --config.mesh.fsdp=-1"
        f" trains one model on all of them, qkvjax study --jobs={count} a model on each"
    )


def make_mesh(sizes: Mapping[str, int], devices: Sequence | None = None) -> jax.sharding.Mesh:
    """Builds the mesh from the `mesh` group of a config.

    Args:
      sizes: axis name to size. Axes that are left out have size 1; at most one is -1 and takes the
        devices that the others leave.
      devices: the devices to use; None means all that jax sees.

    Raises:
      UserError: the sizes need more devices than there are, or leave some idle although several
        processes share them.
    """
    devices = list(find_devices() if devices is None else devices)
    shape = _mesh_shape(sizes, len(devices))
    used = math.prod(shape)
    num_processes = len({device.process_index for device in devices})
    if num_processes > 1 and used < len(devices):
        raise UserError(
            f"mesh={dict(sizes)} uses {used} of {len(devices)} devices, but a job of several"
            " processes must use all: give one axis -1, as in mesh.fsdp=-1"
        )
    types = (jax.sharding.AxisType.Explicit,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=types, devices=devices[:used])
    except RuntimeError:
        # A TPU slice is a torus, and make_mesh gives each axis whole sides of it. A size that is no
        # product of sides (32 on 4 x 4 x 4) needs a side that is split between axes.
        split = mesh_utils.create_device_mesh(shape, devices[:used], allow_split_physical_axes=True)
        return jax.sharding.Mesh(split, AXES, axis_types=types)


def _mesh_shape(sizes: Mapping[str, int], num_devices: int) -> list[int]:
    """Returns the size of each of AXES, -1 replaced.

    Raises:
      UserError: a size is wrong, or there are too few devices.
    """
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(
            f"mesh={dict(sizes)}: sizes must be at least 1, and at most one may be -1 (recipes with"
            " a model size set mesh.fsdp=-1: beside another -1 add --config.mesh.fsdp=1)"
        )
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and num_devices % known == 0:
        shape[shape.index(-1)] = num_devices // known
    if -1 in shape or math.prod(shape) > num_devices:
        fields = " or ".join(f"config.mesh.{axis}" for axis in sizes)
        raise UserError(
            f"mesh={dict(sizes)} needs a multiple of {known} devices, jax has {num_devices}: change"
            f" {fields}"
        )
    return shape


def for_scoring(spec, devices: Sequence | None = None) -> jax.sharding.Mesh | None:
    """Returns the mesh on which a command that runs whole sequences puts a trained model.

    All devices are on "fsdp": parameters are sharded over them and gathered layer by layer, and
    sequences are sharded too where the devices divide their number. One gather of a layer's
    parameters serves all tokens of a batch.

    Args:
      spec: the model's `ModelSpec`; the mesh is the same for every model.
      devices: the devices to use; None means all that jax sees.

    Returns:
      The mesh; None on one device, where nothing is sharded.
    """
    devices = list(find_devices() if devices is None else devices)
    return make_mesh({"fsdp": -1}, devices) if len(devices) > 1 else None


def for_generation(spec, devices: Sequence | None = None) -> jax.sharding.Mesh | None:
    """Returns the mesh on which a command that decodes puts a trained model.

    "tensor" gets as many devices as divide the query heads and the feed-forward width of every
    layer, "fsdp" the rest. Decoding reads every parameter for each token. On "tensor" a device
    reads the parameters that it has and sends activations of a few tokens; on "fsdp" the parameters
    themselves cross the devices for each token.

    Args:
      spec: the model's `ModelSpec`.
      devices: the devices to use; None means all that jax sees.

    Returns:
      The mesh; None on one device, where nothing is sharded.
    """
    devices = list(find_devices() if devices is None else devices)
    if len(devices) == 1:
        return None
    tensor = math.gcd(len(devices), spec.d_ff, *(layer.num_heads for layer in spec.layers))
    return make_mesh({"tensor": tensor, "fsdp": -1}, devices)
