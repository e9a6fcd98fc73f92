"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field, fields

from ...core.errors import ConfigError
from ..tokenizer import in_utf8


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Limits and addresses of one server. Raises ConfigError naming the option that is wrong.

    model_name:      what clients call the engine
    port:            0: a free one, which the log names
    api_key:         what clients must send; needed as soon as `host` is not this machine alone
    max_queue:       sequences that may wait beyond the engine's max_batch_size; more are refused with 429
    max_body_bytes:  of one request
    max_prompts:     in one request to /v1/completions
    max_n:           completions per prompt
    max_logprobs:    candidates per position
    drain_timeout_s: what runs may take this long to finish after SIGTERM
    body_timeout_s:  a client may take this long to send a request's body
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    max_queue: int = 256
    max_body_bytes: int = 1 << 20
    max_prompts: int = 64
    max_n: int = 16
    max_logprobs: int = 20
    drain_timeout_s: int = 300
    body_timeout_s: int = 30

    def __post_init__(self) -> None:
        lowest = {"port": 0, "max_queue": 0, "max_logprobs": 0}
        for entry in fields(self):
            value = getattr(self, entry.name)
            low = lowest.get(entry.name, 1)
            if entry.type == "int" and (type(value) is not int or value < low):
                raise ConfigError(f"{_flag(entry.name)} is {value!r}; accepted: an integer of at least {low}")
        if self.port > 65535:
            raise ConfigError(f"--port is {self.port}; accepted: 0 to 65535")
        if not (self.model_name and in_utf8(self.model_name)):
            raise ConfigError(
                f"--served-model-name is {self.model_name!r}; accepted: a text that UTF-8 can encode"
            )
        key = self.api_key
        if key is not None and not (key == key.strip() != "" and key.isascii() and key.isprintable()):
            raise ConfigError(
                "--api-key is empty, not ASCII, or has white space around it; accepted: printable ASCII characters"
            )
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} can be reached from other machines: give --api-key (or TRTC_API_KEY), "
                "or keep --host 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`. Names other than localhost count as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
