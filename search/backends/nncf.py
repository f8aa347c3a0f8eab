"""The nncf backend: the calls of NNCF that give each layer its bits, one for every precision.

NNCF 3.4 takes no map from layers to bits. `compress_weights` has one precision and an ignored scope, and compresses a
network that it compressed before, so that calls which each ignore all layers but their own add up to a mixed network;
`quantize`, called last, puts 8 bits on weights and inputs alike. Layers are named in the graph that NNCF traces of a
PyTorch model: `block/qkv/linear/0`, see `NodeNames`.

What NNCF has: int4 and uint4 by channel or by groups of inputs for linear layers and embeddings; int8 and uint8 by
channel for them and for convolutions; int8/uint8 through `quantize`. It finds all scales itself, and its symmetric
formats use the most negative code. (`quantization/quantize_model.py`, `quantization/algorithms/weight_compression/`)
"""

from __future__ import annotations

import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.overrides import TorchFunctionMode

from hwmodels import Format, Layer, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.backends.artifact import check_folder
from search.backends.base import Emitter
from search.backends.outcome import Fidelity, LayerExport
from search.errors import DataError, UnsupportedError
from search.files import write_json
from search.kinds import MODULE_KINDS
from search.plan import Plan
from search.quality.evaluate import batch_scores
from search.quantize.simulate import QuantizedModel, exact_inference
from search.quiet import quietly
from search.tasks.task import Task, call
from search.trace import parameter_of, shared_parameters

FILE = "nncf.json"
GROUPED = ("linear", "embedding")
FUNCTIONS = frozenset(MODULE_KINDS.values())
"""torch's functions that layers call: named as their kinds are."""
FOUND = "NNCF finds the scales itself"
STATIC = Precision.parse("int8/uint8")
PASSING = {"PTReshapeMetatype", "PTTransposeMetatype", "PTMaxPool2dMetatype", "PTNoopMetatype", "PTDropoutMetatype"}
"""Operations through which NNCF moves a quantizer up, since they keep values."""
MODES = {"int4": "int4_sym", "uint4": "int4_asym", "int8": "int8_sym", "uint8": "int8_asym"}
"""NNCF's name of a weight's format: `nncf.CompressWeightsMode`."""


class Scope(BaseModel):
    """Names of nodes that a call leaves alone, exact ones: fields of `nncf.IgnoredScope`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    names: tuple[str, ...]


class CompressWeights(BaseModel):
    """Arguments of `nncf.compress_weights`; those of 4 bits come with the ones that keep NNCF from choosing layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: Literal["compress_weights"] = "compress_weights"
    mode: Literal["int4_sym", "int4_asym", "int8_sym", "int8_asym"]
    ignored_scope: Scope
    group_size: int | None = None
    all_layers: Literal[True] | None = None
    ratio: Literal[1] | None = None
    backup_mode: Literal["none"] | None = None

    @property
    def precision(self) -> Precision:
        """The precision of the layers that the call reaches."""
        format = Format.parse(next(name for name, mode in MODES.items() if mode == self.mode))
        if (self.group_size or -1) > 0:
            format = replace(format, granularity="group", group=self.group_size or 0)
        return Precision(format)


class Quantize(BaseModel):
    """Arguments of `nncf.quantize`; biases stay as the plan's repairs left them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: Literal["quantize"] = "quantize"
    ignored_scope: Scope
    preset: Literal["mixed"] = "mixed"
    disable_bias_correction: Literal[True] = True

    @property
    def precision(self) -> Precision:
        """The precision of the layers that the call reaches."""
        return STATIC


class Calls(BaseModel):
    """The file: the nodes of every layer, and the calls in their order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["bitplan-nncf/1"] = "bitplan-nncf/1"
    nodes: dict[str, tuple[str, ...]]
    calls: tuple[CompressWeights | Quantize, ...]

    @property
    def precisions(self) -> dict[str, Precision]:
        """The precision of every layer that a call reaches."""
        found: dict[str, Precision] = {}
        for one in self.calls:
            ignored = set(one.ignored_scope.names)
            for layer, nodes in self.nodes.items():
                if nodes and not ignored.intersection(nodes):
                    if layer in found:
                        raise DataError(f"{FILE} quantizes layer {layer} twice")
                    found[layer] = one.precision
        return found


class NNCF(Emitter):
    """Writes `nncf.json`; `quantize` applies it."""

    name = "nncf"
    proof = "validated"
    reason = "NNCF applies it, and every layer has the bits it says; NNCF finds the ranges"
    ranges = "own"
    packages = ("nncf",)
    usage = """
    import search; from pathlib import Path
    from search.backends.nncf import quantize
    model = quantize(search.Plan.load("plan.json"), float_model, Path("this folder"), calibration_inputs)
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Weights get 4 or 8 bits; an input gets 8 beside a weight of 8, and stays in float otherwise."""
        return exported_layer(layer, precision)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes nodes and calls."""
        layers = [exported_layer(plan.network[name], precision) for name, precision in plan.policy.items()]
        runs = {layer.name: Precision.parse(layer.runs or layer.precision) for layer in layers}
        simulated = plan.simulate(task.model)
        simulated.apply({})
        for first, *others in shared_parameters(simulated.model, plan.network):
            if other := next((name for name in others if runs[name] != runs[first]), None):
                raise UnsupportedError(
                    f"nncf stores the weight that {first} and {other} share once, and it would run {runs[first]} and "
                    f"{runs[other]}; give both the same weight format and inputs in float"
                )
        nodes = node_names(simulated, task.example_input)
        found = Calls(nodes=nodes, calls=calls_for(runs, nodes))
        write_json(folder / FILE, found.model_dump(mode="json", exclude_none=True))
        return layers

    def read(self, folder: Path) -> Mapping[str, Precision]:
        """Reads what the calls make of the layers."""
        return read_calls(folder).precisions

    def validate(self, plan: Plan, task: Task, folder: Path) -> tuple[str, tuple[str, ...]]:
        """Has NNCF make the calls on the network; looks at every layer that comes out, and measures it."""
        calibration = [task.inputs(batch) for batch in task.batches("calibration")]
        model = quantize(plan, task.model, folder, calibration)
        said, found = self.read(folder), applied(model, read_calls(folder).nodes, calibration[0])
        for name in plan.policy:
            if said.get(name, Precision()) != found.get(name, Precision()):
                raise UnsupportedError(
                    f"nncf made {found.get(name, 'float')} of layer {name}, not {said.get(name, 'float')}"
                )
        quality = task.reduce(batch_scores(task, model, list(task.batches("report"))))
        return f"nncf {self.versions()['nncf']}", (
            f"the {len(read_calls(folder).calls)} calls, made on the network, leave each of the {len(plan.policy)} "
            f"layers with the bits that {FILE} gives it, {len(plan.policy) - len(said)} in float",
            f"with NNCF's own scales, {task.metric} on the report split is {quality:.4f}; the plan promises "
            f"{plan.quality.value:.4f} with its own",
        )


def exported_layer(layer: Layer, precision: Precision) -> LayerExport:
    """Says what becomes of a layer."""
    running, notes = nearest(layer, precision), []
    sides = (("weight", precision.weight, running.weight), ("input", precision.input, running.input))
    for side, planned, found in sides:
        if not planned.is_float and found.is_float:
            beside = "" if side == "weight" or precision.weight.is_float else f" beside a {precision.weight} weight"
            notes.append(f"NNCF has no {planned} {side} of {layer.kind}{beside}: it stays in float")
        elif not planned.is_float:
            notes.append(f"{FOUND} of the {side}{'' if found == planned else f', and makes {found} of {planned}'}")
    is_faulty = not (precision.weight.is_float and precision.input.is_float)
    became: list[Fidelity] = ["float" if found.is_float else "altered" for _, _, found in sides]
    runs = str(running) if is_faulty else ""
    compute = "int8" if running == STATIC else "fp32"
    return LayerExport(layer.name, str(precision), became[0], became[1], compute, "; ".join(notes), runs)


def nearest(layer: Layer, precision: Precision) -> Precision:
    """Returns the precision nearest to a layer's that NNCF has; what it has none for is float."""
    weight, input_ = precision.weight, precision.input
    is_integer = weight.grid == "int" and weight.scale == "fp32" and 1 < weight.bits <= 8
    if not is_integer or not (layer.kind in GROUPED or layer.kind.startswith("conv")):
        return Precision()
    if weight.bits > 4 or layer.kind not in GROUPED:
        weight = Format(8, signed=not weight.has_zero_point)
    else:
        inputs = layer.weight_shape[-1]
        is_grouped = weight.granularity == "group" and weight.group < inputs and inputs % weight.group == 0
        found = Format(4, signed=not weight.has_zero_point)
        weight = replace(found, granularity="group", group=weight.group) if is_grouped else found
    takes_input = layer.quantizes_input and input_.is_static_integer and 1 < input_.bits <= 8
    return STATIC if takes_input and weight == STATIC.weight else Precision(weight)


def node_names(simulated: QuantizedModel, example_input: Any) -> dict[str, tuple[str, ...]]:
    """Returns the nodes that NNCF's graph has of each layer, one for each of its calls; none for recurrent weights."""
    names = NodeNames(simulated.model)
    with names.watching(), exact_inference(), names:
        call(simulated.model, example_input)
    found = {}
    for layer in simulated.network:
        owner, _ = parameter_of(simulated.model, layer.name)
        found[layer.name] = tuple(names.seen[id(owner)])
    return found


class NodeNames(TorchFunctionMode):
    """Names the calls of layers' functions as NNCF does, while a model runs.

    A name is made of the modules that are running, each as its caller calls it, of the function, and of the number of
    such names before it. A module that another than its parent calls, such as one of a `ModuleList`, adds nothing, so
    that `heads.0` and `heads.1` may be `/linear/0` and `/linear/1`. (`torch/function_hook/hook_executor_mode.py`)

    Attributes:
        seen: By `id` of a module, the names of the calls it made.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[int, list[str]] = defaultdict(list)
        self._model = model
        self._running: list[nn.Module] = []
        self._counts: Counter[str] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = getattr(func, "__name__", "")
        if function in FUNCTIONS and self._running:
            path = zip(self._running, self._running[1:], strict=False)
            names = [name for parent, child in path for name, one in parent.named_children() if one is child]
            operation = f"{'/'.join(names)}/{function}"
            self.seen[id(self._running[-1])].append(f"{operation}/{self._counts[operation]}")
            self._counts[operation] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps track of the modules that are running."""
        handles = []
        for module in self._model.modules():
            handles.append(module.register_forward_pre_hook(lambda running, _: self._running.append(running)))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, *_: Any) -> None:
        self._running.pop()


def calls_for(
    policy: Mapping[str, Precision], nodes: Mapping[str, tuple[str, ...]]
) -> tuple[CompressWeights | Quantize, ...]:
    """Returns one call for every precision, `quantize` last; each ignores the nodes of all layers but its own."""
    found: list[CompressWeights | Quantize] = []
    wanted = dict.fromkeys(precision for precision in policy.values() if not precision.weight.is_float)
    for precision in sorted(wanted, key=lambda precision: precision == STATIC):
        others = [node for layer, names in nodes.items() if policy[layer] != precision for node in names]
        scope, weight = Scope(names=tuple(others)), precision.weight
        if precision == STATIC:
            found.append(Quantize(ignored_scope=scope))
            continue
        alone = {"group_size": weight.group or -1, "all_layers": True, "ratio": 1, "backup_mode": "none"}
        arguments = {"mode": MODES[str(weight.base)], "ignored_scope": scope}
        found.append(CompressWeights.model_validate(arguments | (alone if weight.bits == 4 else {})))
    return tuple(found)


def read_calls(folder: Path) -> Calls:
    """Reads the file in a folder.

    Raises:
        DataError: If it does not keep to the schema.
    """
    try:
        return Calls.model_validate_json((folder / FILE).read_bytes())
    except (ValidationError, OSError) as error:
        raise DataError(f"{folder / FILE} is damaged: {error}") from error


def quantize(plan: Plan, model: nn.Module, path: Path, calibration: Iterable[Any]) -> nn.Module:
    """Returns a copy of `model`, batch norm folded, as NNCF's calls leave it.

    Args:
        plan: The plan that was exported.
        model: Its model, in float.
        path: The folder that an export wrote.
        calibration: Inputs as the model takes them: a tensor, a tuple of positional ones, or a mapping of keywords.

    Raises:
        DataError: If the folder holds no export of this plan, or `model` is not the plan's.
        UnsupportedError: If NNCF's graph of the model has not the nodes that the file names.
    """
    check_folder(path, plan, NNCF.name)
    simulated, described = plan.simulate(model), read_calls(path)
    simulated.apply({})
    made = simulated.model.eval()
    # Running what `quantize` makes compiles NNCF's kernels once, which takes longer than the minute that it allows.
    os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
    with quietly("nncf"), redirect_stdout(io.StringIO()):
        import nncf

        inputs = [tuple(one) if isinstance(one, list) else one for one in calibration]
        dataset = nncf.Dataset(inputs)
        nodes = {node.node_name: node for node in graph_of(made, inputs[0]).get_all_nodes()}
        named = {name for names in described.nodes.values() for name in names}
        if lost := sorted(named - nodes.keys()):
            raise UnsupportedError(f"NNCF's graph of {type(model).__name__} has no node {lost[0]}")
        others = [name for name, node in nodes.items() if name not in named and _is_operation(node)]
        for one in described.calls:
            arguments = one.model_dump(
                exclude_none=True, exclude={"function", "ignored_scope", "disable_bias_correction"}
            )
            arguments["ignored_scope"] = nncf.IgnoredScope(names=[*one.ignored_scope.names, *others])
            if isinstance(one, Quantize):
                arguments["preset"] = nncf.QuantizationPreset(one.preset)
                unbiased = nncf.AdvancedQuantizationParameters(disable_bias_correction=one.disable_bias_correction)
                made = nncf.quantize(made, dataset, advanced_parameters=unbiased, subset_size=len(inputs), **arguments)
                continue
            arguments["mode"] = nncf.CompressWeightsMode(one.mode)
            if one.backup_mode:
                strict = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ERROR)
                arguments |= {"backup_mode": nncf.BackupMode(one.backup_mode), "advanced_parameters": strict}
            made = nncf.compress_weights(made, dataset=dataset, **arguments)
    return made


def graph_of(model: nn.Module, inputs: Any) -> Any:
    """Returns the graph that NNCF traces of a model, a `PTNNCFGraph`."""
    from nncf.torch import wrap_model

    return wrap_model(model, example_input=inputs, trace_parameters=True).build_graph()


def _is_operation(node: Any) -> bool:
    """Whether a node is neither an input, an output nor a parameter, none of which can be ignored."""
    return "Noop" not in node.metatype.__name__ or node.layer_attributes is None


def applied(model: nn.Module, nodes: Mapping[str, tuple[str, ...]], inputs: Any) -> dict[str, Precision]:
    """Returns the precision of every layer that has one in a network that NNCF quantized, by what it put there."""
    from nncf.torch.function_hook.wrapper import get_hook_storage

    hooks = dict(get_hook_storage(model).named_hooks())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    graph, found = graph_of(model, inputs), {}
    for layer, names in nodes.items():
        weight = parameters.get(f"{layer}.weight") if names else None
        aliases = [name.replace(".", ":") for name, value in parameters.items() if value is weight]
        stored = next((hooks[key] for alias in aliases if (key := f"post_hooks.{alias}__0.0") in hooks), None)
        if stored is not None:
            found[layer] = Precision(_stored_format(stored))
        static = [hooks.get(f"pre_hooks.{name}__1.0") for name in names]
        if names and all(static) and all(_reads_8_bits(graph, name) for name in names):
            bits = {int(one.num_bits) for one in static if one is not None}
            found[layer] = STATIC if bits == {8} and stored is None else FLOAT_PRECISION
    return found


def _stored_format(decompressor: Any) -> Format:
    """The format of a weight that a hook of NNCF unpacks."""
    name = type(decompressor).__name__
    format = Format(4 if name.startswith("INT4") else 8, signed="Asymmetric" not in name)
    stored: tuple[int, ...] = getattr(decompressor, "compressed_weight_shape", ())
    made: tuple[int, ...] = getattr(decompressor, "result_shape", None) or ()
    return replace(format, granularity="group", group=stored[-1]) if len(stored) > len(made) else format


def _reads_8_bits(graph: Any, name: str) -> bool:
    """Whether a quantizer lies between a node's first input and the operation that computes it."""
    node = graph.get_node_by_name(name)
    while True:
        before = [
            one
            for one in graph.get_previous_nodes(node)
            if any(edge.input_port_id == 0 for edge in graph.get_edges(one, node))
        ]
        if not before:
            return False
        node = before[0]
        if "asymmetric_quantize" in node.node_name:
            return True
        if node.metatype.__name__ not in PASSING:
            return False
