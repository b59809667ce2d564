"""The compiled train step holds nothing of the size tokens x vocabulary, neither for the policy nor the reference."""

import re

import jax
import numpy as np
import optax
from toy_model import ragged_examples

from dpo_jax.language.data.batches import epoch_batches
from dpo_jax.language.data.dealing import plan_layout
from dpo_jax.language.data.pack import example_lengths
from dpo_jax.language.methods import dpo_loss, wpo_loss
from dpo_jax.language.models.decoder import RULES, DecoderConfig, decoder_function, init_variables
from dpo_jax.language.objectives import from_loss
from dpo_jax.plan import step_needs
from dpo_jax.sharding import make_mesh, shard_batch
from dpo_jax.train import compile_step, init_state, make_train_step

WORDS = 16_384
CONFIG = DecoderConfig(WORDS, 16, 32, 1, 2, 2, 8)


def compiled_step(loss):
    examples = ragged_examples(40, longest=64)
    layout = plan_layout(example_lengths(examples), batch_size=40, seed=None).layout
    mesh, optimizer = make_mesh(devices=jax.devices()[:1]), optax.adamw(1e-3)
    state = init_state(init_variables(CONFIG, jax.random.key(0)), optimizer, jax.random.key(0))
    step, state = compile_step(
        make_train_step(from_loss(loss), decoder_function(CONFIG), optimizer), state, mesh, RULES
    )
    batch = shard_batch(epoch_batches(examples, layout, batch_size=40)[0], mesh)
    compiled = step.lower(state, batch).compile()
    return compiled, step_needs(compiled, state, batch), int(np.prod(batch.target.shape))


def test_no_array_of_tokens_times_vocabulary():
    for loss in (dpo_loss, wpo_loss):
        compiled, needs, tokens = compiled_step(loss)
        assert tokens > 1500
        shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
        largest = max(np.prod([int(n) for n in shape.split(",")]) for shape in set(shapes))
        assert largest < tokens * WORDS / 4
        assert needs.temporaries < tokens * WORDS * 4
