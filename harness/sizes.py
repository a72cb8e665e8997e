"""Sizes as people read them."""


def gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB" if size_bytes >= 2**30 / 10 else f"{size_bytes / 2**20:,.1f} MiB"
