"""From a loss to an objective: the argument names of the loss say which models run and what is computed."""

import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpo_jax.diffusion.draws import normal, split_keys
from dpo_jax.diffusion.errors import STATISTICS, Inputs, measure, noised_inputs
from dpo_jax.diffusion.process import Process, draw_times, level_of
from dpo_jax.diffusion.schedule import offset_noise as with_offset
from dpo_jax.diffusion.schedule import snr
from dpo_jax.diffusion.types import IMAGES, DiffusionBatch, Predict, TrajectoryBatch
from dpo_jax.signatures import read_needs
from dpo_jax.types import Array, LossOutput, PyTree

Loss = Callable[..., LossOutput]
MakeInputs = Callable[..., Inputs]

_NAMES = {name for names in IMAGES.values() for name in names}
_SIDE = f"(?:({'|'.join(sorted(_NAMES, key=len, reverse=True))})_)?"
_OF_ONE_MODEL = re.compile(rf"(policy|reference)_{_SIDE}({'|'.join((*STATISTICS, 'step_logps'))})")
_OF_THE_INPUTS = re.compile(rf"{_SIDE}(target)")
_OF_BOTH_MODELS = re.compile(rf"{_SIDE}(step_gap)")
_OF_THE_LEVEL = ("timesteps", "alphas_cumprod", "sigmas", "log_snr")
_OF_THE_STEPS = ("step_stds",)
_OF_THE_BATCH = ("weight", "valid")


class Origin(NamedTuple):
    """Where an array argument comes from.

    Attributes:
      maker: "policy", "reference", "both", "inputs", "level", "steps", "batch" or "column".
      statistic: `error`, `frame_error`, `pred`, `step_logps`, `target`, ...; the argument's own name for a column.
      side: name of one image ("chosen", "rejected", ...), or None for all of them.
    """

    maker: str
    statistic: str
    side: str | None


def origin(name: str) -> Origin:
    """Where an argument of this name comes from, unless a column of the data gives it."""
    if match := _OF_ONE_MODEL.fullmatch(name):
        return Origin(match[1], match[3], match[2])
    if match := _OF_BOTH_MODELS.fullmatch(name):
        return Origin("both", match[2], match[1])
    if match := _OF_THE_INPUTS.fullmatch(name):
        return Origin("inputs", match[2], match[1])
    if name in _OF_THE_LEVEL:
        return Origin("level", name, None)
    if name in _OF_THE_BATCH:
        return Origin("batch", name, None)
    return Origin("steps" if name in _OF_THE_STEPS else "column", name, None)


def form_of(loss: Loss) -> str:
    """The form of row that a loss reads (a key of `IMAGES`): that of the images that its arguments name.

    Raises:
      TypeError: no form has all of them.
    """
    named = {side for name in read_needs(loss).arrays for side in [origin(name).side] if side}
    if not named:
        return "lists"
    forms = [form for form, names in IMAGES.items() if named <= set(names)]
    if not forms:
        raise TypeError(f"no form of rows has the images {sorted(named)}; the forms are {dict(IMAGES)}")
    return forms[0]


def reads_trajectories(loss: Loss) -> bool:
    """Whether a loss is one of recorded sampling steps instead of noised images."""
    return any(origin(name).statistic in ("step_logps", "step_gap") for name in read_needs(loss).arrays)


def needs_reference(loss: Loss, inputs: MakeInputs = noised_inputs, columns: Collection[str] = ()) -> bool:
    """Whether a reference model must run, for the loss's arrays or to make the inputs."""
    asked = (name for name in read_needs(loss).arrays if name not in columns)
    return any(origin(name).maker in ("reference", "both") for name in asked) or (
        "reference" in read_needs(inputs).arrays
    )


_GIVEN = ("clean", "noise", "own_noise", "times", "condition", "process", "policy", "reference", "images")


def column_names(loss: Loss, inputs: MakeInputs = noised_inputs) -> tuple[str, ...]:
    """Names that only the data can give: the loss's, then those of the function that makes the inputs."""
    of_loss = [name for name in read_needs(loss).arrays if origin(name).maker == "column"]
    return tuple(dict.fromkeys([*of_loss, *(name for name in read_needs(inputs).arrays if name not in _GIVEN)]))


def from_loss(
    loss: Loss, process: Process, *, inputs: MakeInputs = noised_inputs, offset_noise: float = 0.0, **hyper: Any
):
    """Objective `(policy, reference, batch, key, loss_state) -> LossOutput` of a loss of noised images.

    What the loss and the inputs name is computed and handed over, nothing else; a column wins over a computation. The
    images of a row share the timestep, and the noise unless the inputs take `own_noise`. A row draws from its seed,
    where the batch has seeds: then neither microbatches nor devices nor hosts change the step.

    Args:
      loss: keyword-only function. `policy_chosen_error` and the like are float32 [B], without a side `policy_error`
        [B, K]; `timesteps`, `alphas_cumprod`, `sigmas` and `log_snr` are the row's, [B]; `weight` [B] is the batch's, 0
        for empty places, which statistics of the batch leave out; `valid` [B, K], 0 at the images that a list has not,
        is 1 unless a column gives it; other names are columns.
      process: what the models were trained to undo.
      inputs: what the models are asked, `errors.noised_inputs` unless a paper has its own. By name it gets `clean` and
        `noise` (`own_noise`: drawn for each image) [N, ...], `times` [N], `condition`, `process`, the models `policy`
        and `reference`, keys [N] as `key`, the number of `images` in a row, and columns [B, ...]; it has
        hyper-parameters too.
      offset_noise: strength of one more Gaussian shift of each image and channel, see `schedule.offset_noise`.
      hyper: hyper-parameters of the loss and of the inputs.

    Raises:
      TypeError: a hyper-parameter that neither has; when traced, a column, a reference or an image that is missing.
    """
    needs, asks, form = read_needs(loss), read_needs(inputs), form_of(loss)
    if unknown := set(hyper) - set(needs.hyper) - set(asks.hyper):
        known = sorted({*needs.hyper, *asks.hyper})
        raise TypeError(f"{loss.__name__} has no option {sorted(unknown)}; its options are {known}")
    of_loss = {name: value for name, value in hyper.items() if name in needs.hyper}
    of_inputs = {name: value for name, value in hyper.items() if name in asks.hyper}

    def objective(
        policy: Predict, reference: Predict | None, batch: DiffusionBatch, key: Array, loss_state: PyTree = None
    ) -> LossOutput:
        columns = {name: jnp.asarray(x) for name, x in batch.columns.items()}
        origins = {name: origin(name) for name in needs.arrays if name not in columns}
        wanted = {name for name, source in origins.items() if source.maker == "column"}
        wanted |= set(asks.arrays) - set(_GIVEN) - set(columns)
        if wanted:
            have = f"the columns {sorted(columns)}" if columns else "no columns"
            raise TypeError(f"{loss.__name__} needs the columns {sorted(wanted)}, and the data has {have}")
        if reference is None and needs_reference(loss, inputs, columns):
            raise TypeError(f"{loss.__name__} needs a reference: give the state one")
        draw_key, loss_key = jax.random.split(key)
        given, fresh = _given(batch, process, draw_key, offset_noise)
        given |= {"policy": policy, "reference": reference}
        given |= {name: columns[name] for name in asks.arrays if name not in _GIVEN}
        special = {"key": fresh} if asks.key else {}
        made = inputs(**{name: given[name] for name in asks.arrays}, **special, **of_inputs)
        rows = batch.weight.shape[0]
        values = _computed(set(origins.values()), policy, reference, made, process, rows)
        values |= of_batch(batch)
        arrays = {
            name: columns[name] if name in columns else side_of(values, origins[name], form) for name in needs.arrays
        }
        special = {"loss_state": loss_state} if needs.state else {}
        special |= {"key": loss_key} if needs.key else {}
        return loss(**arrays, **special, **of_loss)

    return objective


def _given(batch: DiffusionBatch, process: Process, key: Array, offset: float) -> tuple[dict[str, Any], Array]:
    """What the inputs are made of, [N, ...], and keys [N] of their own draws; the images of a row share the timestep
    and `noise`."""
    rows, images, *shape = batch.latents.shape

    def merged(array: Array) -> Array:
        array = jnp.broadcast_to(array, (rows, images, *array.shape[2:]))
        return array.reshape(rows * images, *array.shape[2:])

    def of_images(keys: Array, images: int) -> Array:
        return split_keys(keys, images).T.reshape(-1)

    def gaussian(keys: Array, images: int) -> Array:
        """[B, images, ...]"""
        plain, shifted = split_keys(of_images(keys, images), 2)
        flat = normal(plain, (rows * images, *shape))
        flat = with_offset(shifted, flat, strength=offset) if offset else flat
        return flat.reshape(rows, images, *shape)

    of_rows = jax.random.split(key, rows) if batch.seeds is None else jax.vmap(jax.random.key)(batch.seeds)
    time_keys, spread_keys, shared_keys, own_keys, fresh_keys = split_keys(of_rows, 5)
    clean = jnp.asarray(batch.latents, jnp.float32)
    if batch.spread is not None:
        clean = clean + batch.spread * normal(spread_keys, clean.shape)
    times = jax.vmap(lambda one: draw_times(process, one, (1,)))(time_keys)
    given = {
        "noise": merged(gaussian(shared_keys, 1)),
        "own_noise": merged(gaussian(own_keys, images)),
        "clean": merged(clean),
        "times": merged(times),
        "condition": jax.tree.map(merged, batch.condition),
        "process": process,
        "images": images,
    }
    return given, of_images(fresh_keys, images)


def _computed(
    origins: set[Origin],
    policy: Predict,
    reference: Predict | None,
    inputs: Inputs,
    process: Process,
    rows: int,
) -> dict[tuple[str, str], Array]:
    """[B, K, ...] (of the level: [B]) of each origin, with one forward of each model that is needed."""

    def split(array: Array) -> Array:
        return array.reshape(rows, -1, *array.shape[1:])

    if inputs.weights is not None and (no := sorted(o.statistic for o in origins if o.maker in ("inputs", "level"))):
        raise TypeError(f"images that are asked about along a trajectory have no {no} of their own")
    values: dict[tuple[str, str], Array] = {}
    for maker, model in (("policy", policy), ("reference", reference)):
        names = sorted({source.statistic for source in origins if source.maker == maker})
        if names:
            assert model is not None
            measured = measure(model, inputs, process, names)
            measured = measured if maker == "policy" else jax.lax.stop_gradient(measured)
            values |= {(maker, name): split(array) for name, array in measured.items()}
    if any(source.maker == "inputs" for source in origins):
        values["inputs", "target"] = split(inputs.target)
    if any(source.maker == "level" for source in origins):
        times = split(inputs.times)[:, 0]
        level = level_of(process, times)
        values["level", "timesteps"] = times
        values["level", "alphas_cumprod"] = jnp.square(level.alpha)
        values["level", "sigmas"] = jnp.asarray(level.sigma)
        values["level", "log_snr"] = jnp.log(jnp.maximum(snr(level), 1e-30))
    return values


def of_batch(batch: DiffusionBatch | TrajectoryBatch) -> dict[tuple[str, str], Array]:
    """What the batch says of its places: float32 `weight` [B] of the rows, `valid` [B, K] of their images."""
    weight = jnp.asarray(batch.weight, jnp.float32)
    return {("batch", "weight"): weight, ("batch", "valid"): jnp.ones(batch.latents.shape[:2], jnp.float32)}


def side_of(values: dict[tuple[str, str], Array], source: Origin, form: str) -> Array:
    """[B, K, ...] -> [B, ...] of the image that an argument's name speaks of, or all of them."""
    whole = values[source.maker, source.statistic]
    if source.side is None:
        return whole
    if whole.shape[1] != len(IMAGES[form]):
        raise TypeError(f"{source.side} is one of {form}, and the rows have {whole.shape[1]} images each")
    return whole[:, IMAGES[form].index(source.side)]
