"""Writes a TFLite file, operator by operator, with the bindings that Vela brings along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

IDENTIFIER = b"TFL3"
VERSION = 3  # of the schema
TYPES = {"int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64"}


@dataclass(frozen=True)
class Value:
    """A tensor of the file.

    Attributes:
        index: Its number in the file.
        shape: Its shape, channels last.
        bits: Bits of an activation, 8 or 16; 0 for constants.
        scale: Step between two of its codes.
    """

    index: int
    shape: tuple[int, ...]
    bits: int = 0
    scale: float = 0.0


@dataclass
class FlatbufferWriter:
    """Gathers tensors and operators, and turns them into the bytes of a TFLite file with one subgraph.

    All integers are symmetric: zero points are 0.
    """

    _tensors: list[tuple[str, tuple[int, ...], str, np.ndarray, int, int]] = field(default_factory=list)
    _constants: list[bytes] = field(default_factory=lambda: [b""])
    _operators: list[tuple[int, list[int], list[int], str, Mapping[str, Any]]] = field(default_factory=list)

    def activation(self, name: str, shape: Sequence[int], bits: int, scale: float) -> Value:
        """Adds a tensor of 8 or 16 bits that an operator writes, or the network is given."""
        index = self._tensor(name, shape, f"int{bits}", np.array([scale], np.float32), 0, b"")
        return Value(index, tuple(shape), bits, scale)

    def constant(self, name: str, values: np.ndarray, scales: np.ndarray | None = None, axis: int = 0) -> Value:
        """Adds a constant; `scales` are one for the tensor, or one for each of what lies along `axis`."""
        data = np.ascontiguousarray(values)
        none = np.empty(0, np.float32)
        index = self._tensor(
            name, data.shape, data.dtype.name, none if scales is None else scales, axis, data.tobytes()
        )
        return Value(index, data.shape)

    def operator(
        self,
        code: str,
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        options: str = "",
        **fields: Any,
    ) -> None:
        """Adds an operator: its name in the schema, and the table of its options with their fields."""
        number = getattr(_binding("BuiltinOperator"), code)
        values = [value.index for value in inputs], [value.index for value in outputs]
        self._operators.append((number, *values, options, fields))

    def finish(self, inputs: Sequence[Value], outputs: Sequence[Value]) -> bytes:
        """The file that reads `inputs` and returns `outputs`."""
        builder = import_module("flatbuffers").Builder(sum(map(len, self._constants)) + 4096)
        buffers = [
            _table(builder, "Buffer", Data=builder.CreateByteVector(data) if data else None) for data in self._constants
        ]
        tensors = [self._write_tensor(builder, number) for number in range(len(self._tensors))]
        codes = sorted({operator[0] for operator in self._operators})
        operators = [self._write_operator(builder, codes, *operator) for operator in self._operators]
        subgraph = _table(
            builder,
            "SubGraph",
            Name=builder.CreateString("main"),
            Tensors=_offsets(builder, tensors),
            Inputs=_numbers(builder, [value.index for value in inputs]),
            Outputs=_numbers(builder, [value.index for value in outputs]),
            Operators=_offsets(builder, operators),
        )
        known = [
            _table(builder, "OperatorCode", DeprecatedBuiltinCode=min(code, 127), BuiltinCode=code, Version=1)
            for code in codes
        ]
        model = _table(
            builder,
            "Model",
            Version=VERSION,
            OperatorCodes=_offsets(builder, known),
            Subgraphs=_offsets(builder, [subgraph]),
            Buffers=_offsets(builder, buffers),
            Description=builder.CreateString("bitplan"),
        )
        builder.Finish(model, IDENTIFIER)
        return bytes(builder.Output())

    def _tensor(self, name: str, shape: Sequence[int], kind: str, scales: np.ndarray, axis: int, data: bytes) -> int:
        if data:
            self._constants.append(data)
        buffer = len(self._constants) - 1 if data else 0
        self._tensors.append((name, tuple(shape), kind, scales, axis, buffer))
        return len(self._tensors) - 1

    def _write_tensor(self, builder: Any, number: int) -> int:
        name, shape, kind, scales, axis, buffer = self._tensors[number]
        quantization = None
        if len(scales):
            quantization = _table(
                builder,
                "QuantizationParameters",
                Scale=builder.CreateNumpyVector(scales.astype(np.float32)),
                ZeroPoint=builder.CreateNumpyVector(np.zeros(len(scales), np.int64)),
                QuantizedDimension=axis,
            )
        return _table(
            builder,
            "Tensor",
            Name=builder.CreateString(name),
            Shape=_numbers(builder, shape),
            Type=getattr(_binding("TensorType"), TYPES[kind]),
            Buffer=buffer,
            Quantization=quantization,
        )

    def _write_operator(
        self,
        builder: Any,
        codes: list[int],
        code: int,
        inputs: list[int],
        outputs: list[int],
        options: str,
        fields: Mapping[str, Any],
    ) -> int:
        written = _table(builder, options, **fields) if options else None
        return _table(
            builder,
            "Operator",
            OpcodeIndex=codes.index(code),
            Inputs=_numbers(builder, inputs),
            Outputs=_numbers(builder, outputs),
            BuiltinOptionsType=getattr(_binding("BuiltinOptions"), options or "NONE"),
            BuiltinOptions=written,
        )


def _binding(table: str) -> Any:
    """What the bindings know of a table or an enumeration of the schema."""
    module = import_module(f"ethosu.vela.tflite.{table}")
    return getattr(module, table, module)


def _table(builder: Any, table: str, **fields: Any) -> int:
    """Writes a table with the fields that are not None; returns its offset."""
    module = import_module(f"ethosu.vela.tflite.{table}")
    getattr(module, f"{table}Start")(builder)
    for name, value in fields.items():
        if value is not None:
            getattr(module, f"{table}Add{name}")(builder, value)
    offset: int = getattr(module, f"{table}End")(builder)
    return offset


def _numbers(builder: Any, values: Sequence[int]) -> int:
    offset: int = builder.CreateNumpyVector(np.array(values, np.int32))
    return offset


def _offsets(builder: Any, offsets: Sequence[int]) -> int:
    """Writes a vector of tables; vectors are written from the end."""
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    end: int = builder.EndVector()
    return end
