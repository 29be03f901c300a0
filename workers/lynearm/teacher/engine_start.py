"""How vLLM's engine is made: what it reads from the environment, and its arguments on CPUs and GPUs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TypeAlias

from lynearm.teacher.config import TeachConfig
from lynearm.teacher.extension import EXTENSION
from lynearm.teacher.memory import check_fits, estimate_memory, free_memory
from lynearm.wire.errors import MissingDependencyError

Untyped: TypeAlias = Any
"""An object of vLLM or transformers, which ship no types that a strict checker accepts."""

_MAX_CPU_CACHE_BYTES = 1 << 30
_MIN_CPU_CACHE_BYTES = 64 << 20
_GPU_SHARE = 0.92
"""Of a GPU's memory, which vLLM takes by default."""
_CPU_BATCHED_TOKENS = 2048
"""Bounds a prefill step on a CPU, and so how long it holds the running completions up."""
_CPU_BLOCK_TOKENS = 32
"""Prefixes are reused in whole blocks of the KV cache; with vLLM's 128 on a CPU, most prompts never are."""


def set_engine_environment(config: TeachConfig) -> None:
    """Set what vLLM and its libraries read from the environment; only before they are first imported.

    The one place where the teacher touches the environment. One process (no engine core beside it), threads
    that do not pin themselves to cores which others use too, no usage reports.
    """
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    else:
        # Ray sets it to the CPUs that an actor asks for.
        os.environ["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if config.capture or config.stats or config.tail_draws:
        # The newer model runner has no place to look from, and none where tails are at hand.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def prefer_first_runner() -> None:
    """Ask vLLM for the model runner in which scoring gathers rows; only before vLLM is first imported.

    On a GPU it would take its second one. What the environment says already stands.
    """
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def import_vllm() -> tuple[Untyped, Untyped, str]:
    """The classes EngineArgs and LLMEngine, and the version.

    Raises:
        MissingDependencyError: without vLLM.
    """
    try:
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine
    except ImportError as error:
        raise MissingDependencyError(
            f"the teacher needs vLLM: {error}",
            "pip install 'lynearm[teacher]', or 'lynearm[teacher-cpu]' on a machine without a GPU",
        ) from error
    return EngineArgs, LLMEngine, str(vllm.__version__)


def shield_llvmlite() -> None:
    """Let vLLM look through the modules that are loaded without tripping over llvmlite, numba's library.

    vLLM 0.32 asks every object of every module for its `__dict__`; llvmlite 0.47 takes that for the name of
    a function of LLVM's and returns a wrapper, on which vLLM fails. The codec needs numba, so both meet here.
    """
    ffi: Untyped = sys.modules.get("llvmlite.binding.ffi")
    library: Untyped = getattr(ffi, "lib", None)
    library_class: Untyped = library.__class__
    find_symbol: Untyped = getattr(library_class, "__getattr__", None)
    if find_symbol is None or getattr(find_symbol, "refuses_dunders", False):
        return

    def find_function(self: Untyped, name: str) -> Untyped:
        if name.startswith("__"):
            raise AttributeError(name)
        return find_symbol(self, name)

    shield: Untyped = find_function
    shield.refuses_dunders = True
    library_class.__getattr__ = shield


def engine_arguments(config: TeachConfig) -> dict[str, object]:
    """Arguments of EngineArgs for a model in a directory of this machine.

    Raises:
        ConfigError: if the model does not fit into what is free.
    """
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    auto_config: Untyped = AutoConfig
    text_config: Untyped = auto_config.from_pretrained(config.model).get_text_config()
    max_model_len = min(config.max_model_len, int(text_config.max_position_embeddings))
    arguments: dict[str, object] = {
        "model": config.model,
        "max_model_len": max_model_len,
        "max_num_seqs": config.max_batch,
        "max_logprobs": _max_logprobs(config, text_config),
        "logprobs_mode": "raw_logprobs",
        "dtype": config.dtype,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": "uni" if config.tensor_parallel == 1 else "mp",
        "disable_log_stats": True,
        "worker_extension_cls": EXTENSION,
    }
    if config.kv_cache_mib:
        arguments["kv_cache_memory_bytes"] = config.kv_cache_mib << 20
    if config.capture or config.stats:
        # Compiled models call no hooks; and a step that is scheduled ahead runs on behind a completion's end.
        arguments["enforce_eager"] = True
        arguments["async_scheduling"] = False
    on_cpu = bool(current_platform.is_cpu())
    need = estimate_memory(Path(config.model), config, on_cpu=on_cpu)
    free_bytes = free_memory() if on_cpu else _gpu_bytes(current_platform, config)
    check_fits(need, free_bytes, config)
    if on_cpu:
        cache_bytes = (config.kv_cache_mib << 20) or _cpu_cache_bytes(config, text_config)
        arguments["kv_cache_memory_bytes"] = cache_bytes
        arguments["dtype"] = "float32" if config.dtype == "auto" else config.dtype
        arguments["enforce_eager"] = True
        arguments["block_size"] = _CPU_BLOCK_TOKENS
        # vLLM 0.32 turns a seeded generator back after a partial prefill in a way that CPU generators
        # refuse ("CPU Generator does not use offset"): each prompt is prefilled in one step.
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(_CPU_BATCHED_TOKENS, config.max_batch, max_model_len)
        arguments["gpu_memory_utilization"] = 0.4
    return arguments


def _max_logprobs(config: TeachConfig, text_config: Untyped) -> int:
    """Columns that a request may ask for: whole distributions where draws may have to be made of these."""
    if config.draws or config.tail_draws:
        return max(config.top_k + config.tail_draws, int(text_config.vocab_size))
    return max(config.top_k, 1)


def _gpu_bytes(platform: Untyped, config: TeachConfig) -> int:
    """Memory of the GPUs of one engine that vLLM may use. Asked of the driver: CUDA is not started yet."""
    return int(_GPU_SHARE * config.tensor_parallel * platform.get_device_total_memory())


def _cpu_cache_bytes(config: TeachConfig, text_config: Untyped) -> int:
    """What `max_batch` sequences of full length need; one sequence's worth even above the usual cap."""
    heads = int(getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads)
    width = int(
        getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    )
    token_bytes = 2 * 4 * int(text_config.num_hidden_layers) * heads * width
    length = min(config.max_model_len, int(text_config.max_position_embeddings))
    one_sequence = 2 * token_bytes * length
    wanted = min(token_bytes * length * config.max_batch, _MAX_CPU_CACHE_BYTES)
    return max(wanted, one_sequence, _MIN_CPU_CACHE_BYTES)
