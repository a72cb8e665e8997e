"""A small engine of vLLM's calls, as far as TRL's VLLMGeneration makes them: it has its own copy of the model, which knows only the weights
that it is handed, reads one prompt at a time, and says the most probable token."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model: str, max_model_len: int, max_num_seqs: int, gpu_memory_utilization: float, **settings):
        from transformers import AutoModelForCausalLM

        assert settings["distributed_executor_backend"] == "external_launcher" and 0 < gpu_memory_utilization < 1
        self.model, self.longest, self.most = AutoModelForCausalLM.from_pretrained(model).eval(), max_model_len, max_num_seqs
        self.handed: list[str] = []
        runner = SimpleNamespace(model=self)
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))

    def load_weights(self, weights) -> None:
        own = dict(self.model.named_parameters())
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            self.handed.append(name)

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: list[dict], sampling_params: SamplingParams, use_tqdm: bool) -> list:
        assert len(prompts) <= self.most and sampling_params.top_k == 1 and sampling_params.n == 1
        return [self._answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    @torch.no_grad()
    def _answer(self, prompt: list[int], asked: SamplingParams):
        assert len(prompt) + asked.max_tokens <= self.longest
        said: list[int] = []
        heard: list[dict] = []
        while len(said) < asked.max_tokens and not (said and said[-1] in asked.stop_token_ids and len(said) >= asked.min_tokens):
            logits = self.model(input_ids=torch.tensor([[*prompt, *said]])).logits[0, -1]
            for token, bias in (asked.logit_bias or {}).items():
                logits[token] += bias
            said.append(int(logits.argmax()))
            heard.append({said[-1]: SimpleNamespace(logprob=float(logits.log_softmax(-1)[said[-1]]), rank=1)})
        told = None if asked.logprobs is None else heard
        return SimpleNamespace(prompt_token_ids=prompt, outputs=[SimpleNamespace(token_ids=tuple(said), logprobs=told)])


def install(monkeypatch) -> None:
    """Let `vllm` be this, for TRL's modules too, which look for it when they are loaded."""
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "RequestOutput": object, "__version__": "0.25.0"},
        "vllm.sampling_params": {"StructuredOutputsParams": object},
        "vllm.utils.network_utils": {"get_ip": None},
        "vllm.distributed.weight_transfer.nccl_engine": dict.fromkeys(["NCCLTrainerSendWeightsArgs", "NCCLWeightTransferEngine"]),
    }
    for name, content in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("vllm.utils", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name in ("trl.generation.vllm_client", "trl.generation.vllm_generation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
