"""CPU kernels through ONNX Runtime: graphs of copies of one operation, optimised and run as a network's would be.

A run holds several copies of the operation, each with weights of its own, so many that together they exceed the last
cache where time allows: weights come from where they would in a network that is larger than the cache. All copies read
one input, which stays in the cache, as do outputs, whose memory is used again. A tail behind each copy hands on a
single value of its output (of a convolution with a pooling that keeps the kernel's own memory layout, so that no copy
pays for changing it), and a frame of tails alone is timed as well and subtracted, so that what is left is the kernel
and what the runtime takes to start it.

Integers go around the operation as they do within a network: QDQ form, uint8 inputs and outputs, int8 weights with a
scale per channel, int32 bias. That the runtime then made the integer kernel of it is read from the graph it optimised.
Where the next reader wants floats there is nothing to quantize behind the operation, and the runtime may have no
integer kernel for that: such outputs are timed into a table of their own.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from hwmodels.lookup import FLOAT_OUTPUTS
from hwmodels.measure.graphs import INT8, Graph, build, build_frame, is_nbits
from hwmodels.measure.shapes import TIMED_KINDS, weight_bytes
from hwmodels.measure.timing import Prepared
from hwmodels.precision import FLOAT_PRECISION, Precision
from hwmodels.site import Site

Outputs = Literal["integers", "floats"]

PACKED_IN_FLOAT = (4,)
"""Weight widths with a `MatMulNBits` kernel in float (accuracy level 0); others are unpacked before every product."""
KERNELS = {
    "float": ("Conv", "FusedConv", "Gemm", "FusedGemm"),
    "int8": ("QLinearConv", "QGemm", "MatMulIntegerToFloat"),
    "nbits": ("MatMulNBits",),
}
"""Operations of the optimised graph that are a precision's own."""
AROUND = {
    *("Concat", "Slice", "MaxPool", "NhwcMaxPool", "ReorderInput", "ReorderOutput", "Transpose"),
    *("QuantizeLinear", "DequantizeLinear", "Cast", "Reshape"),
}
"""What is around a kernel and not reported as one."""

LAST_CACHE = 32 << 20
"""Bytes that weights are rotated past, unless told otherwise."""
PAST = 1.1
"""How many times the last cache all copies' weights fill: read in turn, none is still there when its turn comes."""
MOST_COPIES = 128
PROBED = 2
"""Copies of the graph that is looked at for its kernels: as many as the fewest that are timed."""
RUN_SECONDS = 0.01
"""About how long a run of all copies may take."""
GUESSED_RATE = 100e9
"""Operations per second that this is guessed with: the number of copies must not depend on the machine's mood."""


def copies(site: Site, precision: Precision, last_cache: float = LAST_CACHE) -> int:
    """Copies of the operation in one run: past the last cache, as far as `RUN_SECONDS` and `MOST_COPIES` allow."""
    wanted = PAST * last_cache / weight_bytes(site, precision.weight)
    affordable = RUN_SECONDS * GUESSED_RATE / (2 * site.macs)
    return round(max(float(PROBED), min(wanted + 1, affordable, MOST_COPIES)))


@dataclass(frozen=True)
class OrtRuntime:
    """ONNX Runtime on this machine's CPU.

    Attributes:
        threads: Threads of an operation.
        last_cache: Bytes of the last cache, which weights are rotated past.
        may_spin: Whether threads wait for work in a loop, as is the runtime's default.
        accuracy_level: Of `MatMulNBits`: 4 lets it quantize its inputs to int8 in blocks as it goes, which is what the
            runtime chooses where it makes one of `DequantizeLinear` and `MatMul` itself; 0 computes in float.
        outputs: What operations that read integers leave: `integers`, as within a chain of such; or `floats`, as where
            a sum, a normalisation or the network's end follows. All others leave floats anyway and are not timed again.
    """

    threads: int = 1
    last_cache: float = LAST_CACHE
    may_spin: bool = True
    accuracy_level: int = 4
    outputs: Outputs = "integers"

    @property
    def version(self) -> str:
        """The runtime with its version."""
        import onnxruntime

        level = "" if self.accuracy_level == 4 else f", accuracy_level={self.accuracy_level}"
        outputs = FLOAT_OUTPUTS if self.leaves_floats else ""
        return f"onnxruntime {onnxruntime.__version__}{level}{outputs}"

    @property
    def leaves_floats(self) -> bool:
        """Whether operations that read integers leave floats."""
        return self.outputs == "floats"

    def times(self, site: Site, precision: Precision) -> bool:
        """Whether this kind of layer has kernels for the precision, or a fallback worth knowing."""
        if site.kind not in TIMED_KINDS:
            return False
        if self.leaves_floats:
            return precision == INT8
        return precision in (FLOAT_PRECISION, INT8) or (is_nbits(precision) and site.kind == "linear")

    def prepare(self, site: Site, precision: Precision) -> Prepared:
        """Builds, optimises and loads what runs a site at a precision."""
        count = copies(site, precision, self.last_cache)
        draw = partial(build, site, precision, accuracy_level=self.accuracy_level, leaves_floats=self.leaves_floats)
        found = self.optimized(draw(count=PROBED))
        kernel, is_fallback = name_kernel(found, precision, PROBED, self.accuracy_level)
        run = self.runner(draw(count=count))
        frame = self.runner(build_frame(site, precision, count, self.leaves_floats))
        return Prepared(precision, kernel, is_fallback, run, frame, count)

    def optimized(self, graph: Graph) -> Counter[str]:
        """Operations of the graph that the runtime makes of one, with their domain, and how many there are of each."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "optimized.onnx"
            self._session(graph, path)
            nodes = onnx.load(path).graph.node
        return Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in nodes)

    def runner(self, graph: Graph, is_optimized: bool = True) -> Callable[[], float]:
        """A function that runs a graph, as optimised or as drawn, and returns the seconds of that."""
        import onnxruntime

        session = self._session(graph, is_optimized=is_optimized)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(graph.feed))
        binding.bind_output("y", "cpu")

        def run() -> float:
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            return time.perf_counter() - started

        return run

    def _session(self, graph: Graph, optimized: Path | None = None, is_optimized: bool = True) -> Any:
        """Loads a graph; writes what it was optimised to, where that is asked for."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # that a graph optimised for this very machine was saved is no reason to warn
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.may_spin)))
        # Sessions take turns: one that has run must not keep the cores busy while the next one is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not is_optimized:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        return onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])


def name_kernel(
    operations: Counter[str], precision: Precision, count: int, accuracy_level: int = 4
) -> tuple[str, bool]:
    """Names what runs the `count` copies in an optimised graph, and says whether it is a fallback.

    Args:
        operations: Operations of the optimised graph, with their domain, and how many there are of each.
        precision: The precision.
        count: Copies of the operation.
        accuracy_level: That of `MatMulNBits`.
    """
    family = "nbits" if is_nbits(precision) else "int8" if precision == INT8 else "float"
    own = [name for name in operations if name.rpartition(".")[2] in KERNELS[family]]
    if sum(operations[name] for name in own) < count:
        found = sorted(name for name in operations if name.rpartition(".")[2] not in AROUND)
        turned = ["DequantizeLinear"] if family == "int8" and operations["DequantizeLinear"] >= count else []
        return " + ".join([*turned, *found]), True
    kernel = " + ".join(own)
    if family != "nbits":
        return kernel, False
    is_unpacked = accuracy_level == 0 and precision.weight.bits not in PACKED_IN_FLOAT
    unpacked = ", weights unpacked before every product" if is_unpacked else ""
    return f"{kernel} accuracy_level={accuracy_level}{unpacked}", is_unpacked
