"""A teacher in memory: loaded whole, in 4 bits, layer by layer over a machine's GPUs, or as ZeRO-3's shares over ranks; and asked.

It is the recipe's teacher put in the place of the recipe's model, so that both are loaded by the same code and refused for the same
reasons.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import xxhash
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from harness import model as models
from harness.attention import choose_attention
from harness.embedded import resolve
from harness.errors import ModelError, TeacherError
from harness.losses import Head
from harness.model.head import head_of
from harness.recipe import Recipe
from harness.recipe.backend import Backend, load_backend
from harness.recipe.schema import Model, Train
from harness.teacher.head import all_logits
from harness.teacher.vocabulary import check_same_vocabulary, true_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answer = TypeVar("Answer")
PROBE_TOKENS = 16
ROUNDING_NATS = {"float32": 1e-3}
"""By so much may a log-probability differ, on average, between two ways to compute it; HALVES_NATS in other types."""
HALVES_NATS = 0.05
BLOCKS, BLOCK_BYTES = 64, 4096


class Asked(nn.Module):
    """A model whose forward answers questions about hidden states. A module, so that DeepSpeed's hooks surround all that it computes."""

    def __init__(self, model: PreTrainedModel, *, is_sharded: bool):
        super().__init__()
        self.model, self._is_sharded = model, is_sharded

    def forward(self, ids: Tensor, question: Callable[[Tensor, Head], Answer] | None, inputs: dict) -> Answer | Tensor:
        if question is None:
            return self.model(input_ids=ids, use_cache=False, **inputs).logits
        hidden = self.model.get_decoder()(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        head = head_of(self.model)
        with self._whole(head):
            return question(hidden.to(head.weight.device), head)

    def _whole(self, head: Head):
        if not self._is_sharded:
            return contextlib.nullcontext()
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        # Small ones, and an embedding that is the head as well, may be whole already, and would be cut up under whoever uses them.
        apart = [part for part in (head.weight, head.bias) if part is not None and part.ds_status != ZeroParamStatus.AVAILABLE]
        return deepspeed.zero.GatheredParameters(apart)


@dataclass(frozen=True)
class ResidentTeacher:
    model: PreTrainedModel
    dtype: str
    digest: str
    """Of its weights."""
    device: torch.device
    """Where ids go in."""
    _asked: nn.Module
    _autocast: torch.dtype | None = None

    @torch.no_grad()
    def ask(self, ids: Tensor, question: Callable[[Tensor, Head], Answer], **inputs) -> Answer:
        """question(hidden states [B, T, H], head) of rows of ids [B, T]. No mask: padding stands at the right, where a causal model's
        tokens do not see it. inputs: what tells apart the samples of a flattened batch (position_ids, cu_seq_lens_q and the like). Over
        several ranks of ZeRO-3 all must ask at the same time, each about its own rows."""
        # In its own type, also within a student's autocast; or in the autocast that it was loaded with.
        with torch.autocast(self.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return self._asked(ids.to(self.device), question, inputs)

    @torch.no_grad()
    def logits(self, ids: Tensor, **inputs) -> Tensor:
        """[B, T, rows of the head] by the model's own forward; for a few tokens."""
        return self._asked(ids.to(self.device), None, inputs)

    @property
    def rounding_nats(self) -> float:
        return ROUNDING_NATS.get(self.dtype, HALVES_NATS)


def teacher_recipe(recipe: Recipe) -> Recipe:
    """The recipe with its teacher as its model, and nothing that is only about training."""
    teacher = recipe.teacher
    model = Model(
        name_or_path=teacher.name_or_path,
        revision=teacher.revision,
        dtype=teacher.dtype,
        attn_implementation=teacher.attn_implementation,
        quantization=teacher.quantization,
        trust_remote_code=teacher.trust_remote_code,
    )
    data = recipe.data.model_copy(update={"chat_template": None})
    return recipe.model_copy(update={"model": model, "data": data, "train": Train()})


def load_teacher(recipe: Recipe, tokenizer, longest: int, *, sharded_by: Backend | None = None) -> ResidentTeacher:
    """Load it, and check that it speaks the student's tokens and has room for the `longest` row.

    tokenizer: the student's. sharded_by: a ZeRO-3 backend that rules on these ranks; None: this process has all of it.
    Raises ModelError when it cannot be loaded, TeacherError when it does not fit the student.
    """
    asked, name = teacher_recipe(recipe), recipe.teacher.name_or_path
    try:
        check_same_vocabulary(tokenizer, models.load_tokenizer(asked), name)
        teacher = load_frozen(asked, recipe.teacher.device_map, sharded_by)
        models.check_vocabulary(teacher.model, tokenizer)
        models.check_positions(teacher.model, longest)
    except ModelError as error:
        raise ModelError(f"teacher ({name}; what is said of model.* stands in teacher.* here): {error}") from error
    check_head(teacher, true_vocabulary(tokenizer), name)
    return teacher


def load_frozen(
    recipe: Recipe, device_map: str | None, sharded_by: Backend | None = None, autocast: torch.dtype | None = None
) -> ResidentTeacher:
    """The recipe's model (of a teacher: teacher_recipe), to be asked and never trained; its products in `autocast`, where that is given.
    Raises ModelError."""
    has_gpu, asked = torch.cuda.is_available(), recipe.model
    device = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    dtype = asked.dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    config = _zero3_config(dtype) if sharded_by else None
    # While this object lives, transformers reads weights straight into shares.
    switch = HfDeepSpeedConfig(config) if config else None
    attention = choose_attention(asked.attn_implementation, dtype, has_gpu)
    source = resolve(asked.name_or_path)
    model = models.load_base(recipe, source, dtype, attention, sharded_by or load_backend("single"), device, device_map=device_map)
    del switch
    model.eval().requires_grad_(False)
    module = Asked(model, is_sharded=sharded_by is not None)
    if sharded_by:
        models.check_4bit_survives_the_engine(model, None if dtype == "float32" else dtype)
        module = _under_zero3(module, config)
    elif device_map:
        device = model.get_input_embeddings().weight.device
        if "meta" in (device.type, model.get_output_embeddings().weight.device.type):
            raise ModelError(
                "device_map = auto; the GPUs of this machine do not hold it, and its head or its embedding was left on the host; "
                "use model.quantization or more GPUs (a capture: zero3 over several machines)"
            )
    elif not asked.quantization:
        module.to(device)
    return ResidentTeacher(model, dtype, weights_digest(_folder_of(source, asked.revision)), device, module, autocast)


def check_head(teacher: ResidentTeacher, vocabulary: int, name: str) -> None:
    """Raises TeacherError unless hidden states and head give what the model's own forward gives: some factor, cap or bias of an
    architecture may not be known here, and every target would be of another distribution."""
    ids = torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    own = teacher.logits(ids)[0, :, :vocabulary].float().log_softmax(-1)
    ours = teacher.ask(ids, lambda hidden, head: all_logits(hidden[0], head, vocabulary)).log_softmax(-1)
    probabilities = own.exp()
    difference = float((probabilities * (own - ours.to(own.device)).abs()).sum(-1).mean())
    if not difference <= teacher.rounding_nats:
        raise TeacherError(
            f"teacher.name_or_path = {name}: its head on its hidden states is {difference:.3g} nats away from its own logits; between the "
            f"two {type(teacher.model).__name__} does something that is not known here; take a teacher of another architecture"
        )


# ---- ZeRO-3


def _zero3_config(dtype: str) -> dict:
    """The backend's own (Accelerate reads it from the environment), without what only training needs."""
    from accelerate.utils import DeepSpeedPlugin

    config = copy.deepcopy(DeepSpeedPlugin().deepspeed_config)
    config["zero_optimization"].pop("offload_optimizer", None)
    for key in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
        config.pop(key, None)
    precision = {"bf16": {"enabled": dtype == "bfloat16"}, "fp16": {"enabled": dtype == "float16"}}
    return _without_auto(config) | {"train_micro_batch_size_per_gpu": 1} | precision


def _without_auto(config: dict) -> dict:
    """`auto` is for the Trainer to fill in; DeepSpeed's own defaults serve a forward as well."""
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in config.items() if value != "auto"}


def _under_zero3(module: nn.Module, config: dict) -> nn.Module:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()
    return engine


# ---- what it is


def _folder_of(source: str, revision: str | None) -> Path:
    """Where its files lie; a hub model is in the local cache once it is loaded."""
    if Path(source).is_dir():
        return Path(source)
    from transformers.utils import cached_file

    return Path(cached_file(source, "config.json", revision=revision)).parent


def weights_digest(folder: Path) -> str:
    """A digest of a model's files that reads some of each: sizes, and 64 blocks of 4 KiB evenly over it. Another training of the same
    model changes nearly every block, and a teacher of 140 GB is known in a second. 32 hex digits."""
    digest = xxhash.xxh3_128()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        if file.name == "generation_config.json" or file.name == "tokenizer_config.json":
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb", buffering=0) as stream:
            for block in range(BLOCKS):
                stream.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1), os.SEEK_SET)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
