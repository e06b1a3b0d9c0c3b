"""The device that a program is compiled for, which this machine need not have."""

from __future__ import annotations

import dataclasses

import jax

from qkvjax.parallel import rules

# Compute capability -> words in the names of NVIDIA GPUs, for GPUs that this machine does not have;
# jax knows the capability of one that it has. https://developer.nvidia.com/cuda-gpus
CAPABILITIES = {
    "7.0": ("V100",),
    "7.5": ("T4",),
    "8.0": ("A100", "A800", "A30"),
    "8.6": ("A10", "A10G", "A16", "A40", "A6000"),
    "8.9": ("L4", "L40", "L40S", "6000 Ada"),
    "9.0": ("H100", "H200", "H800", "H20", "GH200"),
    "10.0": ("B100", "B200", "GB200"),
    "10.3": ("B300", "GB300"),
    "12.0": ("RTX PRO 6000",),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: the maker's name, such as "NVIDIA H200" or "TPU v5 lite".
      capability: compute capability such as "9.0" for an NVIDIA GPU, a name such as "gfx942" for
        one of AMD; None elsewhere, and where the kind is unknown.
      here: whether this process has such a device and can run the program.
    """

    platform: str
    kind: str
    capability: str | None
    here: bool

    @property
    def major(self) -> int:
        """Returns the first number of an NVIDIA GPU's compute capability, 0 for other devices."""
        first = str(self.capability).partition(".")[0]
        return int(first) if first.isdecimal() else 0


def target() -> Target:
    """Returns the device that a program traced now is compiled for.

    With a mesh in force it is a device of the mesh; without one it is this process's first device.
    """
    first = jax.local_devices()[0]
    # Not `rules.has_mesh`, which is False inside `jax.shard_map`: the mesh decides there too.
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None or device.device_kind == first.device_kind:
        capability = getattr(first, "compute_capability", None)
        return Target(rules.platform(), first.device_kind, capability, here=True)
    kind = device.device_kind
    # A machine with an accelerator can also run programs on a mesh of its processors.
    here = rules.platform() == "cpu"
    return Target(rules.platform(), kind, capability_of(kind), here)


def capability_of(kind: str) -> str | None:
    """Returns the compute capability of an NVIDIA GPU of this kind; None where it is unknown."""
    # "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA RTX 6000 Ada Generation"
    words = f" {kind.replace('-', ' ')} "
    for capability, names in CAPABILITIES.items():
        if any(f" {name} " in words for name in names):
            return capability
    return None
