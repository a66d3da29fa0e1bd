"""The exit codes of hvdtrain/errors.py for shell scripts, which write no such number themselves.

eval "$(python -m hvdtrain.jobs.exit_codes)"    EXIT_OK=0 EXIT_USAGE=2 ... FINAL_EXITS='2 65 71 74 76 130'
"""

from hvdtrain import errors


def assignments() -> str:
    """A line of shell for each code, and one for those after which a run is not started again."""
    codes = {name: code for name, code in vars(errors).items() if name.startswith("EXIT_")}
    lines = [f"{name}={code}" for name, code in codes.items()]
    return "\n".join([*lines, f"FINAL_EXITS='{' '.join(map(str, errors.FINAL_EXITS))}'"])


if __name__ == "__main__":
    print(assignments())
