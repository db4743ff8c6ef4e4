"""What holds for every server that samples, in PPO's recipe and in commands."""

from __future__ import annotations

from urllib.parse import urlsplit

MAX_TEMPERATURE = 4.0


def check_engine(url: str, temperature: float) -> None:
    """
    Raises:
        ValueError: no address, or one with a key; a temperature at which a bias on logits no longer forbids tokens.
    """
    address = urlsplit(url)
    try:
        known = address.scheme in ("http", "https") and address.hostname and (address.port or True)
    except ValueError:  # a port that is no number
        known = False
    if not known:
        raise ValueError(f"engine_url: {url!r} is no address; write http://HOST:PORT")
    if address.username or address.password or address.query:
        raise ValueError("engine_url: no keys in an address, it is written into the run's lineage")
    if temperature > MAX_TEMPERATURE:
        raise ValueError(
            f"engine: vllm forbids tokens by a bias of -100 on their logits, which a temperature of {temperature:g} weakens; "
            f"take at most {MAX_TEMPERATURE:g}, or `engine: local`"
        )
