"""What a student is trained to bring down: a sum of losses, and the temperature at which they compare.

    TERM = NAME[@MIX][:WEIGHT]        forward-kl    reverse-kl:0.5    jsd@0.3:0.9    cross-entropy:0.1
         | HIDDEN[@PAIRS][:WEIGHT]    hidden-cosine    hidden-mse@4=9,9=19:0.5

`docs/losses.md` has each loss's formula. Nothing here needs torch, so that a configuration is checked
before anything slow is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, cast, get_args

from lynearm.student.layer_pairs import LayerPair, format_pairs, parse_pairs, settle_pairs
from lynearm.wire.errors import ConfigError, MisalignmentError
from lynearm.wire.specs import StreamSpec

DivergenceName: TypeAlias = Literal[
    "forward-kl", "reverse-kl", "jsd", "skew-kl", "skew-reverse-kl", "sampled-kd"
]
HiddenLossName: TypeAlias = Literal["hidden-cosine", "hidden-mse"]
LossName: TypeAlias = DivergenceName | HiddenLossName | Literal["cross-entropy", "tail-cross-entropy"]
DIVERGENCE_NAMES: tuple[DivergenceName, ...] = get_args(DivergenceName)
HIDDEN_LOSS_NAMES: tuple[HiddenLossName, ...] = get_args(HiddenLossName)
LOSS_NAMES: tuple[LossName, ...] = (
    *DIVERGENCE_NAMES,
    "cross-entropy",
    "tail-cross-entropy",
    *HIDDEN_LOSS_NAMES,
)

DEFAULT_MIX: dict[str, float] = {"jsd": 0.5, "skew-kl": 0.1, "skew-reverse-kl": 0.1}
"""The losses that compare with a mixture, and its usual proportion: GKD's β and DistiLLM's α."""

DEFAULT_LOSS = ("forward-kl:1", "cross-entropy:0.1")
"""Where none is given. A little cross-entropy on the tokens that the teacher drew steadies the forward KL."""

DEFAULT_LOSS_OF_TAIL = "tail-cross-entropy:1"
"""One more term on streams with draws from the tail: with it, the gradient is in the mean that of forward KL
over the whole vocabulary."""

_TERM = re.compile(r"(?P<name>[a-z-]+)(@(?P<mix>[^:@]+))?(:(?P<weight>[^:@]+))?")
_HOW = "write NAME[@MIX][:WEIGHT], for example forward-kl:0.9, jsd@0.5:1 or hidden-cosine@4=9,9=19:0.5"


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One loss of a sum.

    Raises:
        ConfigError: naming the value that is out of range.
    """

    name: LossName
    weight: float = 1.0
    """Above 0."""
    mix: float = 0.0
    """In (0, 1) for the losses of `DEFAULT_MIX`, β or α; 0 for all others."""
    pairs: tuple[LayerPair, ...] = ()
    """Layers that a loss of `HIDDEN_LOSS_NAMES` compares; none: by depth, which `make_objective` settles.
    None for all others."""

    def __post_init__(self) -> None:
        """Check every field."""
        if self.name not in LOSS_NAMES:
            raise ConfigError(f"loss {self.name!r} is not known, expected one of {', '.join(LOSS_NAMES)}")
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"loss {self.name}: weight is {self.weight:g}, expected above 0",
                "leave out what counts nothing",
            )
        if self.name in DEFAULT_MIX and not 0 < self.mix < 1:
            raise ConfigError(
                f"loss {self.name}: mix is {self.mix:g}, expected between 0 and 1",
                "at the ends it is nothing else than forward-kl or reverse-kl",
            )
        if self.name not in DEFAULT_MIX and self.mix:
            raise ConfigError(f"loss {self.name} mixes nothing: @{self.mix:g} has no meaning", _HOW)
        if self.pairs and (self.name not in HIDDEN_LOSS_NAMES or len(set(self.pairs)) < len(self.pairs)):
            raise ConfigError(
                f"loss {self.name}: layers are {format_pairs(self.pairs)}, expected each pair once, and only "
                f"for {' and '.join(HIDDEN_LOSS_NAMES)}",
                _HOW,
            )

    def __str__(self) -> str:
        """As `parse_term` reads it."""
        chosen = format_pairs(self.pairs) if self.pairs else f"{self.mix:g}" if self.mix else ""
        return f"{self.name}{f'@{chosen}' if chosen else ''}:{self.weight:g}"


def parse_term(text: str) -> LossTerm:
    """A term as it is written in a configuration.

    Raises:
        ConfigError: if it is not one.
    """
    found = _TERM.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"loss {text!r} cannot be read", _HOW)
    name = cast(LossName, found["name"])
    weight = _number(found["weight"], text) if found["weight"] else 1.0
    if name in HIDDEN_LOSS_NAMES:
        return LossTerm(name, weight, pairs=parse_pairs(found["mix"]) if found["mix"] else ())
    return LossTerm(
        name,
        weight,
        _number(found["mix"], text) if found["mix"] else DEFAULT_MIX.get(name, 0.0),
    )


def parse_terms(texts: Sequence[str]) -> tuple[LossTerm, ...]:
    """Terms as they are written in a configuration.

    Raises:
        ConfigError: if one cannot be read.
    """
    return tuple(parse_term(text) for text in texts)


@dataclass(frozen=True, slots=True)
class Objective:
    """A weighted sum of losses, and how the two distributions are brought to one temperature.

    Raises:
        ConfigError: if there is no term, a term stands there twice, or a temperature is not positive.
    """

    terms: tuple[LossTerm, ...] = (LossTerm("forward-kl"),)
    temperature: float = 1.0
    """At which the distributions are compared: the student's logits are divided by it. Cross-entropy is
    always taken at 1."""
    teacher_temperature: float = 1.0
    """Of the logprobs that the teacher sent; where it is another one, its rows are re-tempered."""
    vocab_size: int = 0
    """Rows of the output head that are tokens of the teacher too; the others get no probability and no
    gradient. 0: all."""
    teacher_hidden_size: int = 0
    """Width of the teacher's hidden states; 0 where none are compared."""

    def __post_init__(self) -> None:
        """Check every field."""
        names = [(term.name, term.mix) for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ConfigError(
                f"losses are {', '.join(map(str, self.terms)) or 'none'}, expected each one once",
                "give at least one, and add up the weights of one that stands there twice",
            )
        for name in ("temperature", "teacher_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name):g}, expected above 0")

    @property
    def divergences(self) -> tuple[LossTerm, ...]:
        """The terms that compare with the teacher's distribution."""
        return tuple(term for term in self.terms if term.name in DIVERGENCE_NAMES)

    @property
    def hidden_terms(self) -> tuple[LossTerm, ...]:
        """The terms that compare hidden states."""
        return tuple(term for term in self.terms if term.name in HIDDEN_LOSS_NAMES)

    @property
    def cross_entropy_weight(self) -> float:
        """Weight of the cross-entropy; 0 without it."""
        return self._weight_of("cross-entropy")

    @property
    def tail_cross_entropy_weight(self) -> float:
        """Weight of the cross-entropy among the tokens of the tail; 0 without it."""
        return self._weight_of("tail-cross-entropy")

    def _weight_of(self, name: LossName) -> float:
        return sum(term.weight for term in self.terms if term.name == name)


def make_objective(
    spec: StreamSpec,
    losses: Sequence[str],
    *,
    temperature: float = 1.0,
    retemper: bool = False,
    vocab_size: int = 0,
    student_layers: int = 0,
) -> Objective:
    """The objective of training on a stream.

    Args:
        spec: Of the stream.
        losses: Terms as `parse_term` reads them; none: `default_loss`.
        temperature: At which to compare.
        retemper: Bring a stream of another temperature to this one: see `losses.teacher.retemper` for what
            that gets wrong.
        vocab_size: Width of the student's logits; 0: the teacher's.
        student_layers: Decoder layers of the student, for terms that compare hidden states; 0 where they are
            not known.

    Raises:
        ConfigError: if the terms cannot be read, or compare layers that the student does not have.
        MisalignmentError: if the stream has another temperature and is not to be re-tempered, its codec mode
            does not suit a loss, its draws from the tail are at another temperature, or it does not carry the
            hidden states that a loss compares.
    """
    differs = spec.teacher.logprobs_temperature != temperature
    terms = parse_terms(losses or default_loss(spec, temperature))
    objective = Objective(
        tuple(_settle_layers(term, spec, student_layers) for term in terms),
        temperature,
        spec.teacher.logprobs_temperature,
        min(spec.teacher.vocab_size, vocab_size or spec.teacher.vocab_size),
        spec.codec.hidden.hidden_size if spec.codec.hidden else 0,
    )
    if objective.divergences and differs and not retemper:
        raise MisalignmentError(
            f"the logprobs of stream {spec.name!r} are at temperature {spec.teacher.logprobs_temperature:g}, "
            f"the loss compares at {temperature:g}",
            f"train with temperature={spec.teacher.logprobs_temperature:g}, capture the stream again at "
            f"{temperature:g}, or set retemper, which has to guess the tail",
        )
    for term in objective.divergences:
        _check_codec(spec, term, retempered=differs)
    if objective.tail_cross_entropy_weight and spec.codec.mode == "sampled":
        raise MisalignmentError(
            f"stream {spec.name!r} holds draws: no tail is left over for tail-cross-entropy",
            "train with sampled-kd alone, which learns the whole distribution from them",
        )
    if objective.tail_cross_entropy_weight and spec.codec.tail_draws and differs:
        raise MisalignmentError(
            f"the draws from the tail in stream {spec.name!r} are at temperature "
            f"{spec.teacher.logprobs_temperature:g}, the loss compares at {temperature:g}: nothing says how "
            "probable they are there",
            f"train without tail-cross-entropy, or with temperature={spec.teacher.logprobs_temperature:g}",
        )
    return objective


def default_loss(spec: StreamSpec, temperature: float = 1.0) -> tuple[str, ...]:
    """The terms of training on a stream where none are given.

    Args:
        spec: Of the stream.
        temperature: At which to compare: draws from the tail at another one are left alone.
    """
    has_draws = spec.codec.tail_draws > 0 and spec.teacher.logprobs_temperature == temperature
    return (*DEFAULT_LOSS, DEFAULT_LOSS_OF_TAIL) if has_draws else DEFAULT_LOSS


def _settle_layers(term: LossTerm, spec: StreamSpec, student_layers: int) -> LossTerm:
    if term.name not in HIDDEN_LOSS_NAMES:
        return term
    return replace(term, pairs=settle_pairs(term.name, term.pairs, spec, student_layers))


def _check_codec(spec: StreamSpec, term: LossTerm, *, retempered: bool) -> None:
    drawn = spec.codec.mode == "sampled"
    if drawn and (retempered or term.name not in ("sampled-kd", "forward-kl")):
        raise MisalignmentError(
            f"stream {spec.name!r} holds draws: with them {term.name}"
            f"{' at another temperature' if retempered else ''} is biased",
            "train with sampled-kd at the stream's temperature, or capture with another codec mode",
        )
    if not drawn and term.name == "sampled-kd":
        raise MisalignmentError(
            f"stream {spec.name!r} is in codec mode {spec.codec.mode!r} and holds no draws",
            "train with forward-kl, which also counts the tail",
        )


def _number(text: str, term: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"loss {term!r}: {text!r} is not a number", _HOW) from error
