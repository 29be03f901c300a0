"""What a served teacher is told: which model, where it listens, and how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lynearm.teacher.config import Dtype, TeachConfig
from lynearm.wire.addresses import host_of, is_loopback
from lynearm.wire.errors import ConfigError
from lynearm.wire.specs import MAX_TOP_K

DEFAULT_BIND = "127.0.0.1:7412"


@dataclass(frozen=True, slots=True)
class ServeTeacherConfig:
    """A teacher that answers by gRPC.

    Raises:
        ConfigError: naming the field that is out of range.
    """

    model: str
    """Directory in the transformers layout, or the name of a model that vLLM can fetch."""
    bind: str = DEFAULT_BIND
    """host:port to listen on; port 0 takes any free one."""
    model_name: str = ""
    """Name by which clients know the teacher; the last part of `model` when empty."""
    license: str = ""
    """Terms under which it may be distilled, for those who ask."""

    insecure: bool = False
    """Listen beyond loopback without TLS or without tokens."""
    tls_cert: Path | None = None
    """Certificate chain, PEM; turns TLS on."""
    tls_key: Path | None = None
    """Its private key, PEM."""
    tls_client_ca: Path | None = None
    """Authorities of clients, PEM; clients then need a certificate."""
    token_file: Path | None = None
    """Tokens, one a line; each call then needs one of them."""

    top_k: int = 256
    """Most entries of a row that a client may ask for."""
    max_chosen_ids: int = 256
    """Most ids that a student may choose at a position."""
    max_model_len: int = 2048
    """Longest prompt plus completion, tokens; at most what the model was made for."""
    max_batch: int = 64
    """Sequences at work at once."""
    max_in_flight: int = 0
    """Requests that the engine holds, queued ones included; 0 for four batches."""
    dtype: Dtype = "auto"
    """"auto" is float32 on a CPU and the model's own elsewhere."""
    kv_cache_mib: int = 0
    """Memory for the KV cache; 0 as for `lynearm teach`."""
    threads: int = 0
    """CPU threads of the engine; 0 for all."""

    call_buffer_mib: int = 32
    """Results of one Score call that may wait in memory until its client has read them."""
    recent_mib: int = 64
    """Results that are kept for clients who ask again."""
    drain_seconds: float = 30.0
    """How long calls may take to end when the server stops."""

    def __post_init__(self) -> None:
        """Check every field."""
        host, _, port = self.bind.rpartition(":")
        has_certificate = self.tls_cert is not None
        checks = {
            "model is empty": bool(self.model),
            f"bind {self.bind!r} is not host:port": bool(host) and port.isdigit() and int(port) < 1 << 16,
            "a TLS certificate needs its key, and a key its certificate": (
                has_certificate == (self.tls_key is not None)
            ),
            "authorities of clients need a TLS certificate": has_certificate or self.tls_client_ca is None,
            f"top_k {self.top_k} is outside 1..{MAX_TOP_K}": 1 <= self.top_k <= MAX_TOP_K,
            f"max_chosen_ids {self.max_chosen_ids} is outside 0..{MAX_TOP_K}": (
                0 <= self.max_chosen_ids <= MAX_TOP_K
            ),
            f"max_in_flight {self.max_in_flight} is negative": self.max_in_flight >= 0,
            f"call_buffer_mib {self.call_buffer_mib} is below 1": self.call_buffer_mib >= 1,
            f"recent_mib {self.recent_mib} is negative": self.recent_mib >= 0,
            f"drain_seconds {self.drain_seconds} is negative": self.drain_seconds >= 0,
        }
        for problem, holds in checks.items():
            if not holds:
                raise ConfigError(problem)
        self._check_exposure()
        self.engine_config()

    @property
    def requests_in_flight(self) -> int:
        """Requests that the engine holds at most."""
        return self.max_in_flight or 4 * self.max_batch

    def engine_config(self) -> TeachConfig:
        """What the engine is made with. It draws as each request says, without files and streams.

        Raises:
            ConfigError: naming the field that is out of range.
        """
        return TeachConfig(
            model=self.model,
            prompts="none",
            stream="served",
            license=self.license or "unknown",
            model_name=self.model_name,
            top_k=self.top_k,
            max_tokens=1,
            max_model_len=self.max_model_len,
            max_batch=self.max_batch,
            dtype=self.dtype,
            kv_cache_mib=self.kv_cache_mib,
            threads=self.threads,
        )

    def _check_exposure(self) -> None:
        if self.insecure or is_loopback(host_of(self.bind)):
            return
        if self.tls_cert is None or (self.token_file is None and self.tls_client_ca is None):
            raise ConfigError(
                f"{self.bind} is reachable from other machines, and a teacher there needs TLS and a token",
                "give --tls-cert, --tls-key and --token-file, listen on 127.0.0.1, or say --insecure",
            )
