"""Sizes as people read them."""


def gib(size_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size_bytes >= unit / 10:
            return f"{size_bytes / unit:,.1f} {name}"
    return f"{size_bytes / 2**10:,.1f} KiB"
