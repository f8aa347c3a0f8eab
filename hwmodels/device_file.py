"""Reads the YAML of device files, and words their errors."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("devices")


def list_devices() -> tuple[str, ...]:
    """Names of the devices that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def read_yaml(path: Path) -> Any:
    """Parses a YAML file in which no mapping has a key twice.

    Raises:
        ValueError: If it cannot be read, is not YAML, or has a key twice.
    """
    import yaml

    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # several times as fast, where PyYAML was built with libyaml

    class UniqueKeyLoader(base):  # type: ignore[misc, valid-type]
        """Refuses what yaml would otherwise overwrite silently."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
                if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *name`: what it brings may be overridden
                    continue
                if not isinstance(key_node, yaml.ScalarNode):
                    raise ValueError(
                        f"{path}: line {key_node.start_mark.line + 1}: a key must be a word or a number, not a "
                        f"{'list' if isinstance(key_node, yaml.SequenceNode) else 'mapping'}"
                    )
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise ValueError(f"{path}: line {key_node.start_mark.line + 1}: key {key!r} occurs twice")
                seen.add(key)
            mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return mapping

    try:
        return yaml.load(path.read_text(encoding="utf-8"), UniqueKeyLoader)
    except OSError as error:
        raise ValueError(f"cannot read device file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: it is no text in UTF-8") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{path} is not valid YAML: {where}{getattr(error, 'problem', None) or error}") from error


def listed(names: Iterable[object]) -> str:
    """Names as words of a message."""
    return ", ".join(map(str, names))


def closest(name: object, known: Iterable[object]) -> str:
    """A suggestion for a name that is not known, empty where nothing comes near."""
    found = difflib.get_close_matches(str(name), map(str, known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""
