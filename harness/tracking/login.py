"""What this machine would log in to W&B with."""

import netrc
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from harness.tracking.wandb_run import has_credentials, machine_settings


@dataclass(frozen=True)
class Login:
    server: str
    can_log_in: bool
    key: str | None
    """None, too, where a token logs in."""


def load_login() -> Login:
    """Raises HarnessError for settings that say what cannot be."""
    import wandb

    settings = machine_settings(wandb)
    can = has_credentials(settings)
    return Login(settings.base_url, can, settings.api_key or (_key_of_netrc(settings.base_url) if can else None))


def _key_of_netrc(server: str) -> str | None:
    paths = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for path in map(os.path.expanduser, paths):
        try:
            found = netrc.netrc(path).hosts.get(urlsplit(server).netloc)
        except (netrc.NetrcParseError, OSError):
            continue
        if found:
            return found[2]
    return None
