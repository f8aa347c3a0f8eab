"""What a search for given backends has to keep to: which layers share a precision, which candidates stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from hwmodels import Layer, Network, Precision
from search.backends import backend
from search.backends.base import Backend, Keep
from search.errors import ConfigError
from search.legal import Refusal


@dataclass(frozen=True)
class BackendTarget:
    """A backend as something that refuses candidates, as a device does.

    Attributes:
        backend: The backend.
        keep: Which candidates stay.
    """

    backend: Backend
    keep: Keep

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.backend.name

    @property
    def remedy(self) -> str:
        """What to do where no candidate is left."""
        others = "contained or export.keep=any" if self.keep == "exact" else "any"
        return f"name other formats, or search with export.keep={others}"

    @property
    def leaves_float(self) -> bool:
        """A backend leaves what it cannot quantize as it is."""
        return True

    def refuses(self, layer: Layer, precision: Precision) -> Refusal | None:
        """Why a candidate is left out; None if it stays."""
        return self.backend.refuses(layer, precision, self.keep)


@dataclass(frozen=True)
class Deployment:
    """The backends a search is for.

    Attributes:
        targets: One for every backend.
    """

    targets: tuple[BackendTarget, ...] = ()

    @classmethod
    def of(cls, names: Sequence[str], keep: str, placement: str) -> Deployment:
        """Looks up backends by name.

        Raises:
            ConfigError: If there is no such backend, or one cannot quantize where the settings ask it to.
        """
        backends = [backend(name, "plan") for name in dict.fromkeys(names)]
        for one in backends:
            if placement == "full" and not one.places:
                raise ConfigError(
                    f"export={one.name} and quantizer.placement=full do not go together: {one.name} quantizes the "
                    "inputs of layers alone; search with quantizer.placement=inputs"
                )
        return cls(tuple(BackendTarget(one, cast(Keep, keep)) for one in backends))

    def check(self, model: nn.Module) -> None:
        """Raises UnsupportedError where one of the backends takes no such model."""
        for target in self.targets:
            target.backend.takes(model)

    def ties(self, network: Network) -> list[list[str]]:
        """Layers that one of the backends runs as one."""
        return [tie for target in self.targets for tie in target.backend.ties(network)]
