"""Is the run folder one and the same for all nodes? Each writes a small file there and looks for the others'."""

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hvdtrain.comm.group import Group
from hvdtrain.errors import EXIT_CRASH, EXIT_IO
from hvdtrain.jobs.preflight.findings import Look
from hvdtrain.jobs.preflight.node import within

CHECK = "run folder"
_PATIENCE_S = 5.0  # NFS may show a new file late


def look_at_run_folder(run_dir: Path, node: str, is_first_of_node: bool, group: Group) -> dict[str, Look]:
    """A look for each node, the same on all ranks (collective). Makes the folder, and leaves nothing in it."""
    token = group.all_gather_object(uuid.uuid4().hex[:12])[0]
    folder = run_dir / f".preflight-{token}"
    problem = _problem(lambda: _write(folder, node)) if is_first_of_node else None
    problems = {name: said for name, said in group.all_gather_object((node, problem)) if said is not None}
    writers = [name for name, said in problems.items() if not said]
    seen: frozenset[str] = frozenset()
    if node in writers and is_first_of_node:
        with suppress(TimeoutError):
            seen = within(lambda: _seen(folder, writers))
    views = {name: view for name, view in group.all_gather_object((node, seen)) if view}  # all have looked: now tidy up
    if is_first_of_node:
        with suppress(OSError):
            within(lambda: (folder / node).unlink())
    group.barrier()
    if is_first_of_node:
        with suppress(OSError):  # another node was faster
            within(folder.rmdir)
    return judge_views(run_dir, problems, views)


def judge_views(run_dir: Path, problems: Mapping[str, str], views: Mapping[str, frozenset[str]]) -> dict[str, Look]:
    """problems: why each node could not write; empty: it could. views: whose files each node that could write has
    found.

    The largest group of nodes that see one another is right; of several as large, the first. If of more than two nodes
    none sees another, the folder is at fault and no node.
    """
    sizes = [len(view) for view in views.values()]
    right = max(views.values(), key=len, default=frozenset())
    none_shares = len(views) > 2 and max(sizes) == 1
    looks = {}
    for node, problem in problems.items():
        view, exit_code = views.get(node, frozenset()), EXIT_IO
        if not problem and not view:
            problem = f"a file that was just written to {run_dir} is not there"
        elif not problem and (view != right or none_shares):
            exit_code = EXIT_IO if none_shares else EXIT_CRASH
            missing = sorted(views.keys() - view)
            problem = f"{run_dir} is not the folder that {_some(missing)} wrote to: no shared file system"
        found = "" if problem else "writable" if len(problems) == 1 else f"writable, {len(view)} nodes write there"
        looks[node] = Look(CHECK, found, problem, exit_code=exit_code)
    return looks


def _write(folder: Path, node: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / node).write_text(node, encoding="utf-8")


def _problem(work) -> str:
    try:
        within(work)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _seen(folder: Path, writers: list[str]) -> frozenset[str]:
    """Whose files are there? Each is asked for by its name, because a listing may be an old one."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        seen = frozenset(name for name in writers if _is_there(folder / name, name))
        if len(seen) == len(writers) or time.monotonic() > until:
            return seen
        time.sleep(0.1)


def _is_there(path: Path, name: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == name
    except OSError:
        return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
