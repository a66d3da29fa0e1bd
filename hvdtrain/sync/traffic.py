"""Bytes that one rank sends, by the ways that spread them evenly: a ring, or each to each. Headers are not counted."""


def of_all_reduce(tensor_bytes: float, ranks: int) -> float:
    """A ring's: every part of the tensor goes round once to be summed, and once more as a sum."""
    return 2 * (ranks - 1) / ranks * tensor_bytes


def of_all_to_all(rows_bytes: float, ranks: int) -> float:
    """Each of ``ranks`` rows but the rank's own; so it is where parts of a tensor are summed by their owners."""
    return (ranks - 1) / ranks * rows_bytes


def of_all_gather(row_bytes: float, ranks: int) -> float:
    """What a rank has, and what it hands on."""
    return (ranks - 1) * row_bytes


def mib(sent_bytes: float) -> float:
    """As records have it."""
    return round(sent_bytes / (1 << 20), 6)
