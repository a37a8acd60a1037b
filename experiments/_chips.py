"""Accelerators as their makers describe them; not an experiment.

TPUs: the pages on system architecture in Google Cloud's documentation, per chip. The
interconnect is given there for both directions together; here is what one chip can send
over all its links, half of it. H100: NVIDIA's data sheet of the SXM part, dense
arithmetic; NVLink inside a host of eight, and the DGX H100's 400 Gbit/s per GPU beyond.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """What one chip has, in bytes, operations and bytes a second.

    Attributes:
      memory: bytes of device memory.
      bfloat16: operations a second in matrix products of bfloat16.
      float32: the same for float32 at JAX's default precision, which rounds operands:
        on a TPU to bfloat16, on an H100 to TF32.
      bandwidth: bytes a second from and to that memory.
      sends: bytes a second that it sends to other chips.
      at_most: chips in the largest slice.
      in_host: chips that send so fast, where it is not all of them.
      sends_far: bytes a second to those of other hosts, then.
    """

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    sends: float
    at_most: int
    in_host: int | None = None
    sends_far: float | None = None


GB, TB, TERA = 1e9, 1e12, 1e12
CHIPS = {
    "v4": Chip(32 * GB, 275 * TERA, 275 * TERA, 1.228 * TB, 300 * GB, 4096),
    "v5e": Chip(16 * GB, 197 * TERA, 197 * TERA, 0.819 * TB, 200 * GB, 256),
    "v5p": Chip(95 * GB, 459 * TERA, 459 * TERA, 2.765 * TB, 600 * GB, 6144),
    "v6e": Chip(32 * GB, 918 * TERA, 918 * TERA, 1.638 * TB, 400 * GB, 256),
    "h100": Chip(
        *(80 * GB, 989 * TERA, 495 * TERA, 3.35 * TB, 450 * GB, 2**14),
        in_host=8,
        sends_far=50 * GB,
    ),
}
