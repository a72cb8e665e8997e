"""The shapes of models that our recipes name, so that a plan needs no download. Used only where no config.json is at hand, and said so.

Each is what the model's public config.json says (huggingface.co/<name>/raw/main/config.json); the embedded ones are ours, and a test holds
them against what harness.embedded makes.
"""


def _llama(hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, **others) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    } | others


def _qwen3(hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int, **others) -> dict:
    shape = _llama(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads)
    return shape | {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936} | others


_LLAMA_8B, _LLAMA_70B = _llama(4096, 14336, 32, 32), _llama(8192, 28672, 80, 64)
_QWEN25_7B = _llama(3584, 18944, 28, 28) | {"model_type": "qwen2", "num_key_value_heads": 4, "vocab_size": 152064}

def _tiny(width: int, vocab_size: int = 510) -> dict:
    shape = _llama(width, 2 * width, 2, 4, num_key_value_heads=4)
    return shape | {"head_dim": width // 4, "vocab_size": vocab_size, "tie_word_embeddings": True}


KNOWN = {
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_8B,
    "meta-llama/Llama-3.2-1B-Instruct": _llama(2048, 8192, 16, 32, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA_70B,
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "Qwen/Qwen2.5-7B": _QWEN25_7B,
    "Qwen/Qwen2.5-7B-Instruct": _QWEN25_7B,
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tie_word_embeddings=True),
    "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-32B": _qwen3(5120, 25600, 64, 64),
    "embedded:tiny-llama": _tiny(64),
    "embedded:tiny-student": _tiny(32),
    "embedded:decide-llama": _tiny(64, 504),
    # What the quickstart's stages make.
    "runs/quickstart/base/final": _tiny(64),
    "runs/quickstart/adapt/merged": _tiny(64),
    "runs/quickstart/distill/final": _tiny(32),
    # And those of `make decide`.
    "runs/decide-tiny/base/final": _tiny(64, 504),
}
