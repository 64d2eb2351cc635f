"""Where a controller's store is, and who it is there: read once, at the edge. No connection, no redis-py.

A password never stands in a URL or on a command line, where every user of the machine reads it: it comes from a file,
or from the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hierfl.config import check_store_url
from hierfl.errors import ConfigError

__all__ = ["PASSWORD", "PASSWORD_FILE", "RedisOptions", "read_password"]

PASSWORD, PASSWORD_FILE = "HIERFL_STORE_PASSWORD", "HIERFL_STORE_PASSWORD_FILE"


@dataclass(frozen=True, kw_only=True)
class RedisOptions:
    """``url``: ``redis://[USER@]HOST:PORT[/DB]``, ``rediss://`` for TLS, ``unix://[USER@]/PATH``."""

    url: str
    password: str = field(default="", repr=False)
    ca: Path | None = None
    """CA that signed Redis's certificate, PEM; the system's where it is None."""
    certificate: Path | None = None
    """Client certificate, PEM, and its ``key``: where Redis asks for one."""
    key: Path | None = None

    def __post_init__(self) -> None:
        check_store_url("--store", self.url)
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("--store-cert", str(self.certificate or ""), "goes together with --store-key")
        given = [path for path in (self.ca, self.certificate, self.key) if path is not None]
        for path in given:
            if not path.is_file():
                raise ConfigError("--store", str(path), "is no file that can be read")
        if given and not self.url.startswith("rediss://"):
            raise ConfigError("--store", self.url, "must begin with rediss:// where certificates are given for it")

    def tls_files(self) -> dict[str, Any]:
        """The files as redis-py names them; nothing where there is no TLS."""
        named = {"ssl_ca_certs": self.ca, "ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        return {name: str(path) for name, path in named.items() if path is not None}


def read_password(file: Path | None, environment: Mapping[str, str]) -> str:
    """The password, from a file where one is named, else from the environment; empty where there is none."""
    if file is None:
        return environment.get(PASSWORD, "")
    try:
        return file.read_text().rstrip("\n")
    except OSError as error:
        raise ConfigError("--store-password-file", str(file), f"cannot be read: {error.strerror or error}") from None
