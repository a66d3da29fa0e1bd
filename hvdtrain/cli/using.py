"""The words of the commands that use what was trained: evaluate, generate, average, export."""

import argparse
import json
from pathlib import Path

from hvdtrain.comm.world import World
from hvdtrain.commands.arguments import Run, add_choice, add_data, add_mesh, add_texts, given
from hvdtrain.errors import EXIT_OK, ConfigError


def define_evaluate(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    add_data(parser)
    parser.add_argument("--split", choices=["train", "val", "test"], help="default: val")
    parser.add_argument("--input", type=Path, metavar="FILE", help="instead of a split: texts to answer, one a line")
    parser.add_argument(
        "--reference", type=Path, nargs="+", default=[], metavar="FILE",
        help="with --input: what they are compared with, line by line; several files: several references, where a "
        "further one is empty there is none",
    )  # fmt: skip
    parser.add_argument(
        "--scores", default="", metavar="NAMES", help="of texts: bleu, bleu_tokenized, chrf, rouge; of files default: "
        "'bleu chrf rouge', of a split what the recipe asks",
    )  # fmt: skip
    parser.add_argument(
        "--reference-field", default="target", metavar="NAME",
        help="of JSON lines: a text, or a list of them; default: target",
    )  # fmt: skip
    add_texts(parser)
    add_choice(parser)
    add_mesh(parser)

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.evaluate import Files, TextOptions, evaluate, evaluate_files
        from hvdtrain.trained import parse_mesh

        if bool(words.input) != bool(words.reference):
            raise ConfigError("--input and --reference go together: the texts, and what they are compared with")
        if words.input and (words.split or words.data):
            raise ConfigError("--input is instead of --split and --data")
        texts = TextOptions(words.scores, given(words))
        rest = world, words.weights, words.checkpoint, texts, parse_mesh(words.mesh)
        if words.input:
            names = words.field, words.reference_field, words.too_long, words.invalid_utf8
            files = Files(words.input, words.reference, *names)
            scores = evaluate_files(words.run_dir, files, *rest)
        else:
            scores = evaluate(words.run_dir, words.data, words.split or "val", *rest)
        if world.is_main:
            print(json.dumps(scores))
        return EXIT_OK

    return run


def define_generate(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--prompt", metavar="TEXT", help="one text to answer: to go on with, to translate, to label")
    parser.add_argument("--input", type=Path, metavar="FILE", help="texts to answer, one a line")
    parser.add_argument("--output", type=Path, metavar="FILE", help="with --input: an answer a line, in its order")
    parser.add_argument(
        "--split", choices=["train", "val", "test"],
        help="instead of --input: questions with ids; --output gets {id: answer}, as SQuAD's official script reads it",
    )  # fmt: skip
    parser.add_argument(
        "--na-probs", type=Path, metavar="FILE",
        help="with --split: {id: probability that there is no answer} (SQuAD 2.0: --na-prob-thresh 0.5); --output then "
        "has the best text of each",
    )  # fmt: skip
    add_data(parser)
    parser.add_argument(
        "--json", action="store_true", help='a JSON object a line: {"answers": [{"text": ..., "score": ...}, ...]}'
    )
    add_texts(parser)
    add_choice(parser)
    add_mesh(parser)

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.generate import Lines, generate, generate_file
        from hvdtrain.trained import parse_mesh

        if words.split:
            return _predict(words, world)
        if (words.prompt is None) == (words.input is None) or bool(words.input) != bool(words.output):
            raise ConfigError(
                "generate takes --prompt TEXT, or --input FILE and --output FILE, or --split and --output"
            )
        if words.na_probs or words.data:
            raise ConfigError("--na-probs and --data go with --split")
        choice, mesh = (given(words), world, words.weights, words.checkpoint), parse_mesh(words.mesh)
        if words.input:
            how = words.field, words.json, words.too_long, words.invalid_utf8
            generate_file(words.run_dir, Lines(words.input, words.output, *how), *choice, mesh)
            return EXIT_OK
        if words.too_long == "drop":
            raise ConfigError("--too-long drop is for lines of a file; a prompt is truncated or refused")
        line = generate(words.run_dir, words.prompt, *choice, words.json, words.too_long, mesh)
        if world.is_main:
            print(line)
        return EXIT_OK

    return run


def _predict(words: argparse.Namespace, world: World) -> int:
    from hvdtrain.commands.predictions import Split, predict_split
    from hvdtrain.trained import parse_mesh

    if not words.output or words.input or words.prompt is not None:
        raise ConfigError("--split and --output FILE go together, without --input and --prompt")
    if words.json or given(words):
        raise ConfigError("--split gives the best answer to each question: --json and a search are for --input")
    split = Split(words.split, words.output, words.na_probs, words.data)
    predict_split(words.run_dir, split, world, words.weights, words.checkpoint, parse_mesh(words.mesh))
    return EXIT_OK


def define_average(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--last", type=int, required=True, metavar="K", help="how many whole checkpoints")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new run folder (default: RUN_DIR/average-K)")

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.average import average

        print(average(words.run_dir, words.last, words.out, world))
        return EXIT_OK

    return run


def define_export(parser: argparse.ArgumentParser) -> Run:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or an empty one")
    parser.add_argument(
        "--dtype", default="fp32", choices=["fp32", "bf16", "fp16"], help="of the tensors; default: fp32"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="of a run with model.lora: its adapters alone, as peft loads them"
    )
    add_choice(parser)

    def run(words: argparse.Namespace, world: World) -> int:
        from hvdtrain.commands.export import export

        print(export(words.run_dir, words.out, world, words.weights, words.checkpoint, words.dtype, words.adapter))
        return EXIT_OK

    return run
