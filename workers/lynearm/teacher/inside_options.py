"""How a look inside the teacher is asked for: `hidden:layers=4,8,-1,dtype=fp8` and `layers:every=8`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lynearm.wire.errors import ConfigError
from lynearm.wire.hidden import FINAL_NORM, HIDDEN_DTYPES, MAX_CAPTURED_LAYERS, HiddenDtype, Layer

CAPTURE_FORM = "hidden:layers=4,8,-1[,dtype=bf16|fp8]"
STATS_FORM = "layers[:every=8]"

DEFAULT_EVERY = 8
MAX_EVERY = 1 << 20


@dataclass(frozen=True, slots=True)
class HiddenCapture:
    """Hidden states that traces are to carry."""

    layers: tuple[Layer, ...]
    """As they were asked for: below 0 they count from the last decoder layer."""
    dtype: HiddenDtype = "bf16"

    def resolve(self, layer_count: int) -> tuple[Layer, ...]:
        """The layers of a model, ascending, the final norm last.

        Raises:
            ConfigError: if the model has no such layer, or one is named twice.
        """
        found: list[int] = []
        for layer in self.layers:
            if layer == FINAL_NORM:
                continue
            number = layer + layer_count if layer < 0 else layer
            if not 0 <= number < layer_count:
                raise ConfigError(
                    f"capture of layer {layer}: the model has layers 0 to {layer_count - 1}",
                    f"name one of them, one from -1 to -{layer_count}, or {FINAL_NORM!r} for the final norm",
                )
            found.append(number)
        norm: tuple[Layer, ...] = (FINAL_NORM,) if FINAL_NORM in self.layers else ()
        resolved = (*sorted(set(found)), *norm)
        if len(resolved) != len(self.layers):
            raise ConfigError(f"capture of layers {', '.join(map(str, self.layers))} names one twice")
        return resolved


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Statistics of all layers that are to be gathered."""

    every: int = DEFAULT_EVERY
    """Looks at the positions of one step of the engine in so many: means need no more, and it costs less."""


def parse_capture(text: str) -> HiddenCapture | None:
    """What `--capture` asks for; None for an empty text.

    Raises:
        ConfigError: naming what is wrong, and the form expected.
    """
    if not text:
        return None
    kind, _, rest = text.partition(":")
    options = _read_options(rest, "capture", text, CAPTURE_FORM)
    if kind != "hidden" or set(options) - {"layers", "dtype"} or not options.get("layers"):
        raise _malformed("capture", text, CAPTURE_FORM)
    dtypes = options.get("dtype", ["bf16"])
    dtype: HiddenDtype | None = next((known for known in HIDDEN_DTYPES if [known] == dtypes), None)
    if dtype is None:
        raise ConfigError(f"capture {text!r}: dtype is none of {', '.join(HIDDEN_DTYPES)}")
    layers: list[Layer] = [_read_layer(word, text) for word in options["layers"]]
    if len(layers) > MAX_CAPTURED_LAYERS:
        raise ConfigError(
            f"capture of {len(layers)} layers, at most {MAX_CAPTURED_LAYERS} can be", "name fewer"
        )
    return HiddenCapture(tuple(layers), dtype)


def parse_stats(text: str) -> LayerStats | None:
    """What `--stats` asks for; None for an empty text.

    Raises:
        ConfigError: naming what is wrong, and the form expected.
    """
    if not text:
        return None
    kind, _, rest = text.partition(":")
    options = _read_options(rest, "stats", text, STATS_FORM)
    if kind != "layers" or set(options) - {"every"}:
        raise _malformed("stats", text, STATS_FORM)
    word = ",".join(options.get("every", [str(DEFAULT_EVERY)]))
    if not word.isdecimal() or not 1 <= int(word) <= MAX_EVERY:
        raise ConfigError(f"stats {text!r}: every is {word!r}, expected 1 to {MAX_EVERY}")
    return LayerStats(int(word))


def _read_options(rest: str, what: str, text: str, form: str) -> Mapping[str, list[str]]:
    """The words of each key: a word without "=" belongs to the key before it."""
    options: dict[str, list[str]] = {}
    words: list[str] | None = None
    for word in rest.split(",") if rest else ():
        key, equals, value = word.partition("=")
        if equals:
            if key in options:
                raise ConfigError(f"{what} {text!r} says {key} twice", f"write {form}")
            words = options[key] = []
        if words is None:
            raise _malformed(what, text, form)
        words.append(value if equals else word)
    return options


def _read_layer(word: str, text: str) -> Layer:
    if word == FINAL_NORM:
        return FINAL_NORM
    try:
        return int(word)
    except ValueError as error:
        raise ConfigError(
            f"capture {text!r}: {word!r} is no layer", f"name layers by number, or {FINAL_NORM!r}"
        ) from error


def _malformed(what: str, text: str, form: str) -> ConfigError:
    return ConfigError(f"{what} {text!r} is not understood", f"write {form}")
