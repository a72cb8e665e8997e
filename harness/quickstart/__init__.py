"""The embedded default: a small world of tools, a tokenizer and a tiny Llama, so that training can be shown without a model hub."""
