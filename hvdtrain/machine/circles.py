"""When Python looks for objects that hold one another in a circle: seldom while libraries are loaded, and not in them.

Every 700 new objects it looks through those that are new, and now and then through all there are. What libraries load
stays: hundreds of thousands of objects, among which looking takes .2 s of the 1.5 s until torch and the package are
there, and again and again later.
"""

import gc

_LOADING = 100_000, 50, 100
_USUAL = gc.get_threshold()


def look_seldom() -> None:
    """As long as libraries are loaded (local)."""
    gc.set_threshold(*_LOADING)


def look_at_what_comes() -> None:
    """As usual again, but never at what there is by now (local). Nothing, where ``look_seldom`` was not called."""
    if gc.get_threshold() == _LOADING:
        gc.freeze()
        gc.set_threshold(*_USUAL)
