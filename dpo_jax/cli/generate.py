"""`dpo-jax generate`: completions of prompts by sampling or beam search, to a file or to the terminal."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dpo_jax.cli.checks import check_ranges, mesh_of, option
from dpo_jax.cli.configs import MeshConfig, ModelConfig
from dpo_jax.cli.console import OutputConfig, UsageError, result, say
from dpo_jax.cli.data import layout_of
from dpo_jax.cli.models import OpenModel, open_model, open_reward_model
from dpo_jax.cli.processes import is_first, join_processes
from dpo_jax.language.data.annotate import completion_rewards, each_example
from dpo_jax.language.data.batches import epoch_batches
from dpo_jax.language.data.encode import encode_prompts
from dpo_jax.language.data.rows import PreferenceRow, RowError, parse_row
from dpo_jax.language.models.decoder import empty_cache, most_decoded
from dpo_jax.language.sampling.beam import implicit_value, length_power
from dpo_jax.language.sampling.engine import Completion, Engine, generate, make_engine, prompt_keys
from dpo_jax.language.sampling.filters import Sampling
from dpo_jax.language.sampling.search import make_searcher, search
from dpo_jax.language.sampling.steps import CachedModel, guided
from dpo_jax.language.sampling.text import best_of, cut_at, held_back, stop_strings, text_of
from dpo_jax.language.types import Example
from dpo_jax.rows import json_records
from dpo_jax.sharding import data_shards
from dpo_jax.types import PyTree


@dataclass(frozen=True)
class GenerateConfig:
    """Complete prompts from the command line or a file; without either, lines of standard input one by one."""

    model: str
    """Folder of a Hugging Face checkpoint, a hub id, or the folder of a run (its export)."""
    prompt: tuple[str, ...] = ()
    """Prompts."""
    data: tuple[str, ...] = ()
    """Files of rows with a prompt, JSONL or JSONL.gz; what else a row holds is not looked at."""
    out: str | None = None
    """File to write, one JSON object per prompt; without it the completions are printed."""
    samples: int = 1
    """Completions of each prompt; of a beam search, the best ones it found."""
    max_new_tokens: int = 128
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Of the sampling; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 from all."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this probability."""
    min_p: float = 0.0
    """Draw from tokens of at least this share of the largest probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that prompt or completion hold become less probable."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion, which is cut before them."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a completion, besides the end of text."""
    beam_width: int = 0
    """Beams of a search for the most likely completion; 0 samples."""
    length_penalty: float = 0.0
    """Beams are compared by score / tokens^this."""
    reference_model: str | None = None
    """Reference of the model: beams and the best of several samples are then ranked by implicit value."""
    tuned_model: str | None = None
    """Guide the model by what tuning did to another one of the same vocabulary (proxy tuning)."""
    untuned_model: str | None = None
    """The other model before tuning."""
    guidance_strength: float = 1.0
    """Of the guidance; 0 is the model alone."""
    best_by: Literal["none", "logp", "mean-logp", "value", "reward"] = "none"
    """Keep one of the samples: by log-probability, its mean over tokens, implicit value, or a reward model."""
    reward_model: str | None = None
    """Reward model for --best-by reward."""
    chat_template: Literal["auto", "never", "always"] = "auto"
    """Render dialogues and messages only, nothing, or plain prompts too, as a user's message."""
    seed: int = 0
    """Of the sampling."""
    batch_size: int = 32
    """Completions (in a beam search, prompts) at a time."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the models compute in."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output: OutputConfig = field(default_factory=OutputConfig)


class _Models(NamedTuple):
    """The models in lock-step, their weights, the words that end a completion, and how several are combined."""

    cached: list[CachedModel]
    variables: tuple[PyTree, ...]
    tokenizer: Any
    stop_tokens: tuple[int, ...]
    words: int
    combine: Any
    positions: int  # that a cache of the model can hold; 0 for any number


def generate_command(config: GenerateConfig) -> None:
    """Generate, and write or print.

    Raises:
      UsageError: options out of range, missing or without effect; models of different vocabularies.
    """
    sampling = check_generate(config)
    if config.mesh.distributed:
        join_processes()
    mesh = mesh_of(config.mesh)
    models = _open_models(config, mesh)
    if not (config.prompt or config.data):
        _interactive(config, models, sampling, mesh)
        return
    rows = [PreferenceRow(text, (), file="--prompt", number=n) for n, text in enumerate(config.prompt, 1)]
    rows += _read_prompts(config.data)
    prompts = encode_prompts(rows, models.tokenizer, chat_template=config.chat_template)
    _check_length(config, models, prompts)
    begun = time.perf_counter()
    answers = _beams(config, models, prompts, mesh) if config.beam_width else None
    if answers is None:
        answers = _samples(config, models, sampling, prompts, mesh)
    seconds = time.perf_counter() - begun
    lines = [{"prompt": row.prompt, "completions": several} for row, several in zip(rows, answers, strict=True)]
    if is_first():
        _write(config, lines, seconds)


def check_generate(config: GenerateConfig) -> Sampling:
    """Raise UsageError for options that are missing, out of range or without effect; the sampling that is asked for."""
    check_ranges(config)
    for name, least in (("samples", 1), ("max_new_tokens", 1), ("beam_width", 0)):
        if getattr(config, name) < least:
            raise UsageError(f"{option(name)} is {getattr(config, name)}; give at least {least}")
    names = [f.name for f in fields(Sampling)]
    try:
        sampling = Sampling(**{name: getattr(config, name) for name in names})
        length_power(config.length_penalty)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not 0 <= config.guidance_strength < float("inf"):
        raise UsageError(f"--guidance-strength is {config.guidance_strength}; give a number from 0 on")
    guides = (config.tuned_model, config.untuned_model)
    asked, beams = bool(config.prompt or config.data), config.beam_width > 0
    changed = [option(n) for n in [*names, "stop", "best_by", "seed"] if getattr(config, n) != getattr(_DEFAULTS, n)]
    sentences = {
        "a stop string is empty; give text": "" in config.stop,
        "--prompt is empty; give text": "" in config.prompt,
        "--out has no effect without --prompt or --data": not asked and config.out is not None,
        f"{', '.join(changed)} has no effect with --beam-width": beams and bool(changed),
        "--length-penalty has no effect without --beam-width": not beams and config.length_penalty != 0,
        f"--samples is {config.samples}, more than --beam-width {config.beam_width} can find": (
            beams and config.samples > config.beam_width
        ),
        "--tuned-model and --untuned-model are given together or not at all": (guides[0] is None)
        != (guides[1] is None),
        "--guidance-strength has no effect without --tuned-model": guides[0] is None and config.guidance_strength != 1,
        "--reference-model and --tuned-model do not go together: a value needs the model itself": (
            guides[0] is not None and config.reference_model is not None
        ),
        "--reference-model has no effect without --beam-width or --best-by value": (
            config.reference_model is not None and not beams and config.best_by != "value"
        ),
        "--best-by value needs --reference-model": config.best_by == "value" and config.reference_model is None,
        "--best-by reward needs --reward-model": config.best_by == "reward" and config.reward_model is None,
        "--reward-model has no effect without --best-by reward": (
            config.best_by != "reward" and config.reward_model is not None
        ),
        "--best-by needs --samples of 2 or more": config.best_by != "none" and config.samples < 2,
        "a session at the terminal answers once, by sampling; leave --samples, --beam-width and --json": (
            not asked and (config.samples > 1 or beams or config.output.json)
        ),
        "a session at the terminal runs in one process; give --prompt or --data": not asked and config.mesh.distributed,
    }
    for sentence, wrong in sentences.items():
        if wrong:
            raise UsageError(sentence)
    if missing := [path for path in config.data if not Path(path).exists()]:
        raise UsageError(f"no such file: {', '.join(missing)}")
    return sampling


_DEFAULTS = GenerateConfig(model="")


def _open_models(config: GenerateConfig, mesh: Mesh) -> _Models:
    options = ModelConfig(dtype=config.dtype, param_dtype=config.dtype)
    export = Path(config.model) / "export"
    folder = str(export) if (export / "config.json").exists() else config.model
    others = [name for name in (config.reference_model, config.tuned_model, config.untuned_model) if name is not None]
    opened = [open_model(name, options) for name in (folder, *others)]
    first = opened[0]
    for name, other in zip(others, opened[1:]):
        if other.config.vocabulary_size != first.config.vocabulary_size:
            sizes = f"{other.config.vocabulary_size} words and {folder} {first.config.vocabulary_size}"
            raise UsageError(f"{name} has {sizes}; models in lock-step need one vocabulary")
    say(f"reading {', '.join(str(model.folder) for model in opened)}")
    return _Models(
        [CachedModel(model.apply_fn, partial(empty_cache, model.config)) for model in opened],
        tuple(model.load(mesh) for model in opened),
        first.tokenizer,
        _stop_tokens(first, config.stop_tokens),
        first.config.vocabulary_size,
        guided(config.guidance_strength) if config.tuned_model else None,
        min((most for model in opened if (most := most_decoded(model.config))), default=0),
    )


def _stop_tokens(model: OpenModel, given: Sequence[int]) -> tuple[int, ...]:
    """The ids given, the tokenizer's EOS, and those of generation_config.json."""
    if wrong := [token for token in given if not 0 <= token < model.config.vocabulary_size]:
        raise UsageError(f"--stop-tokens {wrong} are no words; ids go from 0 to {model.config.vocabulary_size - 1}")
    file = model.folder / "generation_config.json"
    more = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    more = more if isinstance(more, list) else [more]
    return tuple(sorted({token for token in (*given, model.tokenizer.eos_token_id, *more) if token is not None}))


def _read_prompts(paths: Sequence[str]) -> list[PreferenceRow]:
    """Rows of JSONL files; those without an answer have only a prompt.

    Raises:
      RowError: a line that is no row with a prompt.
    """
    rows = []
    for path in paths:
        for file, number, row in json_records(Path(path)):
            if isinstance(row, RowError):
                raise row
            if isinstance(row, dict) and "prompt" in row:
                row = {name: row[name] for name in ("prompt", "prefix") if name in row} | {"completion": "-"}
            rows.append(parse_row(row, file=file, number=number))
    if paths and not rows:
        raise ValueError(f"{', '.join(paths)}: no prompt is there")
    return rows


def _check_length(config: GenerateConfig, models: _Models, prompts: Sequence[np.ndarray]) -> None:
    longest = max(map(len, prompts)) + config.max_new_tokens
    if models.positions and longest > models.positions:
        raise UsageError(
            f"the longest prompt and --max-new-tokens make {longest} tokens, and the model decodes at most "
            f"{models.positions}; give fewer"
        )


def _rows_at_once(wanted: int, jobs: int, mesh: Mesh) -> int:
    """As many as wanted, no more than there is work for, and a multiple of the parts of the mesh."""
    shards = data_shards(mesh)
    return -(-min(wanted, jobs) // shards) * shards


def _engine(config: GenerateConfig, models: _Models, sampling: Sampling, mesh: Mesh, **sizes: int) -> Engine:
    return make_engine(
        models.cached,
        new_tokens=config.max_new_tokens,
        stop_tokens=models.stop_tokens,
        sampling=sampling,
        combine=models.combine,
        vocabulary_size=models.words,
        mesh=mesh,
        **sizes,
    )


def _samples(
    config: GenerateConfig, models: _Models, sampling: Sampling, prompts: Sequence[np.ndarray], mesh: Mesh
) -> list[list[dict[str, Any]]]:
    rows = _rows_at_once(config.batch_size, len(prompts) * config.samples, mesh)
    engine = _engine(config, models, sampling, mesh, rows=rows)
    keys = prompt_keys(jax.random.key(config.seed), len(prompts))
    end_test = stop_strings(models.tokenizer, config.stop) if config.stop else None
    answers = generate(engine, models.variables, prompts, keys, samples=config.samples, end_test=end_test)
    if config.best_by != "none":
        answers = [[best] for best in _best(config, prompts, answers, mesh)]

    def described(one: Completion) -> dict[str, Any]:
        text = cut_at(text_of(models.tokenizer, one.tokens), config.stop)
        return {"text": text, "logp": float(one.logps[0].sum()), "tokens": one.tokens.tolist()}

    return [[described(one) for one in several] for several in answers]


def _best(
    config: GenerateConfig, prompts: Sequence[np.ndarray], answers: list[list[Completion]], mesh: Mesh
) -> list[Completion]:
    """The best sample of each prompt."""
    if config.best_by == "reward":
        values = _rewards(config, prompts, answers, mesh)
        return best_of(answers, lambda place, _: values[place].tolist())
    scorers = {
        "logp": lambda one: one.logps[0].sum(),
        "mean-logp": lambda one: one.logps[0].mean(),
        "value": lambda one: (one.logps[0] - one.logps[1]).sum(),
    }
    return best_of(answers, lambda _, several: list(map(scorers[config.best_by], several)))


def _rewards(
    config: GenerateConfig, prompts: Sequence[np.ndarray], answers: list[list[Completion]], mesh: Mesh
) -> list[np.ndarray]:
    """What the reward model says of each completion, [samples] for each prompt."""
    options = ModelConfig(dtype=config.dtype, param_dtype=config.dtype)
    model = open_reward_model(str(config.reward_model), options)
    examples = [Example(prompt, tuple(one.tokens for one in several)) for prompt, several in zip(prompts, answers)]
    plan = layout_of(examples, batch_size=config.batch_size, row_multiple=data_shards(mesh), seed=None, padded=False)
    stream = epoch_batches(
        examples, plan.layout, batch_size=config.batch_size, host=jax.process_index(), hosts=jax.process_count()
    )
    return each_example(partial(completion_rewards, model.apply_fn), model.load(mesh), stream, mesh)


def _beams(
    config: GenerateConfig, models: _Models, prompts: Sequence[np.ndarray], mesh: Mesh
) -> list[list[dict[str, Any]]]:
    searcher = make_searcher(
        models.cached,
        width=config.beam_width,
        new_tokens=config.max_new_tokens,
        stop_tokens=models.stop_tokens,
        token_scores=implicit_value(1.0) if config.reference_model else None,
        normaliser=length_power(config.length_penalty) if config.length_penalty else None,
        combine=models.combine,
        groups=_rows_at_once(config.batch_size, len(prompts), mesh),
        mesh=mesh,
    )
    return [
        [
            {
                "text": text_of(models.tokenizer, one.tokens),
                "logp": float(one.logps[0]),
                "tokens": one.tokens.tolist(),
                "score": one.score,
            }
            for one in several[: config.samples]
        ]
        for several in search(searcher, models.variables, prompts)
    ]


def _write(config: GenerateConfig, lines: list[dict[str, Any]], seconds: float) -> None:
    """The lines to a file or to standard output."""
    texts = [json.dumps(line, ensure_ascii=False) + "\n" for line in lines]
    if config.out is None and config.output.json:
        sys.stdout.writelines(texts)
        return
    if config.out is None:
        for line in lines:
            for one in line["completions"]:
                print(one["text"])
        return
    Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    Path(config.out).write_text("".join(texts), encoding="utf-8")
    tokens = sum(len(one["tokens"]) for line in lines for one in line["completions"])
    values = {"out": config.out, "prompts": len(lines), "tokens": tokens, "seconds": seconds}
    result(values, f"{len(lines)} prompts answered in {seconds:.1f} s: {config.out}", as_json=config.output.json)


def _typed() -> Iterator[str]:
    """Lines of standard input that are not blank, asked for if a person is there."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _interactive(config: GenerateConfig, models: _Models, sampling: Sampling, mesh: Mesh) -> None:
    """Answer one line after the other, token by token; every line stands alone."""
    shards = data_shards(mesh)
    engine = _engine(config, models, sampling, mesh, rows=shards, prefill_rows=shards, chunk=1)
    end_test = stop_strings(models.tokenizer, config.stop) if config.stop else None
    for number, text in enumerate(_typed()):
        prompts = encode_prompts([PreferenceRow(text, ())], models.tokenizer, chat_template=config.chat_template)
        _check_length(config, models, prompts)
        printed = 0

        def show(prompt: int, sample: int, tokens: np.ndarray, over: bool) -> None:
            nonlocal printed
            said = text_of(models.tokenizer, tokens)
            said = cut_at(said, config.stop) if over else held_back(said, config.stop)
            print(said[printed:], end="\n" if over else "", flush=True)
            printed = max(printed, len(said))

        key = jax.random.fold_in(jax.random.key(config.seed), number)
        generate(engine, models.variables, prompts, prompt_keys(key, 1), end_test=end_test, listener=show)
