"""The shape of a decoder as data: sizes, and the features in which the families differ."""

from dataclasses import dataclass, field
from typing import Literal

from dpo_jax.language.models.rope import RopeConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder, and how it runs.

    Attributes:
      vocabulary_size, hidden_size, intermediate_size, layers, heads, key_value_heads, head_dim: V, D, F, depth, H, ...
      norm_epsilon: of the norms.
      rope: rotary positions.
      tie_embeddings: the head is the embedding.
      reward: the head is one row that makes a number of the last hidden state, instead of the vocabulary's.
      attention_bias, mlp_bias: biases in the projections.
      initializer_range: standard deviation of random kernels and embeddings.
      dtype: type of the computation; norms, rotations, softmax and log-probs are float32.
      param_dtype: type of the parameters.
      remat: what a layer's backward pass computes again: "none", "dots" (all but matrix products, though those of
        experts too), "full".
      family: whose checkpoints it is read from and written as, such as "llama" or "qwen2".
      qkv_bias: biases in query, key and value, also where the attention has no others.
      head_bias: a bias for each word of the vocabulary.
      norm: root-mean-square ("rms"), the same with scales that count from one ("rms_offset"), or "layer".
      query_key_norm: queries and keys are normed head by head before they are rotated.
      post_norms: what attention and feed-forward give is normed once more before it is added.
      activation: of the feed-forward part, "gelu_tanh" being the approximation by tanh.
      gated: the activation's result is multiplied by a second projection.
      residual: "sequential"; "parallel" adds attention and feed-forward of the same input, each with a norm of its own;
        "parallel_shared" gives both the same norm.
      rotary_dim: how many of a head's dimensions are rotated; all of them by default.
      learned_positions: number of learned positions, which then stand in for the rotation; a token behind the last of
        them gets NaN. 0 for none.
      window: a token sees keys at a path distance below this; all of them by default.
      local_layers: which layers the window and `local_rope` hold for; empty for all.
      local_rope: rotary positions of the local layers, `rope` by default.
      embedding_scale: embeddings are multiplied by sqrt(D), rounded to the compute dtype.
      query_scalar: scores are divided by the root of it; head_dim by default.
      attention_softcap, logit_softcap: scores and logits become `cap * tanh(x / cap)`.
      experts: number of experts in the feed-forward part of every layer (E); 0 for a dense one.
      experts_per_token: how many of them each token uses (k).
      expert_intermediate_size: F of one expert; `intermediate_size` by default.
      renormalize_experts: the weights of the chosen experts are made to sum to 1.
      router_loss: weight of the load-balancing loss, which is added to the loss of every example; 0 leaves it a metric.
    """

    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    norm_epsilon: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = False
    reward: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    family: str = "llama"
    qkv_bias: bool = False
    head_bias: bool = False
    norm: Literal["rms", "rms_offset", "layer"] = "rms"
    query_key_norm: bool = False
    post_norms: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    residual: Literal["sequential", "parallel", "parallel_shared"] = "sequential"
    rotary_dim: int | None = None
    learned_positions: int = 0
    window: int | None = None
    local_layers: tuple[bool, ...] = ()
    local_rope: RopeConfig | None = None
    embedding_scale: bool = False
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int | None = None
    renormalize_experts: bool = True
    router_loss: float = 0.0
