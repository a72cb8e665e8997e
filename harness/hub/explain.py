"""The hub's errors in our words: what it was asked for, what it said, what would help."""

import contextlib
import errno
from collections.abc import Iterator

from harness.errors import HarnessError, RecipeError, first_line
from harness.hub.cache import endpoint, hub_cache
from harness.hub.needs import Need

TOKEN = "`hf auth login` on this machine, or HF_TOKEN=hf_…"


@contextlib.contextmanager
def explained(need: Need) -> Iterator[None]:
    """Raises RecipeError where the hub has not what the recipe names, and HarnessError where it cannot be had now."""
    from huggingface_hub import errors

    where = f"{need.key} = {need.shown}"
    try:
        yield
    except errors.GatedRepoError:
        page = f"{endpoint()}/{'datasets/' if need.kind == 'dataset' else ''}{need.id}"
        raise HarnessError(f"{where}: is gated; accept its terms at {page}, and give the token of that account: {TOKEN}") from None
    except errors.RevisionNotFoundError:
        raise RecipeError(f"{where}: has no branch, tag or commit {need.revision}{_known_revisions(need)}") from None
    except errors.RepositoryNotFoundError:
        raise RecipeError(
            f"{where}: {endpoint()} has no such {need.repo_type}, or it is private; mend the name, or give a token that may see it: {TOKEN}"
        ) from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        remedy = f"give a token that may read it: {TOKEN}" if code in (401, 403) else "the same command goes on from what has come"
        raise HarnessError(f"{where}: {endpoint()} answers {code or 'with an error'} ({first_line(error)}); {remedy}") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise HarnessError(f"{where}: {error.filename or hub_cache()}: {error.strerror}; {_DISK}") from None
        if isinstance(error, FileNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise RecipeError(f"{where}: {first_line(error)}") from None
        raise _unreachable(where, error) from None
    except ValueError as error:
        # No such configuration or split: datasets says which there are.
        raise RecipeError(f"{where}: {first_line(error)}") from None
    except Exception as error:
        # httpx's own, through huggingface_hub, which raises them as they are.
        if not type(error).__module__.startswith("httpx"):
            raise
        raise _unreachable(where, error) from None


_DISK = "free some space, or set HF_HOME to a folder of yours on a larger disk, here and where the run is submitted"


def _unreachable(where: str, error: Exception) -> HarnessError:
    return HarnessError(
        f"{where}: {endpoint()} cannot be reached, or the connection was cut ({type(error).__name__}: {first_line(error)}); what has come "
        "is kept, and the same command goes on from there; is there a network here (HTTPS_PROXY, HF_ENDPOINT)?"
    )


def _known_revisions(need: Need) -> str:
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(need.id, repo_type=need.repo_type)
    except Exception:  # noqa: BLE001 - only to help
        return "; see its page for those that there are"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"; it has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
