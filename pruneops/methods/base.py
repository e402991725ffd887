"""What a pruning method is: a frozen description with hooks on the ragged decoder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
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
    #: In training the labels decide what is kept: they say where the answers begin.
    asks_labels: ClassVar[bool] = True
    #: Labels say which tokens are answers, about which the method decides: then the whole text has to come at once, and
    #: labels on visual tokens, which are never part of an answer, do not count.
    judges_answers: ClassVar[bool] = False

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

    def for_model(self, num_layers: int, config: Any) -> PruningMethod:
        """`for_depth`, and everything that depends on the config of the model between images and text as well."""
        return self.for_depth(num_layers)

    @property
    def sought_tokens(self) -> tuple[int, ...] | None:
        """Token ids that begin a question, if the method has to know where questions begin."""
        return None

    @property
    def ranked_layers(self) -> tuple[int, ...]:
        """Layers that are preceded by a ranking with projections of its own, which a report counts."""
        return ()

    def prepare(self, text_model: nn.Module) -> None:
        """Put the modules of a trainable method into a text model, where they are not in it yet.

        Raises
        ------
        ValueError
            If they do not fit the model, which is then left as it was.
        """

    def restore(self, text_model: nn.Module) -> None:
        """The inverse of `prepare`: the very modules that were there before."""

    def check_modules(self, text_model: nn.Module, missing_keys: Iterable[str] = ()) -> None:
        """Check the method's modules and their weights in a text model. Reads the weights.

        Parameters
        ----------
        missing_keys : iterable of str
            Names of weights that a checkpoint did not have.

        Raises
        ------
        ValueError
            If modules are missing, do not fit the method, or have weights that are missing or not finite; if there are
            modules of another method.
        """
        modules = (*text_model.layers, *text_model.children())
        others = {getattr(module, "of_method", self.name) for module in modules} - {self.name}
        if others:
            raise ValueError(
                f"model: carries modules of the method {others.pop()!r}, expected none; pruneops.detach(model), or the "
                "method's restore() if it is not attached, takes them out"
            )

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


def checked_number(
    name: str, value: object, low: float = -math.inf, high: float = math.inf, *, above_low: bool = False
) -> float:
    """A hyper-parameter as a float.

    Parameters
    ----------
    low, high : float
        Its range.
    above_low : bool
        `low` itself is not in the range.

    Raises
    ------
    TypeError, ValueError
        If it is not a finite number in the range.
    """
    expected = "a finite number"
    if math.isfinite(high):
        expected = f"a share in {'(' if above_low else '['}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
    if not (math.isfinite(value) and low <= value <= high) or (above_low and value == low):
        raise ValueError(f"{name}: got {value}, expected {expected}")
    return float(value)
