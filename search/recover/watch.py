"""Looks into the simulated network while the calibration data pass through it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor, nn

from hwmodels import Precision
from search.quantize.observe import first_tensor
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.task import Split, Task, call

Look = Callable[[Tensor], None]


class _ReachedError(Exception):
    """The last layer that somebody looks at has run; the rest of the pass is not needed."""


def watch(
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    task: Task,
    inputs: Mapping[str, Look] | None = None,
    outputs: Mapping[str, Look] | None = None,
    until: str | None = None,
    split: Split = "calibration",
) -> None:
    """Runs a split once under `policy`, showing chosen layers' inputs and outputs.

    Args:
        simulated: The network; `policy` stays applied.
        policy: The precisions it runs with.
        task: Gives the data.
        inputs: Layer name to what is called with each of its inputs, as quantized as the layer gets it.
        outputs: Layer name to what is called with each of its outputs, before `placement=full` quantizes them.
        until: A layer after whose first call each pass may end.
        split: On which data.
    """
    model = simulated.apply(policy)
    with ExitStack() as hooks:
        for layer, look in (inputs or {}).items():
            hook = simulated.owner(layer).register_forward_pre_hook(_on_input(look), with_kwargs=True)
            hooks.callback(hook.remove)
        for layer, look in (outputs or {}).items():
            hook = simulated.owner(layer).register_forward_hook(_on_output(look), prepend=True)
            hooks.callback(hook.remove)
        if until:
            hooks.callback(simulated.owner(until).register_forward_hook(_stop).remove)
        with exact_inference():
            for batch in task.batches(split):
                with suppress(_ReachedError):
                    call(model, task.inputs(batch))


def _on_input(look: Look) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        look(first_tensor(args, kwargs))

    return hook


def _on_output(look: Look) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        look(output)

    return hook


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _ReachedError
