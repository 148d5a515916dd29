"""TPU slices by the names that Google Cloud gives them, and what their chips can do.

v4-N and v5p-N count TensorCores, two a chip: v5p-128 has 64 chips. v5e-N (also v5litepod-N) and
v6e-N count chips.

Sources: Google Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (peak,
HBM, topologies, chips a virtual machine, bandwidth between chips and of the data-centre network).
Of v4 these pages do not say the bandwidths: that between chips is from Jouppi et al., "TPU v4: An
optically reconfigurable supercomputer" (2023), table 4, six links of 50 GB/s; that of the network
is taken to be v5p's.
"""

import dataclasses
import math

from scaling_jax.errors import UserError, nearest

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip.

    Attributes:
      name: v4, v5e, v5p or v6e.
      hbm_bytes: its memory.
      peak_flops: dense bfloat16 operations a second.
      axis_bandwidth: bytes a second that it sends to its neighbours along one axis of the torus,
        both ways together.
      network_bandwidth: bytes a second that it sends to other slices.
      cores_counted: what a slice's name counts for each chip.
    """

    name: str
    hbm_bytes: int
    peak_flops: float
    axis_bandwidth: float
    network_bandwidth: float
    cores_counted: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """`chips` in a `topology`, on `hosts` virtual machines with one process each."""

    name: str
    chip: Chip
    topology: tuple[int, ...]
    hosts: int

    @property
    def chips(self) -> int:
        """How many chips it has."""
        return math.prod(self.topology)

    @property
    def chips_per_host(self) -> int:
        """How many chips one virtual machine has."""
        return self.chips // self.hosts

    @property
    def shape(self) -> str:
        """Its topology as 4x4x8."""
        return "x".join(map(str, self.topology))


# The documentation gives the traffic of all links in both directions: 400 GB/s of v5e are 200 each
# way over a torus of two axes.
_V4 = Chip("v4", 32 * GIB, 275e12, 300e9 / 3, 6.25e9, 2)
_V5E = Chip("v5e", 16 * GIB, 197e12, 200e9 / 2, 3.125e9, 1)
_V5P = Chip("v5p", 95 * GIB, 459e12, 600e9 / 3, 6.25e9, 2)
_V6E = Chip("v6e", 32 * GIB, 918e12, 400e9 / 2, 12.5e9, 1)

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 16), (8, 16, 16)),
)
_TOPOLOGIES = {
    _V4: (*_DEEP, (12, 16, 16), (16, 16, 16)),
    _V5E: _FLAT,
    _V5P: (*_DEEP, (16, 16, 16), (16, 16, 24)),
    _V6E: _FLAT,
}
# What the service itself calls v5e in the names of slices.
_OTHER_NAMES = {"v5litepod": "v5e"}


def _slice(chip: Chip, topology: tuple[int, ...]) -> Slice:
    chips = math.prod(topology)
    # Only slices of one machine have machines with other than four chips.
    return Slice(
        f"{chip.name}-{chips * chip.cores_counted}",
        chip,
        topology,
        hosts=1 if chips <= 8 and len(topology) == 2 else chips // 4,
    )


SLICES = {
    made.name: made
    for chip, topologies in _TOPOLOGIES.items()
    for made in (_slice(chip, topology) for topology in topologies)
}


def find(name: str) -> Slice:
    """The slice of a name such as v5p-128.

    Raises:
      UserError: there is none; the nearest by name or size is given.
    """
    kind, _, count = name.strip().lower().partition("-")
    kind = _OTHER_NAMES.get(kind, kind)
    if found := SLICES.get(f"{kind}-{count}"):
        return found
    same = [each for each in SLICES.values() if each.chip.name == kind]
    if not same or not count.isdecimal():
        raise UserError(f"slice '{name}': no such TPU slice ({nearest(name, SLICES)})")
    counted = same[0].chip.cores_counted
    wanted = int(count)
    closest = min(same, key=lambda each: abs(math.log(each.chips * counted / max(wanted, 1))))
    unit = "TensorCores, two a chip" if counted == 2 else "chips"
    raise UserError(
        f"slice '{name}': {kind} comes in no slice of {wanted} (names count {unit}); "
        f"did you mean '{closest.name}'?"
    )
