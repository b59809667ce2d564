"""A tiny Llama-type Hugging Face folder: random weights, and a BPE tokenizer trained on given texts.

python tests/make_tiny_checkpoint.py --out DIR --data rows.jsonl.gz
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def texts_of(path: Path) -> Iterator[str]:
    """Every string in the rows of a JSONL(.gz) file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            for value in json.loads(line).values():
                if isinstance(value, str):
                    yield value


def make_tokenizer(
    texts: Iterable[str], *, vocabulary_size: int = 2048, chat_template: str | None = None, eos_is_pad: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s>, </s> and <pad>; adds <s> in front by itself."""
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>" if eos_is_pad else "<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def llama_config(**changes) -> dict:
    """config.json of a tiny Llama in the layout of transformers 5."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }
    return {**config, **changes}


def llama_tensors(config: dict, *, seed: int = 0, scale: float = 0.05) -> dict[str, np.ndarray]:
    """Random float32 tensors under their published names; norms and biases are not trivial either."""
    rng = np.random.default_rng(seed)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        for part, sizes, bias in (
            ("self_attn", attention, config["attention_bias"]),
            ("mlp", mlp, config["mlp_bias"]),
        ):
            for name, size in sizes.items():
                shapes[f"{prefix}{part}.{name}.weight"] = size
                if bias:
                    shapes[f"{prefix}{part}.{name}.bias"] = size[:1]
        shapes |= {f"{prefix}{name}.weight": (d,) for name in ("input_layernorm", "post_attention_layernorm")}

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.normal(0, scale, shape)
        return (1 + noise if "norm" in name else noise).astype(np.float32)

    return {name: values(name, shape) for name, shape in shapes.items()}


def make_tiny_checkpoint(
    folder: str | Path,
    *,
    texts: Iterable[str] = (),
    seed: int = 0,
    scale: float = 0.05,
    chat_template: str | None = None,
    eos_is_pad: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **changes,
) -> Path:
    """Write the folder; the tokenizer is given or made of the texts; `changes` are keys of config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = llama_config(**changes)
    tokenizer = tokenizer or make_tokenizer(
        texts, vocabulary_size=config["vocab_size"], chat_template=chat_template, eos_is_pad=eos_is_pad
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": config["eos_token_id"]}))
    save_file(llama_tensors(config, seed=seed, scale=scale), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data", required=True, help="JSONL(.gz) rows whose strings train the tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat-template", action="store_true")
    arguments = parser.parse_args()
    template = CHAT_TEMPLATE if arguments.chat_template else None
    texts = texts_of(Path(arguments.data))
    print(make_tiny_checkpoint(arguments.out, texts=texts, seed=arguments.seed, chat_template=template))


if __name__ == "__main__":
    main()
