"""The command `bitplan hardware`: its arguments, and what each of its actions does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

HARDWARE_HELP = "devices: list them, show one, compare several on a network"


def add_hardware(hardware: argparse.ArgumentParser) -> None:
    """Adds the sub-commands of `hardware`; alone it lists."""
    hardware.set_defaults(command=list_command)
    actions = hardware.add_subparsers(metavar="ACTION")
    actions.add_parser("list", help="the devices costs can be predicted for").set_defaults(command=list_command)

    show = actions.add_parser("show", help="everything that is known of a device, and where it comes from")
    show.add_argument("name", metavar="NAME", help="a name from the list, or a path to a device file")
    show.set_defaults(command=show_command)

    compare = actions.add_parser("compare", help="price a network on devices, precision by precision")
    compare.add_argument("names", nargs="+", metavar="NAME", help="names from the list, or paths to device files")
    compare.add_argument(
        "--task", nargs="+", metavar=("TASK", "task.KEY=VALUE"), help="a task with its settings, as `search` takes it"
    )
    compare.add_argument("--plan", type=Path, help="a plan.json or run directory whose policy is priced as well")
    compare.add_argument(
        "--precision", nargs="+", metavar="W/I", help="precisions of all layers; default: float int8/uint8 int4/uint8"
    )
    compare.add_argument("--batch", type=int, metavar="N", help="samples at once; default: 1")
    compare.add_argument(
        "--threads", type=int, metavar="N", help="worker threads; default: as many as the device has figures for"
    )
    compare.add_argument(
        "--tokens", type=int, metavar="N", help="tokens at once, of networks that read them; 1 generates"
    )
    compare.add_argument("--context", type=int, metavar="N", help="tokens that attention looks back on")
    compare.add_argument("--out", type=Path, metavar="DIR", help="folder for tables (CSV) and figures (PNG)")
    compare.set_defaults(command=compare_command)

    table = actions.add_parser("table", help="write what every layer costs at every precision, for other tools")
    table.add_argument("name", metavar="NAME", help="a name from the list, or a path to a device file")
    table.add_argument(
        "--task", nargs="+", required=True, metavar=("TASK", "task.KEY=VALUE"), help="a task, as `search` takes it"
    )
    table.add_argument("--precision", nargs="+", metavar="W/I", help="precisions; default: float int8/uint8 int4/uint8")
    table.add_argument("--batch", type=int, metavar="N", help="samples at once; default: 1")
    table.add_argument("--threads", type=int, metavar="N", help="worker threads; default: as many as are known")
    table.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".csv or .parquet; .npy is HAQ's format: latencies by layer, weight bits and input bits, 1 to 8",
    )
    table.set_defaults(command=table_command)


def list_command(arguments: argparse.Namespace, console: Console) -> None:
    """Lists the devices and other cost models."""
    from search.hardware.tables import print_listing
    from search.hardware.targets import listing

    print_listing(listing(), console)


def show_command(arguments: argparse.Namespace, console: Console) -> None:
    """Shows everything about one target."""
    from hwmodels import Device
    from search.hardware.tables import print_device, print_option
    from search.hardware.targets import find_target

    found = find_target(arguments.name)
    if isinstance(found, Device):
        print_device(found, console)
    else:
        print_option(found, console)


def compare_command(arguments: argparse.Namespace, console: Console) -> None:
    """Prices uniform precisions, and a plan, on every target named."""
    from search.errors import ConfigError
    from search.hardware.compare import PRECISIONS, compare, uniform_policies, write_comparison
    from search.hardware.tables import print_comparison
    from search.hardware.targets import cost_model, network_of, read_task, workload_for
    from search.plan import Plan
    from search.planned_task import planned_task

    models = [cost_model(name) for name in dict.fromkeys(arguments.names)]
    names = [model.name for model in models]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ConfigError(
            f"two of the devices are called {twice[0]}; give each a name of its own (id, in a device file)"
        )
    asked = (arguments.batch, arguments.threads, arguments.tokens, arguments.context)
    workloads = [workload_for(model, *asked) for model in models]
    plan = Plan.load(arguments.plan) if arguments.plan else None
    if arguments.task:
        task = read_task(arguments.task[0], arguments.task[1:])
        if plan is not None:
            plan.check(task.model)
    elif plan is not None:
        task = planned_task(plan, [])
    else:
        raise ConfigError("name what is compared: --task digits, or --plan with a plan that was searched")
    network = network_of(task, workloads[0])
    policies = uniform_policies(network, arguments.precision or PRECISIONS)
    if plan is not None:
        policies[f"plan {plan.digest}"] = plan.policy
    compared = [compare(model, network, policies, workload) for model, workload in zip(models, workloads, strict=True)]
    print_comparison(compared, network, task.name, console)
    if arguments.out:
        written = write_comparison(compared, arguments.out)
        files = ", ".join(path.name for path in written)
        console.print(f"Wrote {arguments.out}: {files}", highlight=False, soft_wrap=True, markup=False)


def table_command(arguments: argparse.Namespace, console: Console) -> None:
    """Writes a target's cost table of a task's network."""
    from search.hardware.compare import PRECISIONS
    from search.hardware.export import write_table
    from search.hardware.targets import cost_model, network_of, read_task, workload_for

    model = cost_model(arguments.name)
    workload = workload_for(model, arguments.batch, arguments.threads, None, None)
    network = network_of(read_task(arguments.task[0], arguments.task[1:]), workload)
    write_table(model, network, arguments.precision or PRECISIONS, workload, arguments.out)
    console.print(f"Wrote {arguments.out}", highlight=False, soft_wrap=True, markup=False)
