"""Peak activation bytes by liveness, against walking through the steps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import Layer, Network, Operation, Precision, Tensor
from hwmodels.memory import liveness_cuts, peak_activation_bytes, stored_bits

INT8 = Precision.parse("int8/uint8")
INT4 = Precision.parse("int4/uint4")


def residual() -> Network:
    """input -> a -> b, then add(a, b), then head; the skip keeps a's output alive past b."""
    layers = tuple(
        Layer(name, "linear", (read,), (name,), weight_shape=(8, 8))
        for name, read in (("a", "input"), ("b", "a"), ("head", "add"))
    )
    tensors = {
        "input": Tensor("input", (1, 100), None, ("a",)),
        "a": Tensor("a", (1, 80), "a", ("b", "add")),
        "b": Tensor("b", (1, 80), "b", ("add",)),
        "add": Tensor("add", (1, 80), "add", ("head",)),
        "head": Tensor("head", (1, 5), "head"),
    }
    add = Operation("add", "add", ("a", "b"), ("add",))
    return Network(layers, (add,), tensors, 0, ("a", "b", "add", "head"), ("head",))


def test_a_tensor_is_as_wide_as_its_widest_reader() -> None:
    policy = {"a": INT8, "b": INT4, "head": INT4}
    assert stored_bits(residual(), policy) == {"input": 8, "a": 32, "b": 32, "add": 4, "head": 32}


def test_the_skip_connection_sets_the_peak() -> None:
    policy = {"a": INT8, "b": INT4, "head": INT4}
    steps = {"a": 100 + 320, "b": 320 + 320, "add": 320 + 320 + 40, "head": 40 + 20}
    assert peak_activation_bytes(residual(), policy) == max(steps.values())


def test_outputs_live_to_the_end() -> None:
    network = residual()
    kept = Network(network.layers, network.operations, network.tensors, 0, network.order, ("a", "head"))
    policy = dict.fromkeys(network.names, INT8)
    assert peak_activation_bytes(kept, policy) == 320 + 320 + 80
    assert peak_activation_bytes(network, policy) == 320 + 320 + 80
    alone = Network(network.layers, network.operations, network.tensors, 0, network.order, ("input", "head"))
    assert peak_activation_bytes(alone, policy) == 320 + 320 + 80 + 100


def test_cuts_are_the_steps_that_can_be_the_peak() -> None:
    assert liveness_cuts(residual()) == (("input", "a"), ("a", "b", "add"), ("add", "head"))


def test_a_network_without_an_order_holds_everything_at_once() -> None:
    network = residual()
    assert peak_activation_bytes(Network(network.layers, tensors=network.tensors), {}) == (100 + 3 * 80 + 5) * 4
    assert peak_activation_bytes(Network(()), {}) == 0.0


sizes = st.lists(st.integers(1, 50), min_size=2, max_size=8)


@given(sizes, st.data())
def test_liveness_is_what_walking_the_steps_finds(values: list[int], data: st.DataObject) -> None:
    count = len(values)
    order = tuple(f"op{step}" for step in range(1, count))
    tensors = {}
    for index, size in enumerate(values):
        readers = data.draw(st.sets(st.integers(index + 1, count - 1))) if index + 1 < count else set()
        consumers = tuple(f"op{reader}" for reader in sorted(readers))
        tensors[f"t{index}"] = Tensor(f"t{index}", (1, size), f"op{index}" if index else None, consumers)
    network = Network((), tuple(Operation(name, "add") for name in order), tensors, 0, order, (f"t{count - 1}",))

    def alive(tensor: Tensor, step: int) -> bool:
        born = order.index(tensor.producer) if tensor.producer else 0
        last = max([order.index(name) for name in tensor.consumers], default=born)
        return born <= step <= (count - 2 if tensor.name in network.outputs else last)

    walked = [sum(t.values * 4 for t in tensors.values() if alive(t, step)) for step in range(len(order))]
    assert peak_activation_bytes(network, {}) == pytest.approx(max(walked))
    cuts = [set(cut) for cut in liveness_cuts(network)]
    together = [{name for name, tensor in tensors.items() if alive(tensor, step)} for step in range(len(order))]
    largest = [one for one in together if not any(one < other for other in together)]
    assert {frozenset(cut) for cut in cuts} == {frozenset(one) for one in largest}
    assert not any(one < other or (one == other and one is not other) for one in cuts for other in cuts)
