"""Finds the weights of one CrossViT in what a file holds: under any keys, behind any prefix, beside other things."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from convert.errors import ConversionError, listed
from convert.tensors import MOST_TENSORS
from convert.tree import without_wrappers

# Where training checkpoints keep the weights that count, the first first. As in timm, averaged weights go before.
PREFERRED = ("state_dict_ema", "model_ema", "state_dict", "model", "params")
_AVERAGED = re.compile(r"(.*_)?(ema|swa|avg|average|averaged|shadow)(_.*)?", re.IGNORECASE)
_OF_AN_OPTIMISER = re.compile(r"opt(im)?(_.*)?|(.*_)?optimi[sz]ers?(_.*)?|mu|nu|trace|(exp_avg|momentum|grad).*")
_OWN = re.compile(r"(cls_token|pos_embed)[._]\d+|(patch_embed|blocks|norm|head)\.\d+\..*")
# names that no other model has, the surest first; before them, the prefix
_LANDMARKS = (
    re.compile(
        r"((?:.*\.)?)backbone\.pyramid\.fuse\.(?:weight|kernel)"
    ),  # a detector or segmenter, of which a body is a part
    re.compile(r"((?:.*\.)?)cls_token[._]0"),
    re.compile(r"((?:.*\.)?)blocks\.\d+\.(?:fusion|revert_projs)\.\d+\..*"),
)
_DEEPEST = 8  # keys of keys; a pickle may even hold itself
_MOST_VALUES = 10 * MOST_TENSORS  # with those of optimisers and metrics


class Place(NamedTuple):
    """Where weights are: the keys that lead to a dict, and the prefix of their names there."""

    keys: tuple[str, ...]
    prefix: str = ""

    def __str__(self) -> str:
        return "/".join((*self.keys, self.prefix)).removesuffix("/") or "no key"

    @property
    def words(self) -> list[str]:
        return [*self.keys, *self.prefix.split(".")]

    @property
    def is_averaged(self) -> bool:
        return any(map(_AVERAGED.fullmatch, self.words))

    @property
    def is_of_an_optimiser(self) -> bool:
        return any(map(_OF_AN_OPTIMISER.fullmatch, self.words))


def find_weights(
    held: Mapping, is_weight: Callable[[Any], bool], what: str, *, expected: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]] | None:
    """The entries of the CrossViT in nested dicts, by their names without the prefix; and notes for the user.

    What lies beside them and is no weight, such as counters and the states of metrics, is left out, which a note tells.

    Args:
        is_weight: whether a value is a tensor such as a model has for weights.
        what: the source, for the message.
        expected: keys under which nobody wonders to find them: no note.

    Returns:
        None where there is no CrossViT.

    Raises:
        ConversionError: there are several, and nothing tells which one is meant.
    """
    dicts = _dicts(held, what)
    places = _places(dicts)
    if not places:
        return None
    place = choose(places, what)
    taken, left = {}, []
    prefixes = {other.prefix for other in places if other.keys == place.keys}
    for name, value in dicts[place.keys].items():
        own = str(name).removeprefix(place.prefix)
        nearest = max((prefix for prefix in prefixes if str(name).startswith(prefix)), key=len, default=place.prefix)
        if isinstance(value, Mapping) or nearest != place.prefix:
            continue
        if str(name).startswith(place.prefix) and (is_weight(value) or _OWN.fullmatch(without_wrappers(own))):
            taken[own] = value
        else:
            left.append(str(name))
    averages = [
        Place((*place.keys[:-1], str(key)))  # in another form, such as a list of tensors without names
        for key, value in dicts[place.keys[:-1]].items()
        if _AVERAGED.fullmatch(str(key)) and _holds(value, is_weight) and not any(str(key) in p.keys for p in places)
    ]
    notes = _notes(place, [*places, *averages], expected)
    if left:
        notes.append(f"left out, since they are not the model's weights: {listed(left[:5], len(left))}")
    return taken, notes


def choose(places: Sequence[Place], what: str) -> Place:
    """The one of several places that is meant. Raises ConversionError where nothing tells."""
    left = list(places)
    for key in PREFERRED:
        left = [place for place in left if key in place.keys] or left
        if len(left) == 1:
            return left[0]
    left = [place for place in left if not place.is_averaged] or left
    if len(left) > 1:
        names = listed(map(str, left))
        raise ConversionError(f"{what} holds {len(left)} models, under {names}: save the one that is meant alone")
    return left[0]


def others_than(place: Place, places: Sequence[Place]) -> str | None:
    """A note on the places that were not chosen; None where there are none."""
    others = ", ".join(str(other) for other in places if other != place)
    return f"the weights under {place} were taken, not {others}" if others else None


def _notes(place: Place, places: Sequence[Place], expected: Sequence[str]) -> list[str]:
    note = others_than(place, places)
    if note is None and (place.keys not in ((), *((key,) for key in expected)) or without_wrappers(place.prefix)):
        note = f"the weights under {place} were taken"
    return [] if note is None else [note]


def _holds(value: Any, is_weight: Callable[[Any], bool]) -> bool:
    """Whether weights are somewhere in dicts and lists."""
    left, seen = [value], set()
    while left:
        held = left.pop()
        if not isinstance(held, Mapping | list) or id(held) in seen:
            continue
        seen.add(id(held))
        inside = list(held.values() if isinstance(held, Mapping) else held)
        if any(not isinstance(x, Mapping | list) and is_weight(x) for x in inside):
            return True
        left += inside
    return False


def _dicts(held: Mapping, what: str) -> dict[tuple[str, ...], Mapping]:
    """The keys that lead to each dict in a dict, itself included, and it.

    Raises ConversionError if they hold too many values: those that hold one another would without end.
    """
    found, values, left = {}, 0, [((), held)]
    while left:
        keys, inside = left.pop()
        found[keys] = inside
        values += len(inside)
        if values > _MOST_VALUES:
            raise ConversionError(f"{what} holds more than {_MOST_VALUES:,} values: save its weights alone")
        if len(keys) < _DEEPEST:
            below = [((*keys, str(key)), value) for key, value in inside.items() if isinstance(value, Mapping)]
            left += reversed(below)
    return found


def _places(dicts: Mapping[tuple[str, ...], Mapping]) -> list[Place]:
    for landmark in _LANDMARKS:
        found = {
            Place(keys, match[1]): None
            for keys, held in dicts.items()
            for name, value in held.items()
            if not isinstance(value, Mapping) and (match := landmark.fullmatch(str(name)))
        }
        places = [place for place in found if not place.is_of_an_optimiser]
        if places:
            return places
    return []
