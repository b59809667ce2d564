"""The command line: `dpo-jax demo | train | evaluate | generate | export | methods`."""

import sys
from collections.abc import Sequence

from dpo_jax import __version__
from dpo_jax.cli.console import DONE, WRONG_USE, UsageError, guarded, say

USAGE = f"""dpo-jax {__version__}: preference optimisation in JAX

usage: dpo-jax COMMAND [options]; `dpo-jax COMMAND --help` shows the options

  demo      the whole way on a synthetic task with an exact judge, in minutes, without a network (--diffusion: images)
  train     train a METHOD on a model and preference data; the same command continues a run
  evaluate  reward accuracy, margin, KL, log-probs and lengths on pairs; rewards and win rates of images
  generate  completions of prompts, by sampling or beam search, or images of prompts
  export    write a checkpoint of a run as a Hugging Face or diffusers folder
  methods   the losses that can be trained
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 failure, 2 wrong use."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return DONE if words else WRONG_USE
    if words[0] == "--version":
        print(__version__)
        return DONE
    commands = {
        "demo": _demo,
        "train": _train,
        "evaluate": _evaluate,
        "generate": _generate,
        "export": _export,
        "methods": _methods,
    }
    if words[0] not in commands:
        say(f"dpo-jax: unknown command {words[0]!r}; there are {', '.join(commands)}")
        return WRONG_USE
    return guarded(lambda: commands[words[0]](words[1:]), debug="--debug" in words)


# Each command imports its own modules: `dpo-jax methods --help` must not wait for the trainer's.


def _train(words: list[str]) -> None:
    from dpo_jax.cli.catalogue import method, methods
    from dpo_jax.cli.configs import parse, read_config, take_config_option

    if not words or words[0] in ("-h", "--help"):
        print("usage: dpo-jax train METHOD [options]; `dpo-jax train METHOD --help` shows the options\n")
        print("methods: " + ", ".join(methods()))
        if not words:
            raise UsageError("train needs a method")
        return
    chosen = method(words[0])
    if chosen.wing == "language":
        from dpo_jax.cli.configs import train_config_class
        from dpo_jax.cli.train import train
    else:
        from dpo_jax.cli.images.configs import image_train_config_class as train_config_class
        from dpo_jax.cli.images.train import train_images as train
    config_class = train_config_class(chosen)
    path, rest = take_config_option(words[1:])
    default = read_config(path, config_class, command="train", method=chosen.slug) if path else None
    config = parse(config_class, rest, prog=f"dpo-jax train {chosen.slug}", default=default)
    train(chosen, config)


def _evaluate(words: list[str]) -> None:
    from dpo_jax.cli.configs import parse

    if _of_images(words):
        from dpo_jax.cli.images.evaluate import ImageEvaluateConfig, evaluate_images

        evaluate_images(parse(ImageEvaluateConfig, words, prog="dpo-jax evaluate"))
        return
    from dpo_jax.cli.evaluate import EvaluateConfig, evaluate_command

    evaluate_command(parse(EvaluateConfig, words, prog="dpo-jax evaluate"))


def _generate(words: list[str]) -> None:
    from dpo_jax.cli.configs import parse

    if _of_images(words):
        from dpo_jax.cli.images.generate import ImageGenerateConfig, generate_images

        generate_images(parse(ImageGenerateConfig, words, prog="dpo-jax generate"))
        return
    from dpo_jax.cli.generate import GenerateConfig, generate_command

    generate_command(parse(GenerateConfig, words, prog="dpo-jax generate"))


def _of_images(words: list[str]) -> bool:
    """Whether the model that the options name is a pipeline of images; a folder says so itself, a hub id is asked."""
    import re
    from itertools import pairwise
    from pathlib import Path

    named = [word.partition("=")[2] for word in words if word.startswith("--model=")]
    named += [after for word, after in pairwise(words) if word == "--model"]
    if not named:
        return False
    index, folder = "model_index.json", Path(named[-1])
    if folder.exists():
        return (folder / index).exists() or (folder / "export" / index).exists()
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", named[-1]):
        return False
    from huggingface_hub import file_exists, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(named[-1], index), str):
        return True
    try:
        return file_exists(named[-1], index)
    except Exception:  # no network: opening the model will say so
        return False


def _export(words: list[str]) -> None:
    from dpo_jax.cli.configs import parse
    from dpo_jax.cli.export import ExportConfig, export_command

    export_command(parse(ExportConfig, words, prog="dpo-jax export"))


def _demo(words: list[str]) -> None:
    from dpo_jax.cli.configs import parse

    if "--diffusion" in words:
        from dpo_jax.cli.demo_shapes import ImageDemoConfig, demo_images

        words = [word for word in words if word != "--diffusion"]
        demo_images(parse(ImageDemoConfig, words, prog="dpo-jax demo --diffusion"))
        return
    from dpo_jax.cli.demo import DemoConfig, demo_command

    demo_command(parse(DemoConfig, words, prog="dpo-jax demo"))


def _methods(words: list[str]) -> None:
    from dpo_jax.cli.configs import parse
    from dpo_jax.cli.methods import MethodsConfig, methods_command

    methods_command(parse(MethodsConfig, words, prog="dpo-jax methods"))
