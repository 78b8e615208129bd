"""Components by name: one vocabulary and one kind of error for heads and backbones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from sphereface2.errors import UserError, check_flag, did_you_mean

Builder = TypeVar("Builder", bound=Callable[..., Any])
B = TypeVar("B", bound=Callable[..., Any])


class Registry(Generic[Builder]):
    """Builders of one kind of component, in the order in which they were registered.

    Args:
        kind: what one of them is called in messages, e.g. "head".

    Example:
        >>> letters = Registry("letter")
        >>> @letters.register("alpha")
        ... def alpha(*, size: int = 1) -> str:
        ...     return "α" * size
        >>> letters.available(), letters.find("alpha")(size=2)
        (['alpha'], 'αα')
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._builders: dict[str, Builder] = {}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._builders

    def register(self, name: str) -> Callable[[B], B]:
        """Decorator that makes a class or function available under ``name``.

        A definition that is run again, as a notebook's cell is, takes the place of the first.

        Raises:
            UserError: the name is taken by another.
        """

        def add(builder: B) -> B:
            if name in self._builders and not _same(builder, self._builders[name]):
                raise UserError(
                    f"the {self.kind} {name!r} is registered already: choose another name"
                )
            self._builders[name] = builder  # type: ignore[assignment]
            return builder

        return add

    def available(self) -> list[str]:
        """The registered names."""
        return list(self._builders)

    def find(self, name: str) -> Builder:
        """The builder of that name.

        Raises:
            UserError: unknown name; the message suggests the nearest.
        """
        if not isinstance(name, str):
            raise UserError(f"name must be the name of a {self.kind}, got {name!r}")
        if name not in self._builders:
            raise UserError(
                f"there is no {self.kind} {name!r}{did_you_mean(name, self._builders)}; "
                f"available: {', '.join(self._builders)}"
            )
        return self._builders[name]

    def check_options(self, name: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
        """Refuse options that the component does not have, and what is no bool where it must be.

        Raises:
            UserError: an option of ``given`` is not among ``known`` (the message suggests the
                nearest), or is not a bool where the component's default is one.
        """
        known = list(known)
        defaults = keyword_defaults(self.find(name))
        for option, value in given.items():
            if option not in known:
                raise UserError(
                    f"the {self.kind} {name} has no parameter {option!r}"
                    f"{did_you_mean(option, known)}; available: {', '.join(known) or 'none'}"
                )
            if isinstance(defaults.get(option), bool):
                check_flag(option, value)


def _same(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two builders are one definition: of one name in one module.

    What has no name of its own, such as a `functools.partial` or a lambda, is another each time.
    """
    name = getattr(one, "__qualname__", "<lambda>")
    place = (one.__module__, name)
    return not name.endswith("<lambda>") and place == (
        other.__module__,
        getattr(other, "__qualname__", None),
    )


def keyword_defaults(builder: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only parameters of ``builder`` with their defaults (``inspect.Parameter.empty``).

    Example:
        >>> keyword_defaults(sorted)
        {'key': None, 'reverse': False}
    """
    return {
        parameter.name: parameter.default
        for parameter in inspect.signature(builder).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
