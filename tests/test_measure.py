"""Timed kernels: percentiles, turns, the clock, and graphs that compute what they should by the kernels they should."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from hwmodels import Layer, Precision, Site, Workload
from hwmodels.measure import clock, cuda, graphs, ort, timing
from hwmodels.measure.shapes import (
    CUDA_PRECISIONS,
    PRECISIONS,
    conv_site,
    default_sites,
    layer_of,
    network_sites,
    parse_precisions,
    spread,
    weight_bytes,
)
from hwmodels.measure.timing import Prepared, interleave, measure, percentiles

pytest.importorskip("onnxruntime")

FLOAT, INT8 = Precision(), Precision.parse("int8/uint8")
NBITS = [Precision.parse(name) for name in PRECISIONS if "-g" in name]
CONVOLUTIONS = {
    "3x3": conv_site(32, 16, 3, 14, 1),
    "1x1": conv_site(24, 16, 1, 7, 1),
    "strided": conv_site(16, 16, 3, 9, 2),
    "depthwise": conv_site(32, 32, 3, 14, 1, groups=32),
    "one channel": conv_site(16, 1, 3, 8, 1),
    "no padding": Site("conv2d", 1, 16, 16, (5, 5), (1, 1), 1, (14, 14), (10, 10)),
    "1d": Site("conv1d", 2, 8, 16, (3,), (1,), 1, (20,), (20,)),
}
LINEAR = {"one row": Site("linear", 1, 64, 32), "rows": Site("linear", 5, 256, 48)}


def prepared(run: Callable[[], float], frame: Callable[[], float] | None = None, copies: int = 1) -> Prepared:
    return Prepared(FLOAT, "kernel", False, run, frame, copies)


# Turns and percentiles


def test_every_round_runs_each_once_in_order() -> None:
    order: list[str] = []

    def run(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 1.0  # type: ignore[func-returns-value]

    interleave([run("a"), run("b"), run("c")], samples=4)
    assert order[: 3 * 6] == list("abc") * 6  # two rounds to warm up


def test_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "preemptions", lambda: 0)
    numbers = iter(range(100))
    (seconds,) = interleave([lambda: float(next(numbers))], samples=3)
    assert seconds.tolist() == [timing.WARM_UP + number for number in range(3)]


def test_runs_that_were_interrupted_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def run() -> float:
        nonlocal count
        count += 1
        return 100.0 if count % 2 else 1.0

    interrupted = 0

    def preemptions() -> int:
        nonlocal interrupted
        interrupted += count % 2
        return interrupted

    monkeypatch.setattr(timing, "preemptions", preemptions)
    (seconds,) = interleave([run], samples=5)
    assert seconds.tolist() == [1.0] * 5


def test_all_runs_count_where_too_few_were_undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    always = iter(range(1000))
    monkeypatch.setattr(timing, "preemptions", lambda: next(always))
    (seconds,) = interleave([lambda: 1.0], samples=5)
    assert len(seconds) == timing.PATIENCE * 5


def test_percentiles_are_those_of_sorted_runs() -> None:
    seconds = np.random.default_rng(0).permutation(np.arange(1.0, 102.0))
    found = percentiles(seconds)
    assert found is not None
    assert (found.p20, found.p50, found.p80, found.samples) == (21.0, 51.0, 81.0, 101)


def test_the_frame_is_subtracted_and_copies_share_the_rest() -> None:
    (found,) = measure([prepared(lambda: 10.0, lambda: 2.0, copies=4)], samples=3)
    assert found is not None
    assert found.p50 == 2.0


def test_what_is_not_longer_than_its_frame_has_no_time() -> None:
    assert measure([prepared(lambda: 1.0, lambda: 1.0), prepared(lambda: 1.0)], samples=3)[0] is None


def test_more_cores_than_there_are_cannot_be_pinned() -> None:
    with pytest.raises(ValueError, match="cores"), timing.pinned(10_000):
        pass


def test_the_clock_is_plausible_or_unknown() -> None:
    hertz = clock.clock_hz()
    assert math.isnan(hertz) or 1e8 < hertz < 1e10


def test_the_chain_jumps_back_to_its_first_addition() -> None:
    code = clock.chain_code()
    assert code[7:10] == b"\x48\x01\xc8"
    jump = int.from_bytes(code[-5:-1], "little", signed=True)
    assert len(code) - 1 + jump == 7


# Shapes


def test_the_default_sites_are_about_95_and_different() -> None:
    sites = default_sites()
    assert len(sites) == len(set(sites))
    assert 90 <= len(sites) <= 100
    assert {site.kind for site in sites} == {"conv2d", "linear"}
    assert any(site.is_depthwise for site in sites)
    assert {site.batch for site in sites if site.kind == "linear"} == {1, 4, 16, 64, 256}


@pytest.mark.parametrize("count", [1, 5, 80, 1000])
def test_a_spread_is_evenly_taken(count: int) -> None:
    sites = default_sites()
    found = spread(sites, count)
    places = [sites.index(site) for site in found]
    assert len(found) == min(count, len(sites))
    assert places == sorted(places)
    assert len(places) < 2 or max(np.diff(places)) - min(np.diff(places)) <= 1


def test_a_spread_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        spread(default_sites(), 0)


def test_a_layer_of_a_site_has_that_site() -> None:
    for site in default_sites():
        if site.kind == "conv2d":
            assert Site.of(layer_of(site), Workload()) == site
        assert layer_of(site).weight_count == site.weight_values


def test_packed_weights_count_their_scales() -> None:
    site = Site("linear", 1, 256, 100)
    assert weight_bytes(site, Precision.parse("int4-g32").weight) == 256 * 100 / 2 + 4 * 100 * 8


def test_a_networks_equal_layers_are_one_site() -> None:
    layers = [layer_of(site) for site in (CONVOLUTIONS["3x3"], LINEAR["one row"], CONVOLUTIONS["3x3"])]
    token_lookup = Layer("look-up", "embedding", weight_shape=(10, 8), output_shape=(1, 4, 8))
    found = network_sites([*layers, token_lookup], Workload(batch=3))
    assert found == (replace(CONVOLUTIONS["3x3"], batch=3), replace(LINEAR["one row"], batch=3))


@pytest.mark.parametrize(
    ("name", "closest"), [("int8/uint9", "int8/uint8"), ("int4-g33", "int4-g32"), ("flaot", "float")]
)
def test_a_precision_that_is_not_timed_is_named_with_the_closest(name: str, closest: str) -> None:
    with pytest.raises(ValueError, match=f"no kernel is timed for '{name}'; did you mean '{closest}'"):
        parse_precisions([name], PRECISIONS)


# Graphs


def reference(site: Site, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if site.kind == "linear":
        return functional.linear(x, weight, bias)
    padding = [
        (out - 1) * stride + kernel - size
        for out, stride, kernel, size in zip(site.out_size, site.stride, site.kernel, site.in_size, strict=True)
    ]
    both = [part for pad in reversed(padding) for part in (pad // 2, pad - pad // 2)]
    convolve = functional.conv1d if site.kind == "conv1d" else functional.conv2d
    return convolve(functional.pad(x, both), weight, bias, stride=site.stride, groups=site.groups)


def constants(graph: graphs.Graph) -> dict[str, np.ndarray]:
    import onnx
    from onnx import numpy_helper

    return {one.name: numpy_helper.to_array(one) for one in onnx.ModelProto.FromString(graph.model).graph.initializer}


def outputs(graph: graphs.Graph) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"x": graph.feed}))


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *LINEAR])
def test_float_copies_compute_the_layer(name: str) -> None:
    site = (CONVOLUTIONS | LINEAR)[name]
    graph = graphs.build(site, FLOAT, 2, has_tails=False)
    known = constants(graph)
    for number, found in enumerate(outputs(graph)):
        weight, bias = (torch.tensor(known[f"{part}{number}"]) for part in ("w", "b"))
        expected = reference(site, torch.tensor(graph.feed), weight, bias)
        assert found.shape == (site.batch, site.out_channels, *site.out_size)
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-3)
    assert not np.array_equal(known["w0"], known["w1"])


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *LINEAR])
def test_integer_copies_compute_the_quantized_layer(name: str) -> None:
    site = (CONVOLUTIONS | LINEAR)[name]
    graph = graphs.build(site, INT8, 2, has_tails=False)
    known = constants(graph)
    x = (torch.tensor(graph.feed).double() - 128) * float(graphs.X_SCALE)
    for number, found in enumerate(outputs(graph)):
        weight = torch.tensor(known[f"w{number}"]).double() * float(graphs.WEIGHT_SCALE)
        bias = torch.tensor(known[f"b{number}"]).double() * float(graphs.X_SCALE * graphs.WEIGHT_SCALE)
        scaled = reference(site, x, weight, bias) / float(known["y_scale"])
        expected = torch.clamp(torch.round(scaled) + 128, 0, 255)
        assert found.dtype == np.uint8
        assert np.abs(found.astype(int) - expected.numpy()).max() <= 1
        assert 20 < found.std() < 100  # neither all the same nor all at the ends


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *LINEAR])
def test_integer_copies_may_leave_floats(name: str) -> None:
    site = (CONVOLUTIONS | LINEAR)[name]
    graph = graphs.build(site, INT8, 2, has_tails=False, leaves_floats=True)
    known = constants(graph)
    x = (torch.tensor(graph.feed).double() - 128) * float(graphs.X_SCALE)
    for number, found in enumerate(outputs(graph)):
        weight = torch.tensor(known[f"w{number}"]).double() * float(graphs.WEIGHT_SCALE)
        bias = torch.tensor(known[f"b{number}"]).double() * float(graphs.X_SCALE * graphs.WEIGHT_SCALE)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, reference(site, x, weight, bias).numpy(), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("precision", NBITS, ids=str)
@pytest.mark.parametrize("level", [0, 4])
def test_packed_copies_compute_the_layer(precision: Precision, level: int) -> None:
    site, format = LINEAR["rows"], precision.weight
    graph = graphs.build(site, precision, 2, level, has_tails=False)
    known = constants(graph)
    for number, found in enumerate(outputs(graph)):
        packed = known[f"w{number}"].reshape(site.out_channels, -1)
        fields = [(packed >> shift) & ((1 << format.bits) - 1) for shift in range(0, 8, format.bits)]
        codes = np.stack(fields, axis=-1).reshape(site.out_channels, -1)[:, : site.in_channels].astype(float)
        scales = np.repeat(known[f"w_scale{number}"], format.group, axis=1)[:, : site.in_channels]
        expected = graph.feed @ ((codes - (1 << (format.bits - 1))) * scales).T
        tolerance = 1e-5 if level == 0 else 0.02  # inputs in 8 bits
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *LINEAR])
def test_integer_kernels_run_in_the_optimised_graph(name: str) -> None:
    site = (CONVOLUTIONS | LINEAR)[name]
    operations = ort.OrtRuntime().optimized(graphs.build(site, INT8, 2))
    kernel, is_fallback = ort.name_kernel(operations, INT8, 2)
    assert not is_fallback
    assert kernel.endswith("QGemm" if site.kind == "linear" else "QLinearConv")


def test_float_and_packed_kernels_run_in_the_optimised_graph() -> None:
    runtime = ort.OrtRuntime()
    conv = ort.name_kernel(runtime.optimized(graphs.build(CONVOLUTIONS["3x3"], FLOAT, 2)), FLOAT, 2)
    assert conv[0].endswith("Conv")
    assert not conv[1]
    operations = runtime.optimized(graphs.build(LINEAR["rows"], NBITS[0], 2))
    assert ort.name_kernel(operations, NBITS[0], 2) == ("com.microsoft.MatMulNBits accuracy_level=4", False)


def test_what_was_not_fused_is_a_fallback_by_the_name_of_what_runs() -> None:
    left = Counter({"DequantizeLinear": 4, "Conv": 2, "QuantizeLinear": 2, "Concat": 1})
    assert ort.name_kernel(left, INT8, 2) == ("DequantizeLinear + Conv", True)
    half = Counter({"com.microsoft.QLinearConv": 1, "Conv": 1})
    assert ort.name_kernel(half, INT8, 2) == ("Conv + com.microsoft.QLinearConv", True)


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *LINEAR])
def test_with_float_outputs_only_products_keep_integer_kernels(name: str) -> None:
    site = (CONVOLUTIONS | LINEAR)[name]
    prepared = ort.OrtRuntime(outputs="floats").prepare(site, INT8)
    assert prepared.is_fallback == bool(site.kernel)
    assert ("DequantizeLinear + Conv" if site.kernel else "QGemm") in prepared.kernel
    assert prepared.run() > 0
    assert prepared.frame is not None
    assert prepared.frame() > 0


def test_float_outputs_are_a_table_of_their_own_and_only_of_integers() -> None:
    runtime = ort.OrtRuntime(outputs="floats")
    assert runtime.version.endswith(", float outputs")
    assert runtime.times(LINEAR["rows"], INT8)
    assert not runtime.times(LINEAR["rows"], FLOAT)


@pytest.mark.parametrize(("name", "is_unpacked"), [("int4-g32", False), ("int8-g32", True), ("int2-g128", True)])
def test_only_4_bits_have_a_packed_kernel_for_floats(name: str, is_unpacked: bool) -> None:
    operations = Counter({"com.microsoft.MatMulNBits": 2})
    kernel, is_fallback = ort.name_kernel(operations, Precision.parse(name), 2, accuracy_level=0)
    assert is_fallback == is_unpacked
    assert ("unpacked" in kernel) == is_unpacked


@pytest.mark.parametrize("precision", [FLOAT, INT8], ids=str)
def test_a_run_does_everything_the_frame_does(precision: Precision) -> None:
    """The frame's operations are those around the copies, in as many copies."""
    runtime, site = ort.OrtRuntime(), CONVOLUTIONS["3x3"]
    whole, frame = (runtime.optimized(graph(site, precision, 4)) for graph in (graphs.build, graphs.build_frame))
    around = Counter({name: count for name, count in whole.items() if name.rpartition(".")[2] in ort.AROUND})
    assert around == frame
    assert sum(frame[name] for name in frame if name.endswith("MaxPool")) == 4


def test_a_linear_frame_has_a_tail_per_copy() -> None:
    assert ort.OrtRuntime().optimized(graphs.build_frame(LINEAR["rows"], FLOAT, 4))["Slice"] == 4


def test_weights_are_rotated_past_the_last_cache() -> None:
    site = Site("linear", 1, 1024, 1024)
    for name in PRECISIONS:
        precision = Precision.parse(name)
        assert ort.copies(site, precision) * weight_bytes(site, precision.weight) > ort.LAST_CACHE


def test_long_runs_have_few_copies_and_never_one() -> None:
    assert ort.copies(Site("linear", 256, 4096, 4096), INT8) == 2
    assert ort.copies(conv_site(16, 16, 1, 7, 1), FLOAT) == ort.MOST_COPIES


def test_only_kinds_with_kernels_are_timed() -> None:
    runtime = ort.OrtRuntime()
    assert runtime.times(CONVOLUTIONS["3x3"], INT8)
    assert not runtime.times(CONVOLUTIONS["3x3"], NBITS[0])
    assert runtime.times(LINEAR["rows"], NBITS[0])
    assert not runtime.times(LINEAR["rows"], Precision.parse("int4/uint8"))
    assert not runtime.times(Site("embedding", 1, 1, 8), FLOAT)


def test_a_site_is_timed_at_all_precisions() -> None:
    runtime = ort.OrtRuntime()
    with timing.pinned(1):
        candidates = [runtime.prepare(LINEAR["rows"], precision) for precision in (FLOAT, INT8, NBITS[0])]
        found = measure(candidates, samples=3)
    assert all(one is None or 0 < one.p20 <= one.p50 <= one.p80 for one in found)


# CUDA: what can be said without a device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_error_says_so() -> None:
    with pytest.raises(ValueError, match="finds no CUDA device"):
        cuda.CudaRuntime()


def test_cuda_kernels_take_the_shapes_they_take() -> None:
    bf16, int8, fp8, int8_weights, int4_weights = (Precision.parse(name) for name in CUDA_PRECISIONS)
    rows, row, odd = Site("linear", 64, 1024, 512), Site("linear", 1, 1024, 512), Site("linear", 64, 1000, 10)
    hopper, ampere = (9, 0), (8, 0)
    assert all(cuda.fits(rows, precision, hopper) for precision in (bf16, int8, fp8, int8_weights, int4_weights))
    assert not cuda.fits(row, int8, hopper)
    assert cuda.fits(row, bf16, hopper)
    assert not cuda.fits(rows, fp8, ampere)
    assert not any(cuda.fits(odd, precision, hopper) for precision in (int8, fp8, int4_weights))
    assert not cuda.fits(CONVOLUTIONS["3x3"], bf16, hopper)
    assert not cuda.fits(rows, FLOAT, hopper)


def test_cuda_copies_fill_the_last_cache_twice() -> None:
    site, bf16 = Site("linear", 1, 4096, 4096), Precision.parse("bf16/bf16")
    assert cuda.copies(site, bf16, 50e6) * weight_bytes(site, bf16.weight) >= 2 * 50e6
    assert cuda.copies(Site("linear", 1, 64, 64), bf16, 50e6) == cuda.MOST_COPIES


@pytest.mark.parametrize("name", ["bf16/bf16", "int8/int8"])
def test_cuda_operations_multiply_rows_by_weights(name: str) -> None:
    assert cuda.operation(Site("linear", 32, 64, 48), Precision.parse(name))().shape == (32, 48)
