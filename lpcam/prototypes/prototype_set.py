"""A fitted set of prototypes: to look at, to edit, and to keep in one file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lpcam.errors import InputError
from lpcam.functional import prototype_directions
from lpcam.storage.files import write_atomically
from lpcam.storage.hashing import digest, tensors_digest

SIDES = ("class", "context")
SCHEMA = "3"


@dataclass(frozen=True)
class Prototypes:
    """The selected prototypes of every class.

    A prototype is addressed by its class (``name``, the class's name or its index), its ``side``
    (``class`` or ``context``) and its own ``index``: the number of the cluster that it was, which
    stays when other prototypes go. :meth:`rename`, :meth:`drop` and :meth:`merge` return a new set.

    Attributes:
        classes: Names of the C classes.
        foreground: For each class its prototypes ``(P_c, D)``.
        context: For each class its context prototypes ``(Q_c, D)``.
        indices: For each class, which centres they are: of the foreground, of the context.
        names: Names that were given to prototypes, by class, side and index.
        model: Fingerprint of the model whose features they are; empty if not recorded.
        settings: How they were made: arguments of :class:`~lpcam.explain.explainer.LPCAM`.
        mean: Subtracted from every local feature first ``(D,)``; None for nothing.
    """

    classes: tuple[str, ...]
    foreground: tuple[Tensor, ...]
    context: tuple[Tensor, ...]
    indices: tuple[tuple[list[int], list[int]], ...]
    names: Mapping[tuple[int, str, int], str] = field(default_factory=dict)
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    mean: Tensor | None = None

    def directions(self, use: str = "both") -> Tensor:
        """Directions ``(C, D)`` of the prototypes of ``class``, of ``context`` or of ``both``."""
        if use not in ("both", *SIDES):
            raise InputError(f"prototypes.use={use}: unknown; choose both, class or context")
        none = [vectors[:0] for vectors in self.foreground]
        # A class without prototypes of its own has no map, so its context does not count either.
        context = [
            found if len(own) or use == "context" else found[:0]
            for own, found in zip(self.foreground, self.context, strict=True)
        ]
        return prototype_directions(
            none if use == "context" else self.foreground,
            none if use == "class" else context,
        )

    def __str__(self) -> str:
        """A line for each class that has prototypes: the indices of both sides, and names."""
        lines = []
        for c, name in enumerate(self.classes):
            sides = []
            for side, found in zip(SIDES, self.indices[c], strict=True):
                given = [self.names.get((c, side, index)) for index in found]
                texts = [
                    f"{index} ({text})" if text else f"{index}"
                    for index, text in zip(found, given, strict=True)
                ]
                sides.append(f"{side} {', '.join(texts) or 'none'}")
            if any(self.indices[c]):
                lines.append(f"{name}: {'; '.join(sides)}")
        return "\n".join(lines) or "no prototypes"

    def class_index(self, name: str | int) -> int:
        """Index of a class that is given by its name or index.

        Raises:
            InputError: There is no such class, or several classes have the name.
        """
        found = [c for c, known in enumerate(self.classes) if name in (known, c)]
        if len(found) != 1:
            raise InputError(
                f"class {name!r}: {len(found)} classes are called that; "
                f"give one of {len(self.classes)} names, or an index from 0"
            )
        return found[0]

    def vectors(self, name: str | int, side: str = "class") -> Tensor:
        """The prototypes of one class and side ``(P, D)``, in the order of their indices."""
        if side not in SIDES:
            raise InputError(f"side={side}: unknown; choose class or context")
        return (self.foreground if side == "class" else self.context)[self.class_index(name)]

    def rename(self, name: str | int, index: int, text: str, side: str = "class") -> "Prototypes":
        """Give one prototype the name ``text``.

        Raises:
            InputError: There is no such prototype.
        """
        self._places(name, [index], side)
        return replace(self, names={**self.names, (self.class_index(name), side, index): text})

    def drop(self, name: str | int, indices: Sequence[int], side: str = "class") -> "Prototypes":
        """Leave prototypes out. A class whose own prototypes all go is no longer mapped.

        Raises:
            InputError: There is no such prototype.
        """
        places = self._places(name, indices, side)
        vectors = self.vectors(name, side)
        keep = [place for place in range(len(vectors)) if place not in places]
        return self._with_side(name, side, vectors[keep], places)

    def merge(self, name: str | int, indices: Sequence[int], side: str = "class") -> "Prototypes":
        """Put the plain mean of prototypes in the place of the first that is given.

        Several prototypes count for one after that, which gives the others of the class more weight
        in the mean over prototypes.

        Raises:
            InputError: There is no such prototype.
        """
        first, *others = self._places(name, indices, side)
        vectors = self.vectors(name, side).clone()
        vectors[first] = vectors[[first, *others]].mean(0)
        keep = [place for place in range(len(vectors)) if place not in others]
        return self._with_side(name, side, vectors[keep], others)

    def _places(self, name: str | int, indices: Sequence[int], side: str) -> list[int]:
        """Rows of :meth:`vectors` that have these indices."""
        self.vectors(name, side)
        found = self.indices[self.class_index(name)][SIDES.index(side)]
        wrong = [index for index in indices if index not in found]
        if wrong or not indices:
            raise InputError(
                f"class {name!r}, {side}: no prototype {(*wrong, None)[0]}; there are {found}"
            )
        return [found.index(index) for index in dict.fromkeys(indices)]

    def _with_side(
        self, name: str | int, side: str, vectors: Tensor, gone: Sequence[int]
    ) -> "Prototypes":
        """This set with other prototypes on one side of a class, those in ``gone`` missing."""
        c, s = self.class_index(name), SIDES.index(side)
        sides = [list(self.foreground), list(self.context)]
        sides[s][c] = vectors
        old = self.indices[c][s]
        new = (list(self.indices[c][0]), list(self.indices[c][1]))
        new[s][:] = [index for place, index in enumerate(old) if place not in gone]
        lost = {(c, side, old[place]) for place in gone}
        return replace(
            self,
            foreground=tuple(sides[0]),
            context=tuple(sides[1]),
            indices=(*self.indices[:c], new, *self.indices[c + 1 :]),
            names={key: text for key, text in self.names.items() if key not in lost},
        )

    def save(self, path: Path) -> None:
        """Write one safetensors file: a tensor per class and side, all else in its header."""
        tensors = {} if self.mean is None else {"mean": self.mean}
        for side, vectors in zip(SIDES, (self.foreground, self.context), strict=True):
            for c, name in enumerate(self.classes):
                tensors[f"{c} {name}/{side}"] = vectors[c].contiguous()
        values = {
            "classes": self.classes,
            "indices": self.indices,
            "names": [[*key, text] for key, text in self.names.items()],
            "model": self.model,
            "settings": dict(self.settings),
        }
        header = {"schema": SCHEMA} | {key: json.dumps(value) for key, value in values.items()}
        header["digest"] = _digest(header, tensors)
        write_atomically(path, save(tensors, header))

    @classmethod
    def load(cls, path: Path) -> "Prototypes":
        """Read what :meth:`save` wrote.

        Raises:
            InputError: The file is missing, damaged, of another schema, or something else.
        """
        try:
            with safe_open(path, "pt") as file:
                header = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0][:80]
            raise InputError(
                f"{path}: no readable file of prototypes ({reason}); check the path or fit again"
            ) from error
        if header.get("schema") != SCHEMA:
            raise InputError(
                f"{path}: schema {header.get('schema')}, this version reads {SCHEMA}; "
                "give a file of prototypes, or fit again"
            )
        if header.pop("digest", None) != _digest(header, tensors):
            raise InputError(f"{path}: damaged, its digest differs; copy it anew or fit again")
        values = {key: json.loads(text) for key, text in header.items()}
        foreground, context = (
            tuple(tensors[f"{c} {name}/{side}"] for c, name in enumerate(values["classes"]))
            for side in SIDES
        )
        return cls(
            tuple(values["classes"]),
            foreground,
            context,
            tuple((first, second) for first, second in values["indices"]),
            {(c, side, index): text for c, side, index, text in values["names"]},
            values["model"],
            values["settings"],
            tensors.get("mean"),
        )


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Hash everything that the file says."""
    return digest([dict(header), tensors_digest(dict(sorted(tensors.items())))])
