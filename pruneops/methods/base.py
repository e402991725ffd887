"""What a pruning method is: a frozen description with hooks on the ragged decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pruneops.decoder import DecoderState, Positions

if TYPE_CHECKING:
    from torch import nn

_METHODS: dict[str, type[PruningMethod]] = {}


@dataclass(frozen=True)
class PruningMethod:
    """Base of all methods: hyper-parameters as fields, behaviour as hooks, no tensors of a run.

    A hook changes the `DecoderState` it is given, usually by replacing ``state.batch`` with a shorter one. Subclasses
    name themselves with `name` and are then found by `method_from_dict`.
    """

    name: ClassVar[str] = ""
    positions: ClassVar[Positions] = Positions.GIVEN

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            _METHODS[cls.name] = cls

    def for_depth(self, num_layers: int) -> PruningMethod:
        """The method with everything that depends on the model's depth filled in and checked.

        Raises
        ------
        ValueError
            If a field does not fit a model of `num_layers` layers.
        """
        return self

    def before_decoder(self, state: DecoderState) -> None:
        """Called once with the packed prompt (or chunk, or decoded tokens), before layer 0."""

    def before_layer(self, i: int, layer: nn.Module, state: DecoderState) -> None:
        """Called before decoder layer `i` (counted from 0)."""

    def run_layer(self, i: int, layer: nn.Module, state: DecoderState) -> None:
        """Runs decoder layer `i` and puts its output into ``state.batch``; a method may do more, or it differently."""
        state.batch = state.call_layer(i, layer, state.batch)

    def to_dict(self) -> dict[str, Any]:
        """A plain dict for JSON: the fields, and the method's name under ``"method"``."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"method": self.name, **fields}


def method_from_dict(values: Mapping[str, Any]) -> PruningMethod:
    """The inverse of `PruningMethod.to_dict`.

    Raises
    ------
    ValueError
        If the method is unknown or a key is not one of its fields.
    """
    fields = dict(values)
    name = fields.pop("method", None)
    if name not in _METHODS:
        raise ValueError(f"method: got {name!r}, expected one of {sorted(_METHODS)}")
    cls = _METHODS[name]
    unknown = set(fields) - set(cls.__dataclass_fields__)
    if unknown:
        raise ValueError(
            f"{name}: got the unknown fields {sorted(unknown)}, expected {sorted(cls.__dataclass_fields__)}"
        )
    return cls(**fields)
