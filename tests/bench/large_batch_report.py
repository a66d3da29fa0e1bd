"""Table and picture of the runs of large_batch.py."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import table

HEAD = [
    "model",
    "sequences",
    "optimizer",
    "rates",
    "warm-up",
    "lr",
    "adamw_lr",
    "seeds",
    "val loss",
    "range",
    "against AdamW tuned at the base",
]
Line = Mapping[str, Any]  # {"trial": of large_batch.Trial, "found": ...}
Key = tuple[str, int, str, str, str]  # model, times, optimizer, way, warm-up


def gathered(lines: Sequence[Line]) -> dict[Key, tuple[Line, list[float]]]:
    """Of each way the trial, and the losses of its seeds; of the tuned ones the best rate's, which has most seeds."""
    by_rates: dict[tuple[Key, float, float], list[Line]] = defaultdict(list)
    for line in lines:
        trial = line["trial"]
        way = trial["rule"] if trial["base"] else "tuned"
        key = trial["model"], trial["times"], trial["optimizer"], way, trial["warmup"]
        by_rates[key, trial["lr"], trial["share"]].append(line)
    found: dict[Key, tuple[Line, list[float]]] = {}
    for (key, *_), runs in by_rates.items():
        losses = [math.inf if one["found"]["val_loss"] is None else one["found"]["val_loss"] for one in runs]
        known = found.get(key)
        if known is None or (-len(losses), statistics.mean(losses)) < (-len(known[1]), statistics.mean(known[1])):
            found[key] = runs[0]["trial"], losses
    return found


def write(lines: Sequence[Line], models: Mapping[str, int]) -> str:
    """Returns the table's text. models: recipe -> its batch."""
    found = gathered(lines)
    rows = []
    for (model, times, optimizer, way, warmup), (trial, losses) in sorted(found.items()):
        base = found.get((model, 1, "adamw", "tuned", "auto"))
        mean = statistics.mean(losses)
        ratio = f"{100 * (mean / statistics.mean(base[1]) - 1):+.1f} %" if base and math.isfinite(mean) else "-"
        rows.append(
            [
                model,
                str(models[model] * times),
                optimizer,
                way,
                warmup,
                f"{trial['lr']:g}",
                f"{trial['lr'] * trial['share']:g}" if trial["share"] else "",
                str(len(losses)),
                f"{mean:.4f}" if math.isfinite(mean) else "diverged",
                f"{min(losses):.4f} to {max(losses):.4f}" if math.isfinite(mean) else "",
                ratio,
            ]
        )
    noise = noise_of(lines, models)
    draw(found, models, noise)
    scales = [f"{model} {name} {scale}" for model, of_model in noise.items() for name, scale in of_model.items()]
    note = (
        "Equal tokens in every run of a model; loss of the whole validation split. tuned: the best rates of a grid at "
        "that batch; none, linear, sqrt: the rates that are best at the base batch, by that scaling.rule. Warm-up: "
        "scaling.warmup, over as many tokens or steps as at the base batch; auto: steps for AdamW and LAMB, up to four "
        "fifths of the run, tokens for the others. Noise scale of the gradients at the end of the base runs, in "
        f"sequences: {', '.join(scales)}."
    )
    command = "make bench BENCH=large_batch"
    return table.write("large_batch", "Larger batches at equal tokens", command, HEAD, rows, note)


def noise_of(lines: Sequence[Line], models: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Model -> optimizer -> median over the tuned runs at the base batch, as ``noise_scale_tokens`` / context."""
    found: dict[str, dict[str, list[float]]] = {model: defaultdict(list) for model in models}
    contexts = {"shakespeare-char": 64, "demo": 128}
    for line in lines:
        trial, noise = line["trial"], line["found"].get("noise_scale_tokens")
        if trial["times"] == 1 and noise:
            found[trial["model"]][trial["optimizer"]].append(noise / contexts[trial["model"]])
    return {
        model: {name: round(statistics.median(values)) for name, values in of_model.items()}
        for model, of_model in found.items()
        if of_model
    }


def draw(
    found: Mapping[Key, tuple[Line, list[float]]], models: Mapping[str, int], noise: Mapping[str, Mapping[str, int]]
) -> None:
    """``results/large_batch.png``: loss by batch, a panel for each model; lines tuned, dashed by the rule that fits,
    dotted so with a warm-up over the base's tokens.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fits = {"adamw": "sqrt", "lamb": "sqrt", "lars": "linear", "muon": "sqrt"}
    shown = [model for model in models if any(key[0] == model for key in found)]
    figure = Figure(figsize=(6.5 * len(shown), 4.8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, model in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for number, (name, rule) in enumerate(fits.items()):
            for way, warmup, style in (("tuned", "auto", "-"), (rule, "auto", "--"), (rule, "tokens", ":")):
                points = {
                    models[model] * key[1]: statistics.mean(losses)
                    for key, (_, losses) in sorted(found.items())
                    if (key[0], *key[2:]) == (model, name, way, warmup)
                }
                if not points:
                    continue
                label = f"{name}, best rates there" if way == "tuned" else f"{name}, best of the base by {rule}"
                label += ", warm-up over the base's tokens" if warmup == "tokens" else ""
                axes.plot(list(points), list(points.values()), style, marker="o", ms=4, color=f"C{number}", label=label)
        base = found.get((model, 1, "adamw", "tuned", "auto"))
        if base is not None:
            reference = statistics.mean(base[1])
            axes.axhspan(reference, 1.02 * reference, color="0.9", zorder=0, label="AdamW at the base to +2 %")
        if scale := noise.get(model, {}).get("adamw"):
            axes.axvline(scale, color="0.6", ls=":", lw=1, zorder=0, label="noise scale of the gradients")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({models[model] * key[1] for key in found if key[0] == model}))
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_title(model)
        axes.set_xlabel("batch (sequences)")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation loss")
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(table.RESULTS / "large_batch.png")
