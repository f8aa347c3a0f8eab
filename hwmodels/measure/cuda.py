"""CUDA kernels through torch: matrix products in bf16, int8 and fp8, and weight-only ones of torchao.

A CUDA graph holds several copies of a product, each with weights of its own, so that starting them costs what it costs
within a network that is run as a graph. Events around a replay time it on the device's own clock; before each replay a
buffer larger than the last cache is written over, so that weights come from the main memory.

Only linear layers are timed: torch has no convolution in int8 or fp8 on CUDA.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hwmodels.measure.shapes import CUDA_PRECISIONS, weight_bytes
from hwmodels.measure.timing import Prepared
from hwmodels.precision import Precision
from hwmodels.site import Site

BF16, INT8, FP8, INT8_WEIGHTS, INT4_WEIGHTS = (Precision.parse(name) for name in CUDA_PRECISIONS)
KERNELS = {
    BF16: "torch.mm",
    INT8: "torch._int_mm",
    FP8: "torch._scaled_mm",
    INT8_WEIGHTS: "torchao int8 weight-only",
    INT4_WEIGHTS: "torchao int4 weight-only (tinygemm)",
}
FEWEST_INT8_ROWS = 17
"""Rows that `torch._int_mm` takes at least, on CUDA."""
FEWEST_FP8 = (8, 9)
"""Compute capability from which on tensor cores multiply fp8."""

MOST_COPIES = 64
CAPTURE_WARM_UP = 3
"""Runs before the capture: libraries choose their kernels and reserve their memory in these."""


def copies(site: Site, precision: Precision, last_cache: float) -> int:
    """Copies of the product in one graph: their weights fill the last cache twice, as far as `MOST_COPIES` allows."""
    return max(2, min(MOST_COPIES, round(2 * last_cache / weight_bytes(site, precision.weight)) + 1))


def fits(site: Site, precision: Precision, capability: tuple[int, int]) -> bool:
    """Whether the kernels of a precision take a site's shape, on a device of this compute capability."""
    if site.kind != "linear" or precision not in KERNELS:
        return False
    m, n, k = site.batch, site.out_channels, site.in_channels
    if precision == INT8:
        return m >= FEWEST_INT8_ROWS and n % 8 == 0 and k % 8 == 0
    if precision == FP8:
        return n % 16 == 0 and k % 16 == 0 and capability >= FEWEST_FP8
    if precision == INT4_WEIGHTS:
        return k % 128 == 0 and n % 8 == 0 and capability >= (8, 0)
    return True


@dataclass(frozen=True)
class CudaRuntime:
    """torch on a CUDA device.

    Attributes:
        index: Number of the device.
        threads: 1: there are none to choose.
    """

    index: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                f"torch {torch.__version__} finds no CUDA device; time this CPU instead, or install a torch "
                "that is built for CUDA on a machine that has one"
            )

    @property
    def version(self) -> str:
        """The runtime with its version."""
        import torch

        return f"torch {torch.__version__}, CUDA {torch.version.cuda}"

    @property
    def name(self) -> str:
        """What the driver calls the device."""
        import torch

        return torch.cuda.get_device_name(self.index)

    def times(self, site: Site, precision: Precision) -> bool:
        """Whether there is a kernel for this site at this precision."""
        import torch

        return fits(site, precision, torch.cuda.get_device_capability(self.index))

    def prepare(self, site: Site, precision: Precision) -> Prepared:
        """Captures the graph that runs a site at a precision."""
        import torch

        last_cache = torch.cuda.get_device_properties(self.index).L2_cache_size
        count = copies(site, precision, last_cache)
        device = torch.device("cuda", self.index)
        with torch.device(device):
            calls = [operation(site, precision) for _ in range(count)]
            flushed = torch.empty(2 * last_cache, dtype=torch.uint8)
        return Prepared(precision, KERNELS[precision], False, _replay(calls, flushed), copies=count)


def operation(site: Site, precision: Precision) -> Callable[[], Any]:
    """One product with weights of its own, on torch's default device."""
    import torch

    m, n, k = site.batch, site.out_channels, site.in_channels
    if precision == BF16:
        x, weight = torch.randn(m, k, dtype=torch.bfloat16), torch.randn(n, k, dtype=torch.bfloat16)
        return lambda: torch.mm(x, weight.t())
    if precision == INT8:
        x, weight = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
        return lambda: torch._int_mm(x, weight.t())
    if precision == FP8:
        x, weight = (torch.randn(rows, k).to(torch.float8_e4m3fn) for rows in (m, n))
        one = torch.ones(())
        return lambda: torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16)
    return _weight_only(site, precision)


def _weight_only(site: Site, precision: Precision) -> Callable[[], Any]:
    """A linear layer that torchao has quantized the weights of."""
    import torch

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # on import it complains of the kernels it has not
            from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(
            "weight-only precisions need torchao; install with `pip install 'bitplan[torchao]'`"
        ) from error
    layer = torch.nn.Linear(site.in_channels, site.out_channels, bias=False, dtype=torch.bfloat16)
    if precision == INT4_WEIGHTS:
        group = precision.weight.group
        quantize_(layer, Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d"))
    else:
        quantize_(layer, Int8WeightOnlyConfig())
    x = torch.randn(site.batch, site.in_channels, dtype=torch.bfloat16)
    return lambda: layer(x)


def _replay(calls: list[Callable[[], Any]], flushed: Any) -> Callable[[], float]:
    """Captures calls in a graph; returns a function that replays it and returns the device's seconds of that."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UP):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = [call() for call in calls]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def run() -> float:
        assert kept  # the graph writes to them
        flushed.zero_()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3  # from milliseconds

    return run
